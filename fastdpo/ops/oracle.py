"""The oracle: log-probs and gradients in fp64 on the same operands, in blocks, so that it fits beside any shape.

Written out by hand and not taken from autograd, so that no N x V tensor is held; a test compares it with autograd.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 4096  # of the vocabulary at a time
SAMPLE = 96  # rows of d hidden, and columns of d weight

# relative error of each row of dh that an exact op stays under, on rows up to 12 nats confident
ROW_LIMIT = {torch.bfloat16: 1.2e-2, torch.float32: 1e-3}

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """What is right, in fp64: of each output all of it, or the sampled rows at `rows`.

    values: name -> fp64 tensor; rows: name -> the rows of the output that it holds, or None for all.
    """

    values: dict[str, Tensor]
    rows: dict[str, Tensor | None]

    def errors(self, outputs: Outputs) -> dict[str, float]:
        """Largest absolute error of each output; inf where it is not finite anywhere, sampled or not."""
        return {name: self._error(name, output) for name, output in outputs.items()}

    def _error(self, name: str, output: Tensor) -> float:
        if not bool(torch.isfinite(output).all()):
            return float("inf")
        return float((self._part(name, output) - self.values[name]).abs().max())

    def _part(self, name: str, output: Tensor) -> Tensor:
        rows = self.rows[name]
        return (output if rows is None else output[rows]).double()

    def row_errors(self, outputs: Outputs) -> dict[str, float | None]:
        """Relative error of each sampled row of dh that is not 0: median, largest, and the share within ROW_LIMIT."""
        if "dh" not in outputs:
            return {}
        wanted = self.values["dh"]
        size = wanted.norm(dim=1)
        relative = ((self._part("dh", outputs["dh"]) - wanted).norm(dim=1) / size)[size > 0]
        limit = ROW_LIMIT.get(outputs["dh"].dtype)
        return {
            "median": float(relative.median()),
            "max": float(relative.max()),
            "limit": limit,
            "share_within": None if limit is None else float((relative <= limit).double().mean()),
        }


def passes(found: dict[str, float], by_eager: dict[str, float]) -> bool:
    """Within twice eager's own error at that dtype; a faster wrong answer is not reported."""
    return all(error <= 2 * by_eager[name] + 1e-6 for name, error in found.items())


def spread(total: int, size: int, device: torch.device) -> Tensor:
    """`size` indices from 0 to total - 1, both included, evenly spread."""
    return torch.linspace(0, total - 1, min(total, size), device=device, dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Distribution:
    """hidden (N, H) and weight (V, H) with their softcap, and lse (N,) of their logits, in fp64."""

    hidden: Tensor
    weight: Tensor
    softcap: float | None
    lse: Tensor

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> "Distribution":
        hidden = hidden.detach().double()
        lse = torch.full((len(hidden),), float("-inf"), dtype=torch.float64, device=hidden.device)
        for part in weight.detach().split(COLUMNS):
            z, _ = _logits(hidden, part, softcap)
            lse = torch.logaddexp(lse, z.logsumexp(1))
        return Distribution(hidden, weight.detach(), softcap, lse)

    def logp(self, labels: Tensor) -> Tensor:
        """Log-probs (N,) of labels (N,)."""
        product = torch.linalg.vecdot(self.hidden, self.weight[labels].double())
        return _cap(product, self.softcap)[0] - self.lse

    def d_hidden(self, labels: Tensor, upstream: Tensor, rows: Tensor) -> Tensor:
        """d (upstream . logp) / d hidden[rows], (R, H)."""
        hidden, labels, lse = self.hidden[rows], labels[rows], self.lse[rows]
        grad = torch.zeros_like(hidden)
        for start in range(0, len(self.weight), COLUMNS):
            part = self.weight[start : start + COLUMNS]
            grad += self._d_product(hidden, part, lse, labels - start) @ part.double()
        return grad * upstream[rows, None]

    def d_weight(self, labels: Tensor, upstream: Tensor, columns: Tensor) -> Tensor:
        """d (upstream . logp) / d weight[columns], (C, H)."""
        place = torch.full((len(self.weight),), -1, dtype=torch.int64, device=labels.device)
        place[columns] = torch.arange(len(columns), device=labels.device)
        d = self._d_product(self.hidden, self.weight[columns], self.lse, place[labels])
        return (d * upstream[:, None]).t() @ self.hidden

    def _d_product(self, hidden: Tensor, weight: Tensor, lse: Tensor, local: Tensor) -> Tensor:
        """d logp / d (hidden @ weight.T), (n, c); `local` is each label's column, or outside."""
        z, slope = _logits(hidden, weight, self.softcap)
        chosen = local[:, None] == torch.arange(len(weight), device=local.device)
        d = chosen.double() - torch.exp(z - lse[:, None])
        return d if slope is None else d * slope


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    return _cap(hidden @ weight.double().t(), softcap)


def _cap(product: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits, and their slope with respect to the product where it is not 1."""
    if softcap is None:
        return product, None
    bent = torch.tanh(product / softcap)
    return softcap * bent, 1 - bent.square()
