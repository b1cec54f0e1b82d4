"""Metrics under TRL's names, kept on the device until they are logged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fastdpo.losses import PairLogps, PreferenceOutput, UnpairedOutput
from fastdpo.ops.sequence import segment_sum
from fastdpo.ops.switches import widest_float


@dataclass(frozen=True)
class Columns:
    """The columns of a batch's table, which has a row for each pair, or for each unpaired answer.

    Attributes:
        counts: what is counted; the first counts rows.
        means: name -> the counts whose sum its own sum is divided by when it is logged.
        lengths: name -> two counts, the first of which is logged as a mean over the second.
        nothing: what is logged for a mean over nothing (no scored token in the window); None leaves it out.
    """

    counts: tuple[str, ...]
    means: Mapping[str, tuple[str, ...]]
    lengths: Mapping[str, tuple[str, str]]
    nothing: float | None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.counts, *self.means)

    def table(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The (B, K) table of a batch, in the order of `names`; each column is (B,), a scalar, or left out for 0.

        float64 where the device has it, so that counts stay exact and sums do not depend on how a batch was cut.
        """
        losses = columns["loss"].detach().to(widest_float(columns["loss"].device.type))
        columns = {self.counts[0]: torch.ones_like(losses), **columns}
        zero = torch.zeros_like(losses)
        return torch.stack(
            [columns.get(name, zero).detach().to(losses).expand_as(losses) for name in self.names], dim=1
        )

    def of(self, table: Tensor, name: str) -> Tensor:
        """(B,) of one column."""
        return table[:, self.names.index(name)]

    def averages(self, totals: Sequence[float]) -> dict[str, float]:
        """The logged metrics of the summed table; no row at all gives {}. `aux_loss` is left out where no batch had
        one."""
        column = dict(zip(self.names, totals, strict=True))
        if column[self.counts[0]] == 0:
            return {}
        quotients = {
            name: (column[name], sum(column[count] for count in counts)) for name, counts in self.means.items()
        }
        quotients |= {name: (column[one], column[other]) for name, (one, other) in self.lengths.items()}
        if not column["aux_loss"]:
            del quotients["aux_loss"]
        logged = {
            name: value / count if count else cast(float, self.nothing)
            for name, (value, count) in quotients.items()
            if count or self.nothing is not None
        }
        if "rewards/margins" not in logged and {"rewards/chosen", "rewards/rejected"} <= logged.keys():
            logged["rewards/margins"] = logged["rewards/chosen"] - logged["rewards/rejected"]
        return logged


_TOKENS = ("chosen_tokens", "rejected_tokens")
PAIRS = Columns(
    counts=("pairs", *_TOKENS, "num_tokens"),
    means={
        **dict.fromkeys(
            (
                *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
                *("logps/chosen", "logps/rejected", "aux_loss"),
            ),
            ("pairs",),
        ),
        "logits/chosen": ("chosen_tokens",),
        "logits/rejected": ("rejected_tokens",),
        "entropy": _TOKENS,
        "mean_token_accuracy": ("chosen_tokens",),
    },
    lengths={"length/chosen": ("chosen_tokens", "pairs"), "length/rejected": ("rejected_tokens", "pairs")},
    nothing=0.0,  # as TRL's DPOTrainer logs it
)
# of unpaired answers: `chosen` are the desirable ones, as in TRL's KTOTrainer
ANSWERS = Columns(
    counts=("answers", "desirable", "undesirable", *_TOKENS, "num_tokens"),
    means={
        **dict.fromkeys(("loss", "aux_loss"), ("answers",)),
        **dict.fromkeys(("rewards/chosen", "logps/chosen"), ("desirable",)),
        **dict.fromkeys(("rewards/rejected", "logps/rejected"), ("undesirable",)),
        "logits/chosen": ("chosen_tokens",),
        "logits/rejected": ("rejected_tokens",),
        "entropy": _TOKENS,
        "mean_token_accuracy": ("chosen_tokens",),
    },
    lengths={"length/chosen": ("chosen_tokens", "desirable"), "length/rejected": ("rejected_tokens", "undesirable")},
    nothing=None,
)
# what rewards are compared with: "kl" (not times beta, as TRL logs it) or "delta"
SHIFTS = ("kl", "delta")
SHIFTED = {shift: replace(ANSWERS, means={**ANSWERS.means, shift: ("answers",)}) for shift in SHIFTS}
# of the pairs' margins in the window
QUANTILES = {"rewards/margins_p10": 0.1, "rewards/margins_p50": 0.5, "rewards/margins_p90": 0.9}
# what a log has beside the loss, whose window Trainer averages
LOGGED = frozenset(
    name
    for names in (PAIRS.means, PAIRS.lengths, SHIFTS, QUANTILES, ("num_tokens", "tokens_per_second", "peak_memory_gb"))
    for name in names
) - {"loss"}
PREDICTIONS = (
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "chosen_tokens",
    "rejected_tokens",
)


