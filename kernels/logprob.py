"""log_softmax(logits / T)[label] from logits that already exist, and its gradient.

Forward: one read of (N, V), online maximum m and sum s over v != y, and z_y, (N,) fp32 each.
Backward: one read and one write; d = (onehot - p) * upstream / T with p_v = exp(z_v - m) q / s, q = 1 - p_y.
One program per row (forward), per row and column block (backward).
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.numerics import NEG, base_of


@triton.jit(do_not_specialize=["V"])
def _logprob_fwd_kernel(
    x_ptr,  # (N, V) logits
    label_ptr,  # (N,) int64, negative: ignored
    m_ptr,  # (N,) fp32 out: max over v != y of z_v
    s_ptr,  # (N,) fp32 out: sum over v != y of exp(z_v - m)
    zy_ptr,  # (N,) fp32 out
    V,
    stride_x,
    inv_t,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    lanes = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), NEG, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    zy = tl.zeros((BLOCK,), tl.float32)
    if label >= 0:
        for start in range(0, V, BLOCK):
            cols = start + lanes
            z = tl.load(x_ptr + row * stride_x + cols, mask=cols < V, other=0.0).to(tl.float32) * inv_t
            zy += tl.where(cols == label, z, 0.0)
            z = tl.where((cols == label) | (cols >= V), NEG, z)
            m_new = tl.maximum(m, z)
            # a lane that has seen only masked columns has no maximum yet; its sum stays 0
            base = base_of(m_new)
            s = s * tl.exp(m - base) + tl.exp(z - base)
            m = m_new
    top = tl.max(m, 0)
    base = base_of(top)
    total = tl.sum(s * tl.exp(m - base), 0)
    tl.store(m_ptr + row, top)
    tl.store(s_ptr + row, total)
    tl.store(zy_ptr + row, tl.sum(zy, 0))


@triton.jit(do_not_specialize=["V"])
def _logprob_bwd_kernel(
    x_ptr,  # (N, V) logits
    dx_ptr,  # (N, V) out
    label_ptr,  # (N,) int64
    base_ptr,  # (N,) fp32: m, or 0 where there is none
    others_ptr,  # (N,) fp32: -upstream * q / s / T
    target_ptr,  # (N,) fp32: upstream * q / T
    V,
    stride_x,
    stride_dx,
    inv_t,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(label_ptr + row)
    z = tl.load(x_ptr + row * stride_x + cols, mask=cols < V, other=0.0).to(tl.float32) * inv_t
    z = tl.where((cols == label) | (cols >= V), NEG, z)
    p = tl.exp(z - tl.load(base_ptr + row))
    d = tl.where(cols == label, tl.load(target_ptr + row), p * tl.load(others_ptr + row))
    d = tl.where(label >= 0, d, 0.0)
    tl.store(dx_ptr + row * stride_dx + cols, d.to(dx_ptr.dtype.element_ty), mask=cols < V)


def logprob_fwd(logits: Tensor, labels: Tensor, inv_t: float, m: Tensor, s: Tensor, zy: Tensor) -> None:
    """Writes maximum m and sum s over v != y, and z_y, (N,) fp32, of logits (N, V); last stride must be 1."""
    n, v = logits.shape
    block = min(4096, 1 << (v - 1).bit_length())
    _logprob_fwd_kernel[(n,)](logits, labels, m, s, zy, v, logits.stride(0), inv_t, BLOCK=block, num_warps=8)


def logprob_bwd(
    logits: Tensor, dx: Tensor, labels: Tensor, base: Tensor, others: Tensor, target: Tensor, inv_t: float
) -> None:
    """dx (N, V) = exp(z - base) * others off the target, `target` at it, 0 in rows with a negative label."""
    n, v = logits.shape
    block = min(4096, 1 << (v - 1).bit_length())
    _logprob_bwd_kernel[(n, triton.cdiv(v, block))](
        logits,
        dx,
        labels,
        base,
        others,
        target,
        v,
        logits.stride(0),
        dx.stride(0),
        inv_t,
        BLOCK=block,
        num_warps=8,
    )
