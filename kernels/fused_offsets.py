"""Row work around kernels/fused_fold.py: merging its partial results, and bringing exponentials to a row's one offset.

All of it is O(n V / BV) except `rebase`, which touches only tiles that hold a flagged row; no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.numerics import NEG, base_of


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _merge_kernel(
    m_part, s_part, t_part, sq_part, zsum_part,  # (blocks, n) fp32
    m_ptr, s_ptr, t_ptr, sq_ptr, zsum_ptr,  # (n,) fp32, out
    n_rows, n_blocks, stride_p,
    ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, MEAN: tl.constexpr, BR: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < n_rows
    lanes = tl.arange(0, BB)
    m = tl.full((BB, BR), NEG, tl.float32)
    for start in range(0, n_blocks, BB):
        block = start + lanes
        at = block.to(tl.int64)[:, None] * stride_p + rows[None, :]
        m = tl.maximum(m, tl.load(m_part + at, mask=(block < n_blocks)[:, None] & inside[None, :], other=NEG))
    top = tl.max(m, 0)
    base = base_of(top)
    s = tl.zeros((BB, BR), tl.float32)
    t = tl.zeros((BB, BR), tl.float32)
    sq = tl.zeros((BB, BR), tl.float32)
    zsum = tl.zeros((BB, BR), tl.float32)
    for start in range(0, n_blocks, BB):
        block = start + lanes
        at = block.to(tl.int64)[:, None] * stride_p + rows[None, :]
        keep = (block < n_blocks)[:, None] & inside[None, :]
        # a block without a maximum has sums of 0; finite, so that 0 times it stays 0
        drop = tl.maximum(tl.load(m_part + at, mask=keep, other=NEG) - base[None, :], NEG)
        ratio = tl.exp(drop)
        s_block = tl.load(s_part + at, mask=keep, other=0.0)
        s += ratio * s_block
        if ENTROPY:
            t += ratio * (tl.load(t_part + at, mask=keep, other=0.0) + s_block * drop)
        if SUM_SQ:
            sq += ratio * ratio * tl.load(sq_part + at, mask=keep, other=0.0)
        if MEAN:
            zsum += tl.load(zsum_part + at, mask=keep, other=0.0)
    tl.store(m_ptr + rows, top, mask=inside)
    tl.store(s_ptr + rows, tl.sum(s, 0), mask=inside)
    if ENTROPY:
        tl.store(t_ptr + rows, tl.sum(t, 0), mask=inside)
    if SUM_SQ:
        tl.store(sq_ptr + rows, tl.sum(sq, 0), mask=inside)
    if MEAN:
        tl.store(zsum_ptr + rows, tl.sum(zsum, 0), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _advance_kernel(
    m_part,  # (blocks, n) fp32: maxima of the tile's blocks
    old_ptr,  # (n,) fp32: the offset that the tile was written with
    new_ptr,  # (n,) fp32 out
    ratio_ptr,  # (n,) fp32 out: exp(old - new)
    n_rows, n_blocks, stride_p,
    WINDOW: tl.constexpr, BR: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < n_rows
    lanes = tl.arange(0, BB)
    m = tl.full((BB, BR), NEG, tl.float32)
    for start in range(0, n_blocks, BB):
        block = start + lanes
        at = block.to(tl.int64)[:, None] * stride_p + rows[None, :]
        m = tl.maximum(m, tl.load(m_part + at, mask=(block < n_blocks)[:, None] & inside[None, :], other=NEG))
    top = tl.max(m, 0)
    old = tl.load(old_ptr + rows, mask=inside, other=0.0)
    new = tl.where(top > old + WINDOW, top, old)
    tl.store(new_ptr + rows, new, mask=inside)
    tl.store(ratio_ptr + rows, tl.exp(old - new), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def _rebase_kernel(
    e_ptr,  # (n, c), in place
    m_part,  # (blocks, n) fp32
    old_ptr,  # (n,) fp32
    new_ptr,
    n_rows, n_cols, stride_e, stride_p,
    WINDOW: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    block = tl.program_id(1)
    inside = rows < n_rows
    m = tl.load(m_part + block.to(tl.int64) * stride_p + rows, mask=inside, other=NEG)
    old = tl.load(old_ptr + rows, mask=inside, other=0.0)
    new = tl.load(new_ptr + rows, mask=inside, other=0.0)
    used = tl.where(m > old + WINDOW, m, old)
    if tl.max((used != new).to(tl.int32), 0) > 0:
        ratio = tl.where(used == new, 1.0, tl.exp(used - new))
        for start in range(0, BV, BC):
            cols = block * BV + start + tl.arange(0, BC)
            at = e_ptr + rows.to(tl.int64)[:, None] * stride_e + cols[None, :]
            keep = inside[:, None] & (cols[None, :] < n_cols)
            e = tl.load(at, mask=keep, other=0.0).to(tl.float32) * ratio[:, None]
            tl.store(at, e.to(e_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["n_rows"])
def _rescale_kernel(a_ptr, ratio_ptr, n_rows, depth, stride_a, BR: tl.constexpr, BC: tl.constexpr):
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < n_rows
    ratio = tl.load(ratio_ptr + rows, mask=inside, other=1.0)
    if tl.max((ratio != 1.0).to(tl.int32), 0) > 0:
        cols = tl.program_id(1) * BC + tl.arange(0, BC)
        at = a_ptr + rows.to(tl.int64)[:, None] * stride_a + cols[None, :]
        keep = inside[:, None] & (cols < depth)[None, :]
        tl.store(at, tl.load(at, mask=keep, other=0.0) * ratio[:, None], mask=keep)


def merge(partials: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """(blocks, n) partial m, s (t, sq, zsum) to (n,) results, one merge in a fixed order whatever the tiles were."""
    m = partials["m"]
    blocks, n = m.shape
    _merge_kernel[(triton.cdiv(n, 32),)](
        *(partials.get(name, m) for name in ("m", "s", "t", "sq", "zsum")),
        *(results.get(name, m) for name in ("m", "s", "t", "sq", "zsum")),
        n,
        blocks,
        m.stride(0),
        ENTROPY="t" in partials,
        SUM_SQ="sq" in partials,
        MEAN="zsum" in partials,
        BR=32,
        BB=32,
        num_warps=4,
    )


def advance(m: Tensor, old: Tensor, new: Tensor, ratio: Tensor, window: float) -> None:
    """new (n,): the rows' offset after a tile with block maxima m (blocks, n); ratio = exp(old - new), mostly 1."""
    blocks, n = m.shape
    _advance_kernel[(triton.cdiv(n, 32),)](
        m, old, new, ratio, n, blocks, m.stride(0), WINDOW=window, BR=32, BB=32, num_warps=4
    )


def rebase(e: Tensor, m: Tensor, old: Tensor, new: Tensor, block_cols: int, window: float) -> None:
    """Brings e (n, c), written with `old`, to the offset `new`; tiles without a flagged row are not touched."""
    n, c = e.shape
    _rebase_kernel[(triton.cdiv(n, 32), len(m))](
        e,
        m,
        old,
        new,
        n,
        c,
        e.stride(0),
        m.stride(0),
        WINDOW=window,
        BV=block_cols,
        BR=32,
        BC=min(64, block_cols),
        num_warps=4,
    )


def rescale(a: Tensor, ratio: Tensor) -> None:
    """a (n, H) *= ratio (n,), in place; blocks of rows whose ratios are all 1 are neither read nor written."""
    n, depth = a.shape
    _rescale_kernel[(triton.cdiv(n, 32), triton.cdiv(depth, 128))](
        a, ratio, n, depth, a.stride(0), BR=32, BC=128, num_warps=4
    )
