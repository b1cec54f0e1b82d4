"""One step of an entry of `linear_logprob`, what is right, and the work that it is."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.linear_logprob.api import linear_logprob_plan
from fastdpo.ops.linear_logprob.plan import Plan
from fastdpo.ops.oracle import SAMPLE, Distribution, Outputs, Truth, evenly, peaked_inputs

from ..measure.bounds import Work, own_bytes, peer_work
from ..measure.comparison import Comparison
from ..measure.entries import Entry
from ..measure.timing import MIB
from . import real
from .cases import DTYPES, UNIT, Growth, LogprobCase
from .peers import EAGER

BLOCK = 1024  # rows that eager takes at once where its errors are the measure
GROWN_FROM = 4096  # tokens that a growing input repeats
UPSTREAM = 1 / 16  # the same number in every dtype


class LogprobComparison(Comparison):
    """Inputs of one shape and dtype, for all modes: hidden (N, H), weight (V, H), labels (N,)."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> None:
        self.hidden, self.weight, self.labels, self.softcap = hidden, weight, labels, softcap
        # as DPO's: one coefficient a sequence, of both signs
        self.upstream = torch.full((len(labels),), UPSTREAM, device=hidden.device)
        self.upstream[len(labels) // 2 :] = -UPSTREAM

    @staticmethod
    def of(case: LogprobCase | Growth, device: str, activations: Path | None = None) -> "LogprobComparison":
        """activations: the file of a model's own, where the case is of these."""
        if isinstance(case, Growth):
            return LogprobComparison(*peaked_inputs(GROWN_FROM, case.h, case.v, DTYPES[case.dtype], device))
        if case.inputs == "real":
            assert activations is not None
            return LogprobComparison(*real.load(activations, case.n, device))
        return LogprobComparison(*peaked_inputs(case.n, case.h, case.v, DTYPES[case.dtype], device), case.softcap)

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @property
    def tokens(self) -> int:
        return len(self.labels)

    def grown(self, size: int) -> "LogprobComparison":
        rows = torch.arange(size * UNIT, device=self.labels.device) % len(self.labels)
        return LogprobComparison(self.hidden[rows], self.weight, self.labels[rows], self.softcap)

    def sample(self, outputs: Outputs) -> tuple["LogprobComparison", Outputs]:
        """Some rows of logp and dh; dw is a sum over all."""
        rows = evenly(self.tokens, SAMPLE, self.labels.device)
        return self._part(rows), {name: outputs[name][rows] for name in ("logp", "dh")}

    def step(self, entry: Entry, mode: str) -> Outputs:
        """One forward (and backward): logp, dh, dw."""
        hidden = self.hidden.detach().requires_grad_(mode != "forward")
        weight = self.weight.detach().requires_grad_(mode == "trained")
        with entry.applied(), torch.set_grad_enabled(mode != "forward"):
            logp = entry.run(hidden, weight, self.labels, self.softcap)
            if mode != "forward":
                logp.backward(self.upstream)
        return {"logp": logp.detach(), **self.gradients(dh=hidden, dw=weight)}

    def make_truth(self) -> Truth:
        p = Distribution.of(self.hidden, self.weight, self.softcap)
        rows = evenly(len(self.labels), SAMPLE, self.labels.device)
        columns = torch.cat((self.labels[rows[::2]], evenly(len(self.weight), SAMPLE // 2, rows.device))).unique()
        upstream = self.upstream.double()
        values = {
            "logp": p.logp(self.labels),
            "dh": p.d_hidden(self.labels, upstream, rows),
            "dw": p.d_weight(self.labels, upstream, columns),
        }
        return Truth(values, {"logp": None, "dh": rows, "dw": columns})

    def eager_outputs(self) -> Outputs:
        blocks = [slice(i, i + BLOCK) for i in range(0, len(self.labels), BLOCK)]
        logp, dh = [], []
        dw = torch.zeros_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        for block in blocks:
            outputs = self._part(block).step(EAGER, "trained")
            logp.append(outputs["logp"])
            dh.append(outputs["dh"])
            dw += outputs["dw"]
        return {"logp": torch.cat(logp), "dh": torch.cat(dh), "dw": dw.to(self.weight.dtype)}

    def _part(self, rows: slice | Tensor) -> "LogprobComparison":
        part = LogprobComparison(self.hidden[rows], self.weight, self.labels[rows], self.softcap)
        part.upstream = self.upstream[rows]
        return part

    def work(self, entry: Entry, mode: str) -> tuple[Work | None, float | None]:
        n, (v, h) = len(self.labels), self.weight.shape
        if not entry.name.startswith("fastdpo"):
            return peer_work(entry, mode, n, h, v, self.weight.element_size(), self.softcap), None
        with entry.applied():
            plan = own_plan(self.hidden, self.weight, self.labels, mode, softcap=self.softcap)
        return own_work(plan, n, v, self.weight.element_size()), plan.peak_bytes / MIB


def own_plan(hidden: Tensor, weight: Tensor, labels: Tensor, mode: str, **options: Any) -> Plan:
    """The plan of our op for a mode."""
    hidden = hidden.detach().requires_grad_(mode != "forward")
    weight = weight.detach().requires_grad_(mode == "trained")
    with torch.set_grad_enabled(mode != "forward"):
        return linear_logprob_plan(hidden, weight, labels, **options)


def own_work(plan: Plan, n: int, v: int, operand: int) -> Work:
    """The work of a plan for n tokens, of operands of that many bytes."""
    path = f"{plan.path}, products in {'Triton' if plan.fused else 'BLAS'}"
    return Work(plan.flops, own_bytes(plan.path, plan.fused, operand) * n * v, path)
