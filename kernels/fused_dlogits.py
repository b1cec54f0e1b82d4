"""d loss / d product from hidden states and weight: the tile is made again and never stored as logits.

FLOPs 2 n H V, bytes beyond the operands 2 n V (16-bit operands); see kernels/fold.py for the same from a stored tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.configs import GemmConfig
from fastdpo.kernels.fused_tile import col_block_of, grid, logits_tile, operands, row_block_of


@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def _fused_dlogits_kernel(
    h,
    w,
    u_ptr,
    b_ptr,
    d,  # (n, c) out: a descriptor with TMA
    local_ptr,  # (n,) int64
    bias_ptr,  # (c,) fp32
    m_ptr,  # (n,) fp32 each
    others_ptr,
    target_ptr,
    n_rows,
    n_cols,
    depth,
    rank,
    stride_h,
    stride_w,
    stride_u,
    stride_b,
    stride_d,
    scale,
    inv_softcap,
    cap,
    slope,
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
    m = tl.load(m_ptr + rows, mask=inside, other=0.0)
    others = tl.load(others_ptr + rows, mask=inside, other=0.0) * slope
    target = tl.load(target_ptr + rows, mask=inside, other=0.0) * slope
    local = (tl.load(local_ptr + rows, mask=inside, other=-1) - col).to(tl.int32)
    here = (local >= 0) & (local < BV) & inside
    x = tl.exp(z - m[:, None]) * others[:, None]  # at the target it may overflow; it is replaced
    if BRANCH:
        if tl.max(here.to(tl.int32), 0) > 0:
            x = tl.where(lanes[None, :] == local[:, None], target[:, None], x)
    else:
        x = tl.where(lanes[None, :] == local[:, None], target[:, None], x)
    if CAP:
        ratio_to_cap = z * (1.0 / cap)
        x = x * tl.maximum(1.0 - ratio_to_cap * ratio_to_cap, 0.0)
    if TMA:
        d.store([row, col], x.to(d.dtype))
    else:
        cols = col + lanes
        d_at = d + rows.to(tl.int64)[:, None] * stride_d + cols[None, :]
        tl.store(d_at, x.to(d.dtype.element_ty), mask=inside[:, None] & (cols[None, :] < n_cols))


def fused_dlogits(
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    d: Tensor,
    config: GemmConfig,
    *,
    m: Tensor,
    others: Tensor,
    target: Tensor,
    scale: float,
    softcap: float | None,
    cap: float,
    slope: float,
) -> None:
    """d (n, c) = d loss / d product: `exp(logit - m) * others`, at the target `target`, times curve and slope."""
    arguments = operands(hidden, weight, lora, d, config)
    _fused_dlogits_kernel[grid(hidden, weight, config)](
        *arguments.tensors,
        local,
        m if bias is None else bias,
        m,
        others,
        target,
        *arguments.sizes,
        scale,
        1.0 / softcap if softcap else 1.0,
        cap or 1.0,
        slope,
        BIAS=bias is not None,
        CAP=bool(softcap),
        **arguments.constants,
    )
