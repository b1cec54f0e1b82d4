"""Sums of consecutive values: out[i] = sum values[offsets[i] : offsets[i + 1]], one program per segment.

The order of additions depends on the segment alone, so sums are the same from run to run and batch to batch.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _segment_sum_kernel(
    value_ptr,  # (M,) fp32
    offset_ptr,  # (S + 1,) int64
    out_ptr,  # (S,) fp32
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    low = tl.load(offset_ptr + i)
    high = tl.load(offset_ptr + i + 1)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(low, high, BLOCK):
        at = start + lanes
        total += tl.load(value_ptr + at, mask=at < high, other=0.0)
    tl.store(out_ptr + i, tl.sum(total, 0))


def segment_sum_fwd(values: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Writes the S sums of contiguous fp32 values (M,) to out (S,); offsets (S + 1,) int64, ascending."""
    _segment_sum_kernel[(len(out),)](values, offsets, out, BLOCK=1024, num_warps=4)
