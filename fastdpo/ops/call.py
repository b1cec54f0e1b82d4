"""One checked call of the op: its plan, its operands' dtypes, and where its results go."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.arguments import check_arguments
from fastdpo.ops.backend import choose_backend, logger
from fastdpo.ops.function import LinearLogprob
from fastdpo.ops.plan import Needs, Plan, Shape, make_plan
from fastdpo.ops.tiles import Logits

STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "lse")


@dataclass(frozen=True)
class Call:
    """One checked call: everything about it that is not differentiated."""

    labels: Tensor  # (N,), compacted where that is free
    rows: Tensor | None  # (N,)
    unique_rows: bool
    scored: Tensor | None  # (N,) bool, where ignored labels are still among `labels`
    places: Tensor | None  # (N,) int64, where each result goes in the flattened labels
    how: Logits
    needs: Needs
    plan: Plan
    compute: torch.dtype
    acc: torch.dtype
    backend: str

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        ignore_index: int,
        shift: bool,
        stats: Collection[str],
        entropy_grad: bool,
    ) -> "Call":
        compute = check_arguments(
            hidden, weight, labels, bias, rows, temperature, logit_scale, softcap, ignore_index, shift
        )
        acc = torch.promote_types(compute, torch.float32)
        grad = torch.is_grad_enabled()
        needs = Needs(
            hidden=grad and hidden.requires_grad,
            weight=grad and weight.requires_grad,
            bias=grad and bias is not None and bias.requires_grad,
            entropy=grad and entropy_grad and "entropy" in stats,
        )
        if shift:
            labels = torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)), -1)
        flat, unique = labels.reshape(-1), rows is None
        scored = flat != ignore_index
        places = None
        if flat.device.type == "cpu":
            if not bool(scored.all()):
                places = scored.nonzero()[:, 0]
                flat = flat[places]
                rows = places if rows is None else rows[places]
            scored = None
        source_rows = hidden.shape[:-1].numel()
        how = Logits(float(temperature), float(logit_scale), softcap, frozenset(stats))
        shape = Shape(
            n=len(flat),
            h=hidden.shape[-1],
            v=weight.shape[0],
            source_rows=source_rows,
            gathered=rows is not None,
            flattened=_copies_when_flat(hidden),
            compute=compute.itemsize,
            acc=acc.itemsize,
            hidden=hidden.element_size(),
            weight=weight.element_size(),
            widened=hidden.device.type != "cuda",
            extra_tiles=("entropy" in stats) + bool(softcap),
        )
        backend = choose_backend(hidden.device, compute)
        plan = make_plan(shape, needs)
        logger.debug("linear_logprob: %s backend, %s", backend, plan)
        return Call(
            flat,
            rows,
            unique,
            scored,
            places,
            how,
            needs,
            plan,
            compute,
            acc,
            backend,
        )

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        with torch.autocast(flat.device.type, enabled=False):
            if self.backend == "reference":
                return self._eager(flat, weight, bias)
            names = ("logprob", *(s for s in STATS if s in self.how.stats))
            return dict(zip(names, LinearLogprob.apply(flat, weight, bias, self, names), strict=True))

    def spread(self, found: Tensor, labels: Tensor) -> Tensor:
        """Results back in the labels' shape, 0 where ignored."""
        if self.places is not None:
            found = found.new_zeros(labels.numel()).index_copy(0, self.places, found)
        elif self.scored is not None:
            found = found.where(self.scored, found.new_zeros(()))
        return found.view(labels.shape)

    def _eager(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        z = reference.logits(
            hidden.to(self.compute),
            weight.to(self.compute),
            bias,
            temperature=self.how.temperature,
            logit_scale=self.how.logit_scale,
            softcap=self.how.softcap,
        )
        z = z if self.rows is None else z[self.rows]
        labels = self.labels if self.scored is None else self.labels.where(self.scored, 0)
        stats = reference.token_stats(z, labels)
        if not self.needs.entropy:
            stats["entropy"] = stats["entropy"].detach()
        out = {k: x if k == "entropy" else x.detach() for k, x in stats.items() if k in self.how.stats}
        return {"logprob": reference.logprob(z, labels), **out}


def _copies_when_flat(hidden: Tensor) -> bool:
    try:
        hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        return True
    return False
