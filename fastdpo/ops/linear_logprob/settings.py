"""All of a call that is no tensor, and the plan that follows from it.

Path and tile follow from the arguments' shapes and from `Settings` alone, so forward, backward and the fake tensors of
`torch.compile` find the same ones.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from fastdpo.ops.gemm import adds_in_gemm
from fastdpo.ops.linear_logprob.plan import Needs, Plan, Shape, make_plan
from fastdpo.ops.linear_logprob.tiles import LogitSpec, TileOps
from fastdpo.ops.linear_logprob.torch_tiles import TorchTiles

STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "lse")


class Settings(NamedTuple):
    """Everything about a call that is no tensor, as values that a custom operator takes."""

    temperature: float
    logit_scale: float
    softcap: float | None
    stats: str  # names, joined by commas
    needs: list[bool]  # the fields of `Needs`: inside a custom operator no tensor requires a gradient
    unique_rows: bool
    ignored: bool  # negative labels are among the labels: they score 0
    compute: torch.dtype  # in which the operands enter the products
    lora_compute: torch.dtype  # the same of a LoRA's
    backend: str
    fused: int  # columns of the fused kernel's partial results; 0 where product and fold are apart
    workspace: int  # budgets, bytes
    keep: int

    @property
    def spec(self) -> LogitSpec:
        return _spec(self.temperature, self.logit_scale, self.softcap, self.stats)

    @property
    def needed(self) -> Needs:
        return _needs(*self.needs)

    @property
    def acc(self) -> torch.dtype:
        return torch.promote_types(self.compute, torch.float32)

    def tiles(self) -> TileOps:
        if self.backend == "triton":
            from fastdpo.ops.linear_logprob.triton_tiles import TritonTiles

            return TritonTiles()
        return TorchTiles()


# a call asks for these several times, and making them costs more than looking them up
@lru_cache(maxsize=256)
def _spec(temperature: float, logit_scale: float, softcap: float | None, stats: str) -> LogitSpec:
    return LogitSpec(temperature, logit_scale, softcap, frozenset(stats.split(",")) if stats else frozenset())


_needs = lru_cache(maxsize=64)(Needs)  # six flags: all of them fit


def result_names(settings: Settings) -> list[str]:
    """Of the first outputs, which the caller gets; what is saved follows."""
    # a function: the compiler of torch 2.8 knows a named tuple's fields, not its properties
    return ["logprob", *(settings.stats.split(",") if settings.stats else ())]


def shape_of(
    settings: Settings,
    device: torch.device,
    n: int,
    sizes: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    gathered: bool,
    flattened: bool = False,
) -> Shape:
    """What a plan is made from: n labels, sizes R, H, V, r of hidden (R, H), weight (V, H) and a LoRA, and dtypes.

    `gathered` and `flattened`: see `fastdpo.ops.linear_logprob.plan.Shape`.
    """
    source_rows, h, v, rank = sizes
    stats = settings.spec.stats
    return Shape(
        n=n,
        h=h,
        v=v,
        source_rows=source_rows,
        gathered=gathered,
        flattened=flattened,
        compute=settings.compute.itemsize,
        acc=settings.acc.itemsize,
        hidden=dtypes[0].itemsize,
        weight=dtypes[1].itemsize,
        widened=device.type != "cuda" and settings.fused == 0,
        extra_tiles=("entropy" in stats) + bool(settings.softcap),
        curved=bool(settings.softcap),
        fused=settings.fused > 0,
        block_cols=settings.fused,
        rank=rank,
        spare=device.type == "cuda" and settings.compute != settings.acc and not adds_in_gemm(),
        partials=2 + len(stats & {"entropy", "log_sum_sq_probs", "mean_logit"}),
    )


def plan_of(settings: Settings, shape: Shape) -> Plan:
    return _plan(shape, settings.needed, settings.workspace, settings.keep)


_plan = lru_cache(maxsize=256)(make_plan)
