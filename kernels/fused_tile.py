"""A tile of products in registers, h @ W^T with fp32 sums: what the fused kernels begin with.

A LoRA on the head is a second K loop: h against W, u = s A h against B; W + B A is never formed.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo.kernels.configs import GemmConfig
from fastdpo.kernels.numerics import tanh


@triton.jit
def row_block_of(index, row_blocks, col_blocks, GROUP: tl.constexpr):
    """Launch order: GROUP column blocks stay while all row blocks pass, so W is read once from device memory."""
    width = GROUP * row_blocks
    size = tl.minimum(col_blocks - index // width * GROUP, GROUP)
    return (index % width) // size


@triton.jit
def col_block_of(index, row_blocks, col_blocks, GROUP: tl.constexpr):
    width = GROUP * row_blocks
    size = tl.minimum(col_blocks - index // width * GROUP, GROUP)
    return index // width * GROUP + (index % width) % size


@triton.jit
def add_product(
    acc, a, b, row, col, n_rows, n_cols, depth, stride_a, stride_b,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc + a[row:row+BM] @ b[col:col+BV]^T. Past the end rows repeat (pointers) or are 0 (descriptors)."""
    # without it Triton 3.6 sees a path of no steps, and ptxas serializes wgmma
    tl.assume(depth > 0)
    if TMA:
        for k in range(0, depth, BK):
            acc = tl.dot(a.load([row, k]), b.load([col, k]).T, acc, input_precision="ieee")
    else:
        lanes = tl.arange(0, BK)
        a_at = a + ((row + tl.arange(0, BM)) % n_rows).to(tl.int64)[:, None] * stride_a + lanes[None, :]
        b_at = b + ((col + tl.arange(0, BV)) % n_cols).to(tl.int64)[None, :] * stride_b + lanes[:, None]
        for k in range(0, depth, BK):
            if EVEN:
                x = tl.load(a_at)
                y = tl.load(b_at)
            else:
                x = tl.load(a_at, mask=lanes[None, :] < depth - k, other=0.0)
                y = tl.load(b_at, mask=lanes[:, None] < depth - k, other=0.0)
            acc = tl.dot(x, y, acc, input_precision="ieee")
            a_at += BK
            b_at += BK
    return acc


@triton.jit
def logits_tile(
    h, w, u_ptr, b_ptr, bias_ptr, row, col, n_rows, n_cols, depth, rank, stride_h, stride_w, stride_u, stride_b,
    scale, inv_softcap, cap,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    LORA: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    z = tl.zeros((BM, BV), tl.float32)
    z = add_product(z, h, w, row, col, n_rows, n_cols, depth, stride_h, stride_w, BM, BV, BK, TMA, EVEN)
    if LORA:
        z = add_product(z, u_ptr, b_ptr, row, col, n_rows, n_cols, rank, stride_u, stride_b, BM, BV, BR, False, False)
    if BIAS:
        cols = col + tl.arange(0, BV)
        z += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0)[None, :]
    z = z * scale
    if CAP:
        z = tanh(z * inv_softcap) * cap
    return z


@dataclass(frozen=True)
class Operands:
    """What both fused kernels are launched with."""

    tensors: tuple[Any, ...]  # h, w, u, b, and the (n, c) result
    sizes: tuple[int, ...]  # n, c, H, r, and strides of the tensors
    constants: dict[str, Any]


def operands(
    hidden: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor] | None, out: Tensor | None, config: GemmConfig
) -> Operands:
    lora_u, lora_b = lora or (hidden, weight)
    result = hidden if out is None else out
    tma = config.tma and all(map(_fits_descriptor, (hidden, weight, result)))
    bm, bv, bk = config.block_rows, config.block_cols, config.block_k
    depth, rank = hidden.shape[1], lora_u.shape[1]
    large = (hidden, weight, result)
    if tma:
        shapes = ([bm, bk], [bv, bk], [bm, bk] if out is None else [bm, bv])
        large = tuple(
            TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x, block in zip(large, shapes, strict=True)
        )
    return Operands(
        (large[0], large[1], lora_u, lora_b, large[2]),
        (
            *(len(hidden), len(weight), depth, rank),
            *(x.stride(0) for x in (hidden, weight, lora_u, lora_b, result)),
        ),
        {
            "BM": bm,
            "BV": bv,
            "BK": bk,
            "BR": 1 << max(4, (rank - 1).bit_length()) if lora and rank < bk else bk,
            "GROUP": config.group,
            "TMA": tma,
            "EVEN": depth % bk == 0,
            "BRANCH": config.branch,
            "LORA": lora is not None,
            "num_warps": config.warps,
            "num_stages": config.stages,
        },
    )


def grid(hidden: Tensor, weight: Tensor, config: GemmConfig) -> tuple[int]:
    return (-(-len(hidden) // config.block_rows) * -(-len(weight) // config.block_cols),)


def _fits_descriptor(x: Tensor) -> bool:
    """The hardware's rule: the address and the row stride are multiples of 16 bytes; rows do not overlap."""
    row, column = x.stride()
    return column == 1 and row >= x.shape[1] and x.data_ptr() % 16 == 0 and row * x.element_size() % 16 == 0
