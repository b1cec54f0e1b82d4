"""What the ops share: a mask that stays finite, softplus, and blocks of rows or columns."""

from collections.abc import Iterator

import torch
from torch import Tensor

# masks a column: finite, so that 0 * (z - m) stays 0 and no inf - inf can arise
NEG = -1.0e38


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to full relative precision (torch's own switches to x at 20)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def blocks(total: int, size: int) -> Iterator[slice]:
    """0 to total in slices of `size`; the last one may be shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
