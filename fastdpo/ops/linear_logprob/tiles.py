"""The work on one tile of products: types that say what a logit is and what is kept of a row, and plain torch's way.

`TileOps` is what touches a tile. `TorchTiles` here is the CPU path, and that of any device without Triton;
`TritonTiles` (triton_tiles.py) is a GPU's. `fastdpo.ops.linear_logprob.forward` has the derivation.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# masks a column: finite, so that 0 * (z - m) stays 0 and no inf - inf can arise
NEG = -1.0e38
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Logits:
    """How a logit is made from a product, and which statistics of its row are wanted."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    stats: frozenset[str] = frozenset()

    @property
    def scale(self) -> float:
        """What the product is multiplied by before the softcap (or, without one, in all)."""
        return self.logit_scale if self.softcap else self.logit_scale / self.temperature

    @property
    def slope(self) -> float:
        """dz/dlogit where the softcap is flat, i.e. its constant factor."""
        return self.logit_scale / self.temperature

    @property
    def cap(self) -> float:
        """The bound of |z|: softcap / temperature; 0 without a softcap."""
        return self.softcap / self.temperature if self.softcap else 0.0


@dataclass
class RowState:
    """Running numbers of a block of rows, each (n,), in accumulator precision."""

    m: Tensor  # maximum over v != y
    s: Tensor  # sum over v != y of exp(z - m)
    zy: Tensor  # the target's z
    t: Tensor | None  # sum of e (z - m), for the entropy
    sq: Tensor | None  # sum of e^2
    zsum: Tensor | None  # sum of z over all v, for the mean logit under a softcap
    ratio: Tensor  # exp(m before - m after) of the last tile
    drop: Tensor  # m before - m after of the last tile

    def part(self, block: slice) -> "RowState":
        """A view of some rows."""
        return RowState(**{name: x if x is None else x[block] for name, x in vars(self).items()})  # pyright: ignore[reportArgumentType]

    @staticmethod
    def empty(n: int, acc: torch.dtype, device: torch.device, stats: frozenset[str]) -> "RowState":
        def zeros() -> Tensor:
            return torch.zeros(n, dtype=acc, device=device)

        return RowState(
            m=torch.full((n,), NEG, dtype=acc, device=device),
            s=zeros(),
            zy=zeros(),
            t=zeros() if "entropy" in stats else None,
            sq=zeros() if "log_sum_sq_probs" in stats else None,
            zsum=zeros() if "mean_logit" in stats else None,
            ratio=zeros(),
            drop=zeros(),
        )


class TileOps(Protocol):
    """The work on one (n, c) tile of products. `local` (n,) is the target's column in the tile, or outside it."""

    def e_dtype(self, compute: torch.dtype, acc: torch.dtype) -> torch.dtype:
        """The dtype of `e` below; where it is the accumulators', e may be z itself."""
        ...

    def fold(
        self,
        z: Tensor,
        e: Tensor,
        local: Tensor,
        bias: Tensor | None,
        state: RowState,
        how: Logits,
        write: bool,
    ) -> None:
        """Folds a tile into `state`. With `write`, leaves exp(z - m) * dz/dlogit / slope in e and, where the entropy
        is wanted, its product with z - m in z; without, their contents are undefined."""
        ...

    def dlogits(
        self, z: Tensor, e: Tensor, local: Tensor, bias: Tensor | None, row: "RowGradient", how: Logits
    ) -> None:
        """Turns a tile of products z into d loss / d product, in e."""
        ...

    def dlogits_kept(self, kept: Tensor, e: Tensor, local: Tensor, scale: Tensor, target: Tensor) -> None:
        """e = kept * scale[:, None], and target (n,) at the target's column."""
        ...

    def rescale(self, sums: Tensor, ratio: Tensor) -> None:
        """sums (n, H) *= ratio (n,), in place."""
        ...


@dataclass
class RowGradient:
    """What turns a recomputed tile of a block of rows into gradients, each (n,)."""

    m: Tensor  # the row's maximum over v != y
    others: Tensor  # d loss / dz_v = others * exp(z_v - m) for v != y
    target: Tensor  # d loss / dz_y
    entropy: Tensor | None = None  # -(d loss / d entropy) q / s
    offset: Tensor | None = None  # log p_v + entropy = (z_v - m) + offset

    def part(self, block: slice) -> "RowGradient":
        """A view of some rows."""
        return RowGradient(**{name: x if x is None else x[block] for name, x in vars(self).items()})  # pyright: ignore[reportArgumentType]


class TorchTiles:
    """Tile work in plain torch: the CPU path, and any device without Triton."""

    def e_dtype(self, compute: torch.dtype, acc: torch.dtype) -> torch.dtype:
        return acc

    def fold(
        self,
        z: Tensor,
        e: Tensor,
        local: Tensor,
        bias: Tensor | None,
        state: RowState,
        how: Logits,
        write: bool,
    ) -> None:
        _logits_(z, bias, how)
        inside, at = _where(local, z.shape[1])
        z_at = z.gather(1, at)
        torch.where(inside, z_at[:, 0], state.zy, out=state.zy)
        if state.zsum is not None:
            state.zsum.add_(z.sum(1))
        z.scatter_(1, at, torch.where(inside[:, None], NEG, z_at))
        curve = curve_of(z.clone(), how) if how.softcap else None
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

    def dlogits(self, z: Tensor, e: Tensor, local: Tensor, bias: Tensor | None, row: RowGradient, how: Logits) -> None:
        _logits_(z, bias, how)
        inside, at = _where(local, z.shape[1])
        curve = curve_of(z.clone(), how) if how.softcap else None
        z.sub_(row.m[:, None])
        if row.entropy is None:
            _exp(z, e)
            e.mul_(row.others[:, None])
        else:
            assert row.offset is not None
            _exp(z, e)
            z.clamp_(min=NEG).add_(row.offset[:, None]).mul_(row.entropy[:, None]).add_(row.others[:, None])
            e.mul_(z)
        e.scatter_(1, at, torch.where(inside[:, None], row.target[:, None], e.gather(1, at)))
        if curve is not None:
            e.mul_(curve)
        if how.slope != 1.0:
            e.mul_(how.slope)

    def dlogits_kept(self, kept: Tensor, e: Tensor, local: Tensor, scale: Tensor, target: Tensor) -> None:
        torch.mul(kept, scale[:, None], out=e)
        inside, at = _where(local, e.shape[1])
        e.scatter_(1, at, torch.where(inside[:, None], target[:, None], e.gather(1, at)))

    def rescale(self, sums: Tensor, ratio: Tensor) -> None:
        sums.mul_(ratio[:, None])


def _exp(u: Tensor, out: Tensor) -> None:
    """exp(u); torch's exp2 takes a third of its exp's time on a CPU. The maximum is out of u: the product is small."""
    torch.mul(u, LOG2_E, out=out).exp2_()


def _logits_(z: Tensor, bias: Tensor | None, how: Logits) -> None:
    if bias is not None:
        z.add_(bias)
    if how.softcap:
        z.mul_(how.scale / how.softcap).tanh_().mul_(how.cap)
    elif how.scale != 1.0:
        z.mul_(how.scale)


def curve_of(z: Tensor, how: Logits) -> Tensor:
    """dz/dlogit / slope = 1 - tanh^2, from z, in place."""
    return z.div_(how.cap).square_().neg_().add_(1.0).clamp_(min=0.0)


def _where(local: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    return (local >= 0) & (local < columns), local.clamp(0, columns - 1)[:, None]


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to full relative precision (torch's own switches to x at 20)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
