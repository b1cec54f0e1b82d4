"""DPO's metrics under TRL's names, kept on the device until they are logged."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fastdpo.losses import PairLogps, PreferenceOutput
from fastdpo.ops.sequence import segment_sum
from fastdpo.ops.switches import widest_float

PAIR_MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "aux_loss",
)
# each is a sum over scored tokens, divided by the number of them in the named columns
TOKEN_MEANS = {
    "logits/chosen": ("chosen_tokens",),
    "logits/rejected": ("rejected_tokens",),
    "entropy": ("chosen_tokens", "rejected_tokens"),
    "mean_token_accuracy": ("chosen_tokens",),
}
# counts of scored tokens that are logged as means over pairs
LENGTHS = {"length/chosen": "chosen_tokens", "length/rejected": "rejected_tokens"}
# of the pairs' margins in the window
QUANTILES = {"rewards/margins_p10": 0.1, "rewards/margins_p50": 0.5, "rewards/margins_p90": 0.9}
COUNTS = ("pairs", "chosen_tokens", "rejected_tokens", "num_tokens")
# what a log has beside the loss, whose window Trainer averages
LOGGED = frozenset(
    {*PAIR_MEANS, *TOKEN_MEANS, *LENGTHS, *QUANTILES, "num_tokens", "tokens_per_second", "peak_memory_gb"} - {"loss"}
)
PREDICTIONS = (
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "chosen_tokens",
    "rejected_tokens",
)
COLUMNS = (*COUNTS, *PAIR_MEANS, *TOKEN_MEANS)


def per_pair_table(columns: dict[str, Tensor]) -> Tensor:
    """The (B, K) table of a batch, one row a pair, in the order of `COLUMNS`; each column is (B,).

    float64 where the device has it, so that counts stay exact and sums do not depend on how a batch was cut.
    """
    reference = columns["rewards/chosen"]
    dtype = widest_float(reference.device.type)
    columns = {"pairs": torch.ones_like(reference), "aux_loss": torch.zeros_like(reference), **columns}
    return torch.stack([columns[name].detach().to(dtype) for name in COLUMNS], dim=1)


@torch.no_grad()
def batch_table(
    output: PreferenceOutput,
    logps: PairLogps,
    policy: dict[str, Tensor],
    offsets: Tensor,
    lengths: Tensor,
    aux_loss: Tensor | None = None,
    aux_weight: float = 0.0,
) -> Tensor:
    """The (B, K) table of a batch.

    policy: the statistics of the M scored tokens, (M,) each, and perhaps more. offsets: (2B + 1,) int64, on their
    device. lengths: (2B,), the tokens of each sequence. aux_loss: a scalar, added to every loss times `aux_weight`.
    """
    losses = output.losses

    def per_side(values: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = segment_sum(values.detach().to(losses.dtype), offsets).chunk(2)
        return chosen, rejected

    chosen_tokens, rejected_tokens = offsets.diff().chunk(2)
    logits, entropy = per_side(policy["mean_logit"]), per_side(policy["entropy"])
    columns = {
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
        "num_tokens": lengths.to(offsets.device).view(2, -1).sum(0),
        "loss": losses,
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/accuracies": output.chosen_rewards > output.rejected_rewards,
        "rewards/margins": output.chosen_rewards - output.rejected_rewards,
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "logits/chosen": logits[0],
        "logits/rejected": logits[1],
        "entropy": entropy[0] + entropy[1],
        "mean_token_accuracy": per_side(policy["is_top1"])[0],
    }
    if aux_loss is not None:
        aux_loss = aux_loss.to(losses).expand_as(losses)
        columns |= {"loss": losses + aux_weight * aux_loss, "aux_loss": aux_loss}
    return per_pair_table(columns)


def predictions(table: Tensor) -> dict[str, Tensor]:
    """What `compute_metrics` gets of each pair, (B,) each, under the names of the metrics."""
    return {name: table[:, COLUMNS.index(name)] for name in PREDICTIONS}


def averages(totals: Sequence[float]) -> dict[str, float]:
    """The logged metrics of the summed table: pair means over pairs, token means over scored tokens.

    A mean over nothing (no scored token in the window) is 0.0, as TRL logs it; no pair at all gives {}. `aux_loss` is
    left out where no batch had one.
    """
    column = dict(zip(COLUMNS, totals, strict=True))
    if column["pairs"] == 0:
        return {}
    logged = {name: column[name] / column["pairs"] for name in PAIR_MEANS if name != "aux_loss" or column[name]}
    logged |= {name: column[count] / column["pairs"] for name, count in LENGTHS.items()}
    for name, counts in TOKEN_MEANS.items():
        tokens = sum(column[count] for count in counts)
        logged[name] = column[name] / tokens if tokens else 0.0
    return logged


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
    """Running column sums, and the margins of the pairs. `add` neither copies to the host nor waits for the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._margins: list[Tensor] = []

    def add(self, table: Tensor) -> None:
        """Add a batch's (B, K) table."""
        sums = table.sum(0)
        self._sums = sums if self._sums is None else self._sums + sums
        self._margins.append(table[:, COLUMNS.index("rewards/margins")].clone())
        if len(self._margins) == 1024:
            self._margins = [torch.cat(self._margins)]  # a small tensor takes 512 bytes on a GPU

    def tensor(self, device: torch.device) -> Tensor:
        """The sums of this process, (K,)."""
        return (
            torch.zeros(len(COLUMNS), dtype=widest_float(device.type), device=device)
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

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.training, self.evaluation = MetricSums(), MetricSums()
        self.num_tokens = 0
        # of steps before a checkpoint that this process did not run: no part of its speed
        self._tokens_before = 0

    def close(self) -> tuple[dict[str, float], int]:
        """The means over all processes since the last log, {} where no step was trained, and how many tokens this run
        went through meanwhile; the next window begins."""
        totals, margins = self._totals(), self._margins()
        self.training.clear()
        means = averages(totals)
        if not means:
            return {}, 0
        tokens = int(totals[COLUMNS.index("num_tokens")])
        self.num_tokens += tokens
        mine, self._tokens_before = tokens - self._tokens_before, 0
        return means | margin_quantiles(margins), mine

    def evaluated(self) -> dict[str, float]:
        """The means and quantiles of the evaluation that ended. The loss too: Trainer's mean counts the pairs that fill
        the last batch of several processes."""
        device = self.accelerator.device
        totals = self.evaluation.tensor(device).tolist()
        return averages(totals) | margin_quantiles(self.evaluation.margins(device))

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
        self._tokens_before = int(state["metric_sums"][COLUMNS.index("num_tokens")]) if state else 0
        self.training.clear()
        # the sums of all processes go on in one of them
        if state and self.accelerator.process_index == 0:
            self.training.load(state["metric_sums"], state["margins"], self.accelerator.device)
