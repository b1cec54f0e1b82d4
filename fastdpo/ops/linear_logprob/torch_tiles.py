"""`TileOps` in plain torch: the CPU path, and that of any device without Triton."""

import math

import torch
from torch import Tensor

from fastdpo.ops.linear_logprob.tiles import LogitSpec, RowGradient, RowState
from fastdpo.ops.numerics import NEG

LOG2_E = math.log2(math.e)


class TorchTiles:
    def e_dtype(self, compute: torch.dtype, acc: torch.dtype) -> torch.dtype:
        return acc

    def fold(
        self,
        z: Tensor,
        e: Tensor,
        local: Tensor,
        bias: Tensor | None,
        state: RowState,
        spec: LogitSpec,
        write: bool,
    ) -> None:
        _logits_(z, bias, spec)
        in_range, at = _target_column(local, z.shape[1])
        z_at = z.gather(1, at)
        torch.where(in_range, z_at[:, 0], state.zy, out=state.zy)
        if state.zsum is not None:
            state.zsum.add_(z.sum(1))
        z.scatter_(1, at, torch.where(in_range[:, None], NEG, z_at))
        curve = curve_of(z.clone(), spec) if spec.softcap else None
        top = torch.maximum(state.m, z.amax(1))
        # a block that holds only the target has no maximum: any base gives e = 0 there
        base = torch.where(top > NEG / 2, top, 0.0)
        torch.sub(state.m, base, out=state.drop)
        torch.exp(state.drop, out=state.ratio)
        z.sub_(base[:, None])
        _exp(z, e)
        if state.t is not None:
            # -inf - base stays -inf (a bias of -inf): make 0 * -inf a zero
            z.clamp_(min=NEG).mul_(e)
            state.t.add_(state.s * state.drop).mul_(state.ratio).add_(z.sum(1))
        state.s.mul_(state.ratio).add_(e.sum(1))
        if state.sq is not None:
            state.sq.mul_(state.ratio).mul_(state.ratio).add_(torch.linalg.vector_norm(e, dim=1).square_())
        state.m.copy_(top)
        if curve is not None:
            e.mul_(curve)
            if state.t is not None:
                z.mul_(curve)

    def dlogits(
        self, z: Tensor, e: Tensor, local: Tensor, bias: Tensor | None, row: RowGradient, spec: LogitSpec
    ) -> None:
        _logits_(z, bias, spec)
        in_range, at = _target_column(local, z.shape[1])
        curve = curve_of(z.clone(), spec) if spec.softcap else None
        z.sub_(row.m[:, None])
        if row.entropy is None:
            _exp(z, e)
            e.mul_(row.others[:, None])
        else:
            assert row.offset is not None
            _exp(z, e)
            z.clamp_(min=NEG).add_(row.offset[:, None]).mul_(row.entropy[:, None]).add_(row.others[:, None])
            e.mul_(z)
        e.scatter_(1, at, torch.where(in_range[:, None], row.target[:, None], e.gather(1, at)))
        if curve is not None:
            e.mul_(curve)
        if spec.slope != 1.0:
            e.mul_(spec.slope)

    def dlogits_kept(self, kept: Tensor, e: Tensor, local: Tensor, scale: Tensor, target: Tensor) -> None:
        torch.mul(kept, scale[:, None], out=e)
        in_range, at = _target_column(local, e.shape[1])
        e.scatter_(1, at, torch.where(in_range[:, None], target[:, None], e.gather(1, at)))

    def rescale(self, sums: Tensor, ratio: Tensor) -> None:
        sums.mul_(ratio[:, None])


def _exp(u: Tensor, out: Tensor) -> None:
    """exp(u); torch's exp2 takes a third of its exp's time on a CPU. The maximum is out of u: the product is small."""
    torch.mul(u, LOG2_E, out=out).exp2_()


def _logits_(z: Tensor, bias: Tensor | None, spec: LogitSpec) -> None:
    if bias is not None:
        z.add_(bias)
    if spec.softcap:
        z.mul_(spec.scale / spec.softcap).tanh_().mul_(spec.cap)
    elif spec.scale != 1.0:
        z.mul_(spec.scale)


def curve_of(z: Tensor, spec: LogitSpec) -> Tensor:
    """dz/dlogit / slope = 1 - tanh^2, from z, in place."""
    return z.div_(spec.cap).square_().neg_().add_(1.0).clamp_(min=0.0)


def _target_column(local: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return (local >= 0) & (local < columns), local.clamp(0, columns - 1)[:, None]
