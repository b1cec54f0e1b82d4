"""GEMM and fold in one kernel: the logits stay in registers.

A tile z = h @ W_c^T (fp32, BM x BV) leaves, per row and block of BV columns, the maximum and the sum of exponentials
over v != y (and the optional statistics), (blocks, n) fp32 each, and z_y. With `e` it also writes the exponentials
for a second product. FLOPs 2 n H V; bytes beyond the operands 8 n V / BV, and 2 n V with `e` in bf16.

The exponentials of a row are relative to one number, its offset, so that the second product is a plain one: bf16
has the exponents of fp32, and any number within `window` nats of the row's maximum will do. The offset starts as the
maximum over the first block. A block whose maximum is more than the window above it is written relative to its own,
and kernels/fused_offsets.py then brings the row's other columns there, which is rare. The sums are relative to each
block's own maximum and do not depend on the offset: a pass that writes nothing gives the same bits.

Maxima and sums of blocks and their merge: Milakov and Gimelshein, "Online normalizer calculation for softmax",
arXiv:1805.02867, equations 4 to 8; the second product with exponentials of a tile: Dao et al., "FlashAttention",
arXiv:2205.14135, algorithm 1. The target's column kept apart, and one offset a row, are this project's.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.configs import GemmConfig
from fastdpo.kernels.fused_tile import col_block_of, grid, logits_tile, operands, row_block_of
from fastdpo.kernels.numerics import NEG, base_of


@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def _fused_fold_kernel(
    h,  # (n, H), (c, H): descriptors with TMA, else pointers
    w,
    u_ptr,  # (n, r), (c, r)
    b_ptr,
    e,  # (n, c) exponentials out: a descriptor with TMA
    local_ptr,  # (n,) int64: the target's column, or one outside
    bias_ptr,  # (c,) fp32
    offset_ptr,  # (n,) fp32; NEG: none yet
    m_ptr,  # (blocks, n) fp32 each, out
    s_ptr,
    t_ptr,
    sq_ptr,
    zsum_ptr,
    zy_ptr,  # (n,) fp32, written where the target is in the tile
    n_rows,
    n_cols,
    depth,
    rank,
    stride_h,
    stride_w,
    stride_u,
    stride_b,
    stride_e,
    stride_p,
    scale,
    inv_softcap,
    cap,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    BRANCH: tl.constexpr,
    LORA: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    MEAN: tl.constexpr,
    WRITE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    row_block = row_block_of(tl.program_id(0), tl.cdiv(n_rows, BM), tl.cdiv(n_cols, BV), GROUP)
    col_block = col_block_of(tl.program_id(0), tl.cdiv(n_rows, BM), tl.cdiv(n_cols, BV), GROUP)
    row, col = row_block * BM, col_block * BV
    z = logits_tile(
        h, w, u_ptr, b_ptr, bias_ptr, row, col, n_rows, n_cols, depth, rank, stride_h, stride_w, stride_u, stride_b,
        scale, inv_softcap, cap, BM, BV, BK, BR, TMA, EVEN, LORA, BIAS, CAP,
    )  # fmt: skip
    rows = row + tl.arange(0, BM)
    lanes = tl.arange(0, BV)
    inside = rows < n_rows
    at = col_block.to(tl.int64) * stride_p + rows
    width = n_cols - col
    # tile-local and 32 bits wide: 64-bit compares spill
    local = (tl.load(local_ptr + rows, mask=inside, other=-1) - col).to(tl.int32)
    here = (local >= 0) & (local < BV) & inside
    if MEAN:
        tl.store(zsum_ptr + at, tl.sum(tl.where(lanes[None, :] < width, z, 0.0), 1), mask=inside)
    if BRANCH:
        if width < BV:
            z = tl.where(lanes[None, :] >= width, NEG, z)
        if tl.max(here.to(tl.int32), 0) > 0:
            hit = lanes[None, :] == local[:, None]
            tl.store(zy_ptr + rows, tl.sum(tl.where(hit, z, 0.0), 1), mask=here)
            z = tl.where(hit, NEG, z)
    else:
        hit = lanes[None, :] == local[:, None]
        tl.store(zy_ptr + rows, tl.sum(tl.where(hit, z, 0.0), 1), mask=here)
        z = tl.where(hit | (lanes[None, :] >= width), NEG, z)

    m = tl.max(z, 1)
    base = base_of(m)
    x = tl.exp(z - base[:, None])
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(s_ptr + at, tl.sum(x, 1), mask=inside)
    if ENTROPY:
        # a bias of -inf: make 0 * -inf a zero
        tl.store(t_ptr + at, tl.sum(x * tl.maximum(z - base[:, None], NEG), 1), mask=inside)
    if SUM_SQ:
        tl.store(sq_ptr + at, tl.sum(x * x, 1), mask=inside)
    if WRITE:
        offset = tl.load(offset_ptr + rows, mask=inside, other=0.0)
        used = tl.where(m > offset + WINDOW, base, offset)
        # a block without a maximum holds zeros: no offset may turn them into 0 * inf
        x = x * tl.where(m > 0.5 * NEG, tl.exp(base - used), 0.0)[:, None]
        if CAP:
            # from z itself: keeping the tanh alive would spill
            ratio_to_cap = z * (1.0 / cap)
            x = x * tl.maximum(1.0 - ratio_to_cap * ratio_to_cap, 0.0)
        if TMA:
            e.store([row, col], x.to(e.dtype))
        else:
            cols = col + lanes
            e_at = e + rows.to(tl.int64)[:, None] * stride_e + cols[None, :]
            tl.store(e_at, x.to(e.dtype.element_ty), mask=inside[:, None] & (cols[None, :] < n_cols))


def fused_fold(
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    partials: dict[str, Tensor],
    zy: Tensor,
    config: GemmConfig,
    *,
    e: Tensor | None = None,
    offset: Tensor | None = None,
    window: float = 0.0,
    scale: float,
    softcap: float | None,
    cap: float,
) -> None:
    """Partial results of hidden (n, H) against weight (c, H) to `partials` m, s (t, sq, zsum), (blocks, n) fp32 each.

    zy (n,) gets the target's logit where `local` (n,) lies in [0, c). With `e` (n, c) and `offset` (n,), e gets the
    exponentials, relative to the offset or, where a block's maximum exceeds it by more than `window`, to that.
    A logit is `z * scale`, or `cap * tanh(z * scale / softcap)`; lora is (lora_u (n, r), lora_b (c, r)).
    """
    m = partials["m"]
    arguments = operands(hidden, weight, lora, e, config)
    _fused_fold_kernel[grid(hidden, weight, config)](
        *arguments.tensors,
        local,
        m if bias is None else bias,
        m if offset is None else offset,
        m,
        partials["s"],
        partials.get("t", m),
        partials.get("sq", m),
        partials.get("zsum", m),
        zy,
        *arguments.sizes,
        m.stride(0),
        scale,
        1.0 / softcap if softcap else 1.0,
        cap or 1.0,
        BIAS=bias is not None,
        CAP=bool(softcap),
        ENTROPY="t" in partials,
        SUM_SQ="sq" in partials,
        MEAN="zsum" in partials,
        WRITE=e is not None,
        WINDOW=window,
        **arguments.constants,
    )
