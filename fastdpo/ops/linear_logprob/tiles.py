"""The work on one tile of products as a contract, how a logit is made, and the numbers of a row.

`TileOps` is what touches a tile: `TorchTiles` (torch_tiles.py) on a CPU, and on any device without Triton;
`TritonTiles` (triton_tiles.py) on a GPU. `fastdpo.ops.linear_logprob.forward` has the derivation.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastdpo.ops.numerics import NEG


@dataclass(frozen=True)
class LogitSpec:
    """How a logit is made from a product, and which statistics of its row are made."""

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
        spec: LogitSpec,
        write: bool,
    ) -> None:
        """Folds a tile into `state`. With `write`, leaves exp(z - m) * dz/dlogit / slope in e and, where the entropy
        is among the statistics, its product with z - m in z; without, their contents are undefined."""
        ...

    def dlogits(
        self, z: Tensor, e: Tensor, local: Tensor, bias: Tensor | None, row: "RowGradient", spec: LogitSpec
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
