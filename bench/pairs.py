"""Preference pairs with prompt-shaped masks, as `dpo_loss` measures them."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, HEADS, peaked_inputs

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

    @property
    def name(self) -> str:
        return f"{self.pairs} pairs {self.length}x{self.h}x{self.v} {self.dtype} {self.mode}"


# (B, T, H, V)
CPU_SHAPES = [(2, 256, 512, 32000)]


def pair_cases(device: str, quick: bool) -> list[PairCase]:
    if device == "cpu":
        return [PairCase(*shape, "bf16", mode) for shape in CPU_SHAPES for mode in MODES]
    heads = HEADS[:1] if quick else [HEADS[1], HEADS[0], HEADS[3], HEADS[5]]
    return [PairCase(4, 1024, head.h, head.v, "bf16", mode, head.model) for head in heads for mode in MODES]


@dataclass(frozen=True)
class Pairs:
    """hidden, ref_hidden (2B, T, H), chosen rows then rejected rows; weight (V, H), both policies'; labels (2B, T).

    And the same tokens as a collator gives them: rows (M,) of the flattened hidden states, targets (M,), and
    offsets (2B + 1,) of each sequence.
    """

    hidden: Tensor
    ref_hidden: Tensor
    weight: Tensor
    labels: Tensor

    @staticmethod
    def of(case: PairCase, device: str, seed: int = 0) -> "Pairs":
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
        return Pairs(hidden.view(2 * b, t, -1), ref_hidden.view(2 * b, t, -1), weight, labels)

    @cached_property
    def rows(self) -> Tensor:
        return (self.labels.view(-1) != IGNORE).nonzero()[:, 0]

    @cached_property
    def targets(self) -> Tensor:
        return self.labels.view(-1)[self.rows]

    @cached_property
    def offsets(self) -> Tensor:
        return F.pad((self.labels != IGNORE).sum(1).cumsum(0), (1, 0))

    def pair(self, index: int) -> "Pairs":
        both = torch.tensor([index, index + len(self.labels) // 2], device=self.labels.device)
        return Pairs(self.hidden[both], self.ref_hidden[both], self.weight, self.labels[both])
