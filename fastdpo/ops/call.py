"""One checked call of the op: its plan, its operands' dtypes, and where its results go."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastdpo.ops import reference, tiled
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
    wants_mean: bool

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
        on_cpu = hidden.device.type == "cpu"
        # without a softcap the mean logit needs no tile: it is h @ mean(W)
        in_tile = frozenset(s for s in stats if s != "mean_logit" or softcap)
        how = Logits(float(temperature), float(logit_scale), softcap, in_tile)
        shape = Shape(
            n=len(flat),
            h=hidden.shape[-1],
            v=weight.shape[0],
            source_rows=hidden.shape[:-1].numel(),
            compute=compute.itemsize,
            acc=acc.itemsize,
            hidden=hidden.element_size(),
            weight=weight.element_size(),
            on_cpu=on_cpu,
            extra_tiles=("entropy" in in_tile) + bool(softcap),
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
            "mean_logit" in stats and not softcap,
        )

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        with torch.autocast(flat.device.type, enabled=False):
            if self.backend == "reference":
                return self._eager(flat, weight, bias)
            names = ("logprob", *(s for s in STATS if s in self.how.stats))
            found = dict(zip(names, LinearLogprob.apply(flat, weight, bias, self, names), strict=True))
            if self.wants_mean:
                found["mean_logit"] = self._mean_logit(flat, weight, bias)
            return found

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
        wanted = self.how.stats | ({"mean_logit"} if self.wants_mean else set())
        out = {k: x if k == "entropy" else x.detach() for k, x in stats.items() if k in wanted}
        return {"logprob": reference.logprob(z, labels), **out}

    def _mean_logit(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Without a softcap the mean over v needs no tile: it is h @ mean(W) + mean(b)."""
        with torch.no_grad():
            column = _mean_column(weight, self)
            mean = column.new_empty(len(self.labels))
            head = tiled.Head(weight, bias, self.compute, self.acc)
            for block in tiled.blocks(len(mean), self.plan.rows):
                mean[block] = tiled.take_rows(hidden, self.rows, block, head).to(self.acc) @ column
            if bias is not None:
                mean += bias.to(self.acc).mean()
            return mean.mul_(self.how.slope)


# the mean row of a frozen head, with the version of the weight that it was taken from
_MEANS = WeakTensorKeyDictionary()


def _mean_column(weight: Tensor, call: Call) -> Tensor:
    entry = _MEANS.get(weight)
    if entry is not None and entry[0] == (weight._version, call.compute):
        return entry[1]
    total = torch.zeros(weight.shape[1], dtype=call.acc, device=weight.device)
    for block in tiled.blocks(len(weight), call.plan.cols):
        total += weight[block].to(call.compute).to(call.acc).sum(0)
    mean = total.div_(len(weight))
    if not weight.requires_grad:
        _MEANS[weight] = ((weight._version, call.compute), mean)
    return mean
