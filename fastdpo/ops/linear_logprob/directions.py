"""Gradient directions that are summed while a tile's exponentials are at hand.

For hidden states h against W (and for a LoRA's u = s A h against B, which is the same with other names):

    A = sum_v e_v (dz/dlogit)_v W_v,  B = sum_v e_v (z_v - m) (dz/dlogit)_v W_v            v != y
    d logp / dh = q * (dz/dlogit_y W_y - A / s)
    d ent / dh = -q * ((B - E A) / s + p_y (z_y - E_rest) dz/dlogit_y W_y)

with z relative to m, E the mean of z over all v and E_rest that over v != y. q = 1 - p_y is kept apart.
"""

import torch
from torch import Tensor

from fastdpo.ops.gemm import mm_sum
from fastdpo.ops.linear_logprob.tiles import LogitSpec, RowState, TileOps
from fastdpo.ops.linear_logprob.torch_tiles import curve_of


class Directions:
    """d logp / dx / q and, with two `kinds`, d entropy / dx / q, of the operand x (n, k) beside `matrix` (V, k).

    Attributes:
        results: one or two tensors (n, k) in `dtype`, complete after every block of rows was finished.
    """

    def __init__(
        self, matrix: Tensor, n: int, rows: int, kinds: int, dtype: torch.dtype, compute: torch.dtype, acc: torch.dtype
    ) -> None:
        device, k = matrix.device, matrix.shape[1]
        self.matrix, self.compute, self.acc = matrix, compute, acc
        self.results = [torch.empty((n, k), dtype=dtype, device=device) for _ in range(kinds)]
        self.sums = [torch.empty((rows, k), dtype=acc, device=device) for _ in range(kinds)]

    def add(self, tiles: TileOps, e: Tensor, z: Tensor, columns: slice, wide: Tensor, state: RowState) -> None:
        """Adds the columns' terms; e (n, c), z (n, c) = e (z - m), wide (c, k) the matrix's rows as an operand."""
        first, stored = columns.start == 0, self.matrix[columns]
        a = self.sums[0][: len(e)]
        if len(self.sums) > 1:
            b = self.sums[1][: len(e)]
            if not first:
                b.addcmul_(a, state.drop[:, None]).mul_(state.ratio[:, None])
            mm_sum(b, z, wide, stored, self.compute, add=not first)
        if not first:
            tiles.rescale(a, state.ratio)
        mm_sum(a, e, wide, stored, self.compute, add=not first)

    def finish(self, block: slice, state: RowState, base: Tensor, label: Tensor, spec: LogitSpec) -> None:
        """Turns the sums of a block of rows into directions; `base` (n,) is what their exponentials are relative to."""
        # no column but the target's: A is 0, and so is the gradient
        s = torch.where(state.s > 0, state.s, 1.0)
        relative = s if base is state.m else s * torch.exp(state.m - base)
        target = self.matrix.index_select(0, label.clamp(min=0)).to(self.compute).to(self.acc)
        if spec.softcap:
            target.mul_(curve_of(state.zy.clone(), spec)[:, None])
        a = self.sums[0][: len(label)]
        if len(self.sums) > 1:
            # z_y - E = q (z_y - E_rest) took q out of the target's term
            assert state.t is not None
            b, mean_rest = self.sums[1][: len(label)], state.t / s
            above_rest = torch.where(state.s > 0, state.zy - state.m, 0.0) - mean_rest
            p = torch.sigmoid(state.zy - state.m - s.log())
            share = torch.where(p == 0, 0.0, p * above_rest)  # -inf above the rest is a target that cannot occur
            b.addcmul_(a, (mean_rest + share)[:, None], value=-1).div_(s[:, None])
            b.addcmul_(target, share[:, None]).mul_(-spec.slope)
            self.results[1][block] = b
        a.div_(relative[:, None]).sub_(target).mul_(-spec.slope)
        self.results[0][block] = a
