"""The oracle that doctor, benchmark and tests share: inputs like a trained model's, what is right in fp64, and bounds.

Truth is of the same operands, made in blocks, so that it fits beside any shape. It is written out by hand and not taken
from autograd, so that no N x V tensor is held; a test compares it with autograd. The bounds are absolute where eager
PyTorch, which rounds its logits, is no measure.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 4096  # of the vocabulary at a time
SAMPLE = 96  # rows of d hidden, and columns of d weight

# what an exact op stays under, on rows up to 16 nats confident: error of a log-prob in nats, its relative error, and
# the relative error of each row of dh
TOKEN_LIMIT, RELATIVE_LIMIT = 1e-4, 1e-3
ROW_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 1.2e-2, torch.float16: 1.2e-2}

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
        return largest_error(self._part(name, output), self.values[name])

    def _part(self, name: str, output: Tensor) -> Tensor:
        rows = self.rows[name]
        return (output if rows is None else output[rows]).double()

    def row_errors(self, outputs: Outputs) -> dict[str, float | None]:
        """Relative error of each sampled row of dh that is not 0: median, largest, and the share within ROW_LIMIT."""
        if "dh" not in outputs:
            return {}
        truth, dtype = self.values["dh"], outputs["dh"].dtype
        size = truth.norm(dim=1)
        relative = ((self._part("dh", outputs["dh"]) - truth).norm(dim=1) / size)[size > 0]
        limit = None if dtype == torch.float16 else ROW_LIMIT.get(dtype)  # fp16 underflows in small rows
        return {
            "median": float(relative.median()),
            "max": float(relative.max()),
            "limit": limit,
            "share_within": None if limit is None else float((relative <= limit).double().mean()),
        }


def passes(errors: dict[str, float], by_eager: dict[str, float]) -> bool:
    """Each is within its `eager_limit`; a faster wrong answer is not reported."""
    return all(error <= eager_limit(by_eager[name]) for name, error in errors.items())


def eager_limit(error: float) -> float:
    """What an op may be off by where eager PyTorch, at the same dtype, is off by `error`."""
    return 2 * error + 1e-6


def largest_error(output: Tensor, truth: Tensor) -> float:
    return float((output.double() - truth).abs().max()) if truth.numel() else 0.0


def worst_row(dh: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Largest relative error of a row of dh, made in `dtype`, that has a gradient; inf where another one has any."""
    size = truth.norm(dim=-1)
    error = (dh.double() - truth).norm(dim=-1)
    if bool(error[size == 0].any()):
        return math.inf
    live = size > 0
    if dtype == torch.float16:  # the gradient that is returned underflows; what is saved does not
        live &= truth.abs().amax(-1) > 1e-3
    return float((error / size)[live].max())


def peaked_inputs(
    n: int, h: int, v: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), labels (N,), with W[y] mixed into h: random logits would be flat, and peers that
    skip small probabilities would look far too fast. The gap z_y - logsumexp(rest) runs over about -6 to 12 nats."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = randn(v, h).div_(math.sqrt(h))
    labels = torch.randint(0, v, (n,), generator=generator, device=device)
    hidden = randn(n, h)
    gaps = torch.linspace(-6, 12, n, device=device)[torch.randperm(n, generator=generator, device=device)]
    hidden += (math.log(v) + gaps)[:, None] * weight[labels]
    return hidden.to(dtype), weight.to(dtype), labels


def planted_inputs(
    n: int, h: int, v: int, gaps: tuple[float, float], generator: torch.Generator, steps: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), labels (N,), fp64 on the CPU: the rows' z_y - logsumexp(rest) run evenly over
    `gaps`, which so many fixed-point steps approach."""
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64) / math.sqrt(h)
    labels = torch.randint(0, v, (n,), generator=generator)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64)
    goals = torch.linspace(*gaps, n, dtype=torch.float64)
    for _ in range(steps):
        z = hidden @ weight.t()
        chosen = z.gather(1, labels[:, None])[:, 0]
        rest = z.scatter(1, labels[:, None], -math.inf).logsumexp(1) if v > 1 else chosen * 0
        hidden += ((goals - (chosen - rest)) / weight[labels].square().sum(1))[:, None] * weight[labels]
    return hidden, weight, labels


def evenly(total: int, size: int, device: torch.device) -> Tensor:
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