def _per_sequence(values: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return segment_sum(values.detach().to(dtype), offsets)


@torch.no_grad()
def pair_columns(
    output: PreferenceOutput, logps: PairLogps, policy: Mapping[str, Tensor], offsets: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """The columns of `PAIRS`, (B,) each, but for the auxiliary loss.

    policy: the statistics of the M scored tokens, (M,) each, and perhaps more. offsets: (2B + 1,) int64, on their
    device. lengths: (2B,), the tokens of each sequence.
    """
    dtype = output.losses.dtype
    chosen_tokens, rejected_tokens = offsets.diff().chunk(2)
    logits, entropy, top1 = (
        _per_sequence(policy[name], offsets, dtype).chunk(2) for name in ("mean_logit", "entropy", "is_top1")
    )
    return {
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
        "num_tokens": lengths.to(offsets.device).view(2, -1).sum(0),
        "loss": output.losses,
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/accuracies": output.chosen_rewards > output.rejected_rewards,
        "rewards/margins": output.chosen_rewards - output.rejected_rewards,
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "logits/chosen": logits[0],
        "logits/rejected": logits[1],
        "entropy": entropy[0] + entropy[1],
        "mean_token_accuracy": top1[0],
    }


@torch.no_grad()
def answer_columns(
    output: UnpairedOutput,
    logps: Tensor,
    label: Tensor,
    policy: Mapping[str, Tensor],
    offsets: Tensor,
    lengths: Tensor,
) -> dict[str, Tensor]:
    """The columns of `ANSWERS`, (B,) each, but for what rewards are compared with and the auxiliary loss.

    logps: (B,). label: (B,) bool. policy, offsets (B + 1,), lengths (B,): as in `pair_columns`.
    """
    dtype = output.losses.dtype
    tokens = offsets.diff()
    values = {
        "tokens": tokens,
        "rewards/": output.rewards,
        "logps/": logps,
        "logits/": _per_sequence(policy["mean_logit"], offsets, dtype),
    }
    columns = {
        "desirable": label,
        "undesirable": ~label,
        "num_tokens": lengths.to(offsets.device),
        "loss": output.losses,
        "entropy": _per_sequence(policy["entropy"], offsets, dtype),
        "mean_token_accuracy": _per_sequence(policy["is_top1"], offsets, dtype) * label,
    }
    for side, mine in (("chosen", label), ("rejected", ~label)):
        for name, numbers in values.items():
            # not times 0, which leaves NaN
            columns[f"{side}_tokens" if name == "tokens" else name + side] = numbers.where(mine, 0)
    return columns


def predictions(columns: Columns, table: Tensor) -> dict[str, Tensor]:
    """What `compute_metrics` gets of each row, (B,) each: of pairs under the names of the metrics, of unpaired answers
    "rewards", "logps" and "tokens"."""
    if columns is PAIRS:
        return {name: PAIRS.of(table, name) for name in PREDICTIONS}
    sides = {"rewards": "rewards/{}", "logps": "logps/{}", "tokens": "{}_tokens"}
    return {
        name: columns.of(table, column.format("chosen")) + columns.of(table, column.format("rejected"))
        for name, column in sides.items()
    }


def labels(columns: Columns, table: Tensor) -> Tensor:
    """(B,) int64: 0 for each pair, whose chosen answer is the right one; 1 for a desirable unpaired answer, else 0."""
    return (
        torch.zeros_like(table[:, 0], dtype=torch.long) if columns is PAIRS else columns.of(table, "desirable").long()
    )


def margin_quantiles(margins: Tensor) -> dict[str, float]:
    """The logged quantiles of the pairs' margins (N,), linear between pairs; NaN entries do not count.

    No entry gives {}; nothing but NaN gives NaN.
    """
    if len(margins) == 0:
        return {}
    # not torch.quantile, which takes 16 million numbers at most
    values = margins[~margins.isnan()].cpu().numpy()
    if len(values) == 0:
        return dict.fromkeys(QUANTILES, float("nan"))
    return dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))


