"""What `dpo_loss` measures: preference pairs with prompt-shaped masks, on the heads of real models."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.ops.oracle import peaked_inputs

from ..linear_logprob.cases import DTYPES, HEADS, MOST_TOKENS, Growth

BETA = 0.1
IGNORE = -100
MODES = ("frozen", "trained")


@dataclass(frozen=True)
class PairCase:
    """B pairs padded to T positions; mode: d hidden only, or d hidden and d weight."""

    pairs: int
    length: int
    h: int
    v: int
    dtype: str
    mode: str
    head: str = ""
    sweep: bool = False

    @property
    def name(self) -> str:
        return f"{self.pairs} pairs {self.length}x{self.h}x{self.v} {self.dtype} {self.mode}"


@dataclass(frozen=True)
class PairSweep:
    """The points of a plot: T varies at (H, V), V varies at (T, H), of B pairs."""

    pairs: int
    length: int
    h: int
    v: int
    lengths: tuple[int, ...]
    vs: tuple[int, ...]
    head: str = ""

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """(B, T, H, V), each once."""
        shapes = [(self.pairs, length, self.h, self.v) for length in self.lengths]
        return list(dict.fromkeys(shapes + [(self.pairs, self.length, self.h, v) for v in self.vs]))


# (B, T, H, V)
CPU_SHAPES = [(2, 256, 512, 32000)]
CPU_QUICK = (2, 64, 256, 16384)
# of models, the most important first, and the one of a quick run
CUDA_HEADS = ("Llama-3.2-1B", "Qwen2.5-0.5B", "Llama-3.1-8B", "Qwen2.5-7B")
CUDA_QUICK = "Qwen2.5-0.5B"
_LLAMA = HEADS["Llama-3.2-1B"]
# by device and whether the run is a quick one
SWEEPS = {
    ("cpu", True): PairSweep(2, 64, 256, 8192, (32, 64, 128), (4096, 8192, 16384)),
    ("cpu", False): PairSweep(2, 256, 512, 32000, (64, 128, 256, 512), (4000, 8000, 16000, 32000, 64000)),
    ("cuda", True): PairSweep(
        4, 1024, _LLAMA.h, _LLAMA.v, (256, 1024, 2048), (_LLAMA.v // 4, _LLAMA.v // 2, _LLAMA.v), _LLAMA.model
    ),
    ("cuda", False): PairSweep(
        4,
        1024,
        _LLAMA.h,
        _LLAMA.v,
        (256, 512, 1024, 2048, 4096),
        (_LLAMA.v // 8, _LLAMA.v // 4, _LLAMA.v // 2, _LLAMA.v, 2 * _LLAMA.v),
        _LLAMA.model,
    ),
}


def pair_cases(device: str, quick: bool, budget_mib: float = 0.0, sweep: bool = False) -> list[PairCase | Growth]:
    """What a run measures, the most important first.

    budget_mib: the largest N in it is looked for, unless it is 0. sweep: with the points of the plot.
    """
    if device == "cpu":
        shapes = [CPU_QUICK] if quick else CPU_SHAPES
        plain = [PairCase(*shape, "bf16", mode) for shape in shapes for mode in MODES]
    else:
        heads = [HEADS[model] for model in ((CUDA_QUICK,) if quick else CUDA_HEADS)]
        plain = [PairCase(4, 1024, head.h, head.v, "bf16", mode, head.model) for head in heads for mode in MODES]
    names = {case.name for case in plain}
    points = [case for case in sweep_cases(device, quick) if case.name not in names] if sweep else []
    return [*plain, *(growth_cases(device, quick, budget_mib) if budget_mib else ()), *points]


def sweep_cases(device: str, quick: bool) -> list[PairCase]:
    """The points of the plot."""
    sweep = SWEEPS[device, quick]
    return [PairCase(*shape, "bf16", mode, sweep.head, sweep=True) for shape in sweep.shapes for mode in MODES]


def growth_cases(device: str, quick: bool, budget_mib: float) -> list[Growth]:
    """How many tokens of pairs fit, at the plot's T, H and V."""
    sweep, most = SWEEPS[device, quick], MOST_TOKENS[device, quick]
    return [Growth(sweep.h, sweep.v, "bf16", mode, budget_mib, most, sweep.length, sweep.head) for mode in MODES]


@dataclass(frozen=True)
class PairInputs:
    """hidden, ref_hidden (2B, T, H), chosen rows then rejected rows; weight (V, H), both policies'; labels (2B, T).

    And the same tokens as a collator gives them: rows (M,) of the flattened hidden states, targets (M,), and
    offsets (2B + 1,) of each sequence.
    """

    hidden: Tensor
    ref_hidden: Tensor
    weight: Tensor
    labels: Tensor

    @staticmethod
    def of(case: PairCase, device: str, seed: int = 0) -> "PairInputs":
        """About a quarter to a half of a row is prompt; completions end at random, and padding follows."""
        b, t = case.pairs, case.length
        hidden, weight, labels = peaked_inputs(2 * b * t, case.h, case.v, DTYPES[case.dtype], device, seed)
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(t // 4, t // 2 + 1, (b,), generator=generator).repeat(2)
        ends = prompts + 1 + (torch.rand(2 * b, generator=generator) * (t - prompts)).long()
        at = torch.arange(t)
        scored = (at >= prompts[:, None]) & (at < ends[:, None])
        noise = torch.randn(hidden.shape, generator=torch.Generator(device).manual_seed(seed + 1), device=device)
        ref_hidden = (hidden.float() + 0.05 * noise).to(hidden.dtype)
        labels = labels.view(2 * b, t).masked_fill(~scored.to(device), IGNORE)
        return PairInputs(hidden.view(2 * b, t, -1), ref_hidden.view(2 * b, t, -1), weight, labels)

    @cached_property
    def rows(self) -> Tensor:
        return (self.labels.view(-1) != IGNORE).nonzero()[:, 0]

    @cached_property
    def targets(self) -> Tensor:
        return self.labels.view(-1)[self.rows]

    @cached_property
    def offsets(self) -> Tensor:
        return F.pad((self.labels != IGNORE).sum(1).cumsum(0), (1, 0))

    def take(self, pairs: Sequence[int]) -> "PairInputs":
        """Of these pairs, in this order, each as often as it is named."""
        chosen = torch.tensor(pairs, device=self.labels.device)
        both = torch.cat((chosen, chosen + len(self.labels) // 2))
        return PairInputs(self.hidden[both], self.ref_hidden[both], self.weight, self.labels[both])
