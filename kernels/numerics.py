"""What several kernels share: a mask that stays finite, tanh, and the base of exponentials.

NEG masks a column: finite, so that 0 * NEG stays 0 and no inf - inf arises.
"""

import triton
import triton.language as tl

NEG = tl.constexpr(-1.0e38)


@triton.jit
def tanh(x):
    """To fp32 accuracy without libdevice (which the interpreter cannot run); odd series where 1 - t cancels."""
    t = tl.exp(-2.0 * tl.abs(x))
    r = (1.0 - t) / (1.0 + t)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -r, r))


@triton.jit
def base_of(m):
    """What exponentials are relative to: the maximum, or 0 where only masked columns were seen (then all are 0)."""
    return tl.where(m > 0.5 * NEG, m, 0.0)