class MetricSums:
    """Running column sums, and the margins of pairs. `add` neither copies to the host nor waits for the device."""

    def __init__(self, columns: Columns = PAIRS) -> None:
        self.columns = columns
        self._sums: Tensor | None = None
        self._margins: list[Tensor] = []

    def add(self, table: Tensor) -> None:
        """Add a batch's (B, K) table."""
        sums = table.sum(0)
        self._sums = sums if self._sums is None else self._sums + sums
        if self.columns is not PAIRS:
            return
        self._margins.append(self.columns.of(table, "rewards/margins").clone())
        if len(self._margins) == 1024:
            self._margins = [torch.cat(self._margins)]  # a small tensor takes 512 bytes on a GPU

    def tensor(self, device: torch.device) -> Tensor:
        """The sums of this process, (K,)."""
        return (
            torch.zeros(len(self.columns.names), dtype=widest_float(device.type), device=device)
            if self._sums is None
            else self._sums
        )

    def margins(self, device: torch.device) -> Tensor:
        """The margins of the pairs of this process, (N,)."""
        return torch.cat([torch.zeros(0, dtype=widest_float(device.type), device=device), *self._margins])

    def load(self, sums: Sequence[float], margins: Sequence[float], device: torch.device) -> None:
        """Continue from what a checkpoint kept."""
        self._sums = torch.tensor(list(sums), dtype=widest_float(device.type), device=device)
        self._margins = [torch.tensor(list(margins), dtype=widest_float(device.type), device=device)]

    def clear(self) -> None:
        self._sums = None
        self._margins = []


class MetricWindow:
    """The sums between two logs, of training and of the evaluation that runs; a `Part` of checkpoints.

    Attributes:
        num_tokens: of all steps that were logged, over all processes.
    """

    def __init__(self, accelerator: Accelerator, columns: Columns = PAIRS) -> None:
        self.accelerator, self.columns = accelerator, columns
        self.training, self.evaluation = MetricSums(columns), MetricSums(columns)
        self.num_tokens = 0
        # of steps before a checkpoint that this process did not run: no part of its speed
        self._tokens_before = 0

    def close(self) -> tuple[dict[str, float], int]:
        """The means over all processes since the last log, {} where no step was trained, and how many tokens this run
        went through meanwhile; the next window begins."""
        totals, margins = self._totals(), self._margins()
        self.training.clear()
        means = self.columns.averages(totals)
        if not means:
            return {}, 0
        tokens = int(totals[self.columns.names.index("num_tokens")])
        self.num_tokens += tokens
        mine, self._tokens_before = tokens - self._tokens_before, 0
        return means | margin_quantiles(margins), mine

    def evaluated(self) -> dict[str, float]:
        """The means and quantiles of the evaluation that ended. The loss too: Trainer's mean counts the pairs that fill
        the last batch of several processes."""
        device = self.accelerator.device
        totals = self.evaluation.tensor(device).tolist()
        return self.columns.averages(totals) | margin_quantiles(self.evaluation.margins(device))

    def _totals(self) -> list[float]:
        sums = self.training.tensor(self.accelerator.device)
        return cast(Tensor, self.accelerator.reduce(sums.clone(), reduction="sum")).tolist()

    def _margins(self) -> Tensor:
        """The window's margins of all processes; NaN where one has fewer than another."""
        margins = self.training.margins(self.accelerator.device)
        padded = self.accelerator.pad_across_processes(margins, pad_index=cast(int, float("nan")))
        return cast(Tensor, self.accelerator.gather(cast(Tensor, padded)))

    def state_dict(self) -> dict[str, Any]:
        return {"num_tokens": self.num_tokens, "metric_sums": self._totals(), "margins": self._margins().tolist()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self.num_tokens = state["num_tokens"] if state else 0
        self._tokens_before = int(state["metric_sums"][self.columns.names.index("num_tokens")]) if state else 0
        self.training.clear()
        # the sums of all processes go on in one of them
        if state and self.accelerator.process_index == 0:
            self.training.load(state["metric_sums"], state["margins"], self.accelerator.device)
