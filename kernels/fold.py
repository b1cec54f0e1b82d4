"""The tile work of the log-prob op in Triton, around GEMMs that are not ours.

A tile z (n, c), fp32, holds products h @ W_c^T. `fold_tile` reads it twice (8 bytes an element), turns products
into logits, folds them into per-row running numbers and writes the exponentials (2 bytes in bf16) for the second
GEMM; the target's column never enters (fastdpo/ops/linear_logprob/forward.py has the derivation). `dlogits_tile` turns
a recomputed tile into d loss / d product (6 bytes an element). One program per row (fold) or per row and column block
(dlogits); no atomics, so results are the same from run to run. The running maximum and sum are those of Milakov and
Gimelshein, arXiv:1805.02867, algorithm 3.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.numerics import NEG, base_of, tanh


@triton.jit
def _logits(z_ptr, bias_ptr, cols, n_cols, scale, inv_softcap, cap, BIAS: tl.constexpr, CAP: tl.constexpr):
    """Logits of columns `cols` of one row; NEG past the end."""
    inside = cols < n_cols
    z = tl.load(z_ptr + cols, mask=inside, other=0.0)
    if BIAS:
        z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    z = z * scale
    if CAP:
        z = tanh(z * inv_softcap) * cap
    return tl.where(inside, z, NEG)


@triton.jit(do_not_specialize=["n_cols"])
def _fold_kernel(
    z_ptr,  # (n, c) fp32: products; with ENTROPY and WRITE overwritten by e * (z - m) * curve
    e_ptr,  # (n, c) exponentials out
    local_ptr,  # (n,) int64
    bias_ptr,  # (c,) fp32
    m_ptr,  # (n,) fp32 each, running
    s_ptr,
    zy_ptr,
    t_ptr,
    sq_ptr,
    zsum_ptr,
    ratio_ptr,  # (n,) fp32 each, of this tile
    drop_ptr,
    n_cols,
    stride_z,
    stride_e,
    scale,
    inv_softcap,
    cap,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SUM_SQ: tl.constexpr,
    MEAN: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    e_row = e_ptr + row * stride_e
    local = tl.load(local_ptr + row)
    lanes = tl.arange(0, BLOCK)

    top = tl.full((BLOCK,), NEG, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        z = _logits(z_row, bias_ptr, cols, n_cols, scale, inv_softcap, cap, BIAS, CAP)
        if MEAN:
            total += tl.where(cols < n_cols, z, 0.0)
        top = tl.maximum(top, tl.where(cols == local, NEG, z))
    m_old = tl.load(m_ptr + row)
    m_new = tl.maximum(m_old, tl.max(top, 0))
    base = base_of(m_new)
    drop = m_old - base
    ratio = tl.exp(drop)

    s = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    sq = tl.zeros((BLOCK,), tl.float32)
    zy = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + lanes
        z = _logits(z_row, bias_ptr, cols, n_cols, scale, inv_softcap, cap, BIAS, CAP)
        zy += tl.where(cols == local, z, 0.0)
        z = tl.where(cols == local, NEG, z)
        u = z - base
        e = tl.exp(u)
        s += e
        if SUM_SQ:
            sq += e * e
        if ENTROPY:
            # a bias of -inf: make 0 * -inf a zero
            eu = e * tl.maximum(u, NEG)
            t += eu
        if WRITE:
            if CAP:
                ratio_to_cap = z * (1.0 / cap)
                curve = tl.maximum(1.0 - ratio_to_cap * ratio_to_cap, 0.0)
                e = e * curve
                if ENTROPY:
                    eu = eu * curve
            tl.store(e_row + cols, e.to(e_ptr.dtype.element_ty), mask=cols < n_cols)
            if ENTROPY:
                tl.store(z_row + cols, eu, mask=cols < n_cols)

    tl.store(m_ptr + row, m_new)
    tl.store(ratio_ptr + row, ratio)
    tl.store(drop_ptr + row, drop)
    s_old = tl.load(s_ptr + row)
    tl.store(s_ptr + row, s_old * ratio + tl.sum(s, 0))
    if ENTROPY:
        tl.store(t_ptr + row, (tl.load(t_ptr + row) + s_old * drop) * ratio + tl.sum(t, 0))
    if SUM_SQ:
        tl.store(sq_ptr + row, tl.load(sq_ptr + row) * ratio * ratio + tl.sum(sq, 0))
    if MEAN:
        tl.store(zsum_ptr + row, tl.load(zsum_ptr + row) + tl.sum(total, 0))
    if (local >= 0) & (local < n_cols):
        tl.store(zy_ptr + row, tl.sum(zy, 0))


@triton.jit(do_not_specialize=["n_cols"])
def _dlogits_kernel(
    z_ptr,  # (n, c) fp32: products, or with KEPT the kept exponentials in the operands' dtype
    e_ptr,  # (n, c) d loss / d product out; may be z
    local_ptr,  # (n,) int64
    bias_ptr,  # (c,) fp32
    m_ptr,  # (n,) fp32 each
    others_ptr,
    target_ptr,
    entropy_ptr,
    offset_ptr,
    n_cols,
    stride_z,
    stride_e,
    scale,
    inv_softcap,
    cap,
    slope,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(local_ptr + row)
    target = tl.load(target_ptr + row)
    factor = tl.load(others_ptr + row)
    z_row = z_ptr + row * stride_z
    if KEPT:
        d = tl.load(z_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32) * factor
        d = tl.where(cols == local, target, d)
    else:
        z = _logits(z_row, bias_ptr, cols, n_cols, scale, inv_softcap, cap, BIAS, CAP)
        u = z - tl.load(m_ptr + row)
        if ENTROPY:
            factor += tl.load(entropy_ptr + row) * (tl.maximum(u, NEG) + tl.load(offset_ptr + row))
        d = tl.where(cols == local, target, tl.exp(tl.where(cols == local, 0.0, u)) * factor)
        if CAP:
            ratio_to_cap = z * (1.0 / cap)
            d = d * tl.maximum(1.0 - ratio_to_cap * ratio_to_cap, 0.0)
        d = d * slope
    tl.store(e_ptr + row * stride_e + cols, d.to(e_ptr.dtype.element_ty), mask=cols < n_cols)


def fold_tile(
    z: Tensor,
    e: Tensor,
    local: Tensor,
    bias: Tensor | None,
    *,
    m: Tensor,
    s: Tensor,
    zy: Tensor,
    ratio: Tensor,
    drop: Tensor,
    t: Tensor | None = None,
    sq: Tensor | None = None,
    zsum: Tensor | None = None,
    scale: float,
    softcap: float | None,
    cap: float,
    write: bool,
) -> None:
    """Folds z (n, c) fp32 into the running numbers (n,) fp32, in place; with `write`, exponentials to e (n, c).

    A logit is `z * scale`, or `cap * tanh(z * scale / softcap)`. t, sq and zsum are kept where they are given.
    """
    n, c = z.shape
    _fold_kernel[(n,)](
        z,
        e,
        local,
        m if bias is None else bias,
        m,
        s,
        zy,
        m if t is None else t,
        m if sq is None else sq,
        m if zsum is None else zsum,
        ratio,
        drop,
        c,
        z.stride(0),
        e.stride(0),
        scale,
        1.0 / softcap if softcap else 1.0,
        cap or 1.0,
        BIAS=bias is not None,
        CAP=bool(softcap),
        ENTROPY=t is not None,
        SUM_SQ=sq is not None,
        MEAN=zsum is not None,
        WRITE=write,
        BLOCK=_block(c, 4096),
        num_warps=8,
    )


def dlogits_tile(
    z: Tensor,
    e: Tensor,
    local: Tensor,
    bias: Tensor | None = None,
    *,
    others: Tensor,
    target: Tensor,
    m: Tensor | None = None,
    entropy: Tensor | None = None,
    offset: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    cap: float = 0.0,
    slope: float = 1.0,
) -> None:
    """e (n, c) = d loss / d product, from products z (n, c) fp32; or, without m, from kept exponentials z.

    Off the target: `exp(logit - m) * (others + entropy * (logit - m + offset)) * curve * slope`, or
    `z * others` for kept ones; at the target `target` (times curve and slope), each factor (n,) fp32.
    """
    n, c = z.shape
    block = _block(c, 1024)
    _dlogits_kernel[(n, triton.cdiv(c, block))](
        z,
        e,
        local,
        others if bias is None else bias,
        others if m is None else m,
        others,
        target,
        others if entropy is None else entropy,
        others if offset is None else offset,
        c,
        z.stride(0),
        e.stride(0),
        scale,
        1.0 / softcap if softcap else 1.0,
        cap or 1.0,
        slope,
        BIAS=bias is not None,
        CAP=bool(softcap),
        ENTROPY=entropy is not None,
        KEPT=m is None,
        BLOCK=block,
        num_warps=4,
    )


def _block(columns: int, most: int) -> int:
    return min(most, 1 << max(0, columns - 1).bit_length())
