"""DPO's metrics under TRL's names, kept on the device as sums and counts until they are logged."""

from collections.abc import Sequence

import torch
from torch import Tensor

PAIR_MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# each is a sum over scored tokens, divided by the number of them in the named columns
TOKEN_MEANS = {
    "logits/chosen": ("chosen_tokens",),
    "logits/rejected": ("rejected_tokens",),
    "entropy": ("chosen_tokens", "rejected_tokens"),
    "mean_token_accuracy": ("chosen_tokens",),
}
COUNTS = ("pairs", "chosen_tokens", "rejected_tokens", "num_tokens")
COLUMNS = (*COUNTS, *PAIR_MEANS, *TOKEN_MEANS)


def per_pair_table(columns: dict[str, Tensor]) -> Tensor:
    """The (B, K) table of a batch, one row a pair, in the order of `COLUMNS`; each column is (B,).

    float64 where the device has it, so that counts stay exact and sums do not depend on how a batch was cut.
    """
    reference = columns["rewards/chosen"]
    dtype = torch.float32 if reference.device.type == "mps" else torch.float64
    columns = {"pairs": torch.ones_like(reference), **columns}
    return torch.stack([columns[name].detach().to(dtype) for name in COLUMNS], dim=1)


def averages(totals: Sequence[float]) -> dict[str, float]:
    """The logged metrics of the summed table: pair means over pairs, token means over scored tokens.

    A mean over nothing (no scored token in the window) is 0.0, as TRL logs it; no pair at all gives {}.
    """
    column = dict(zip(COLUMNS, totals, strict=True))
    if column["pairs"] == 0:
        return {}
    logged = {name: column[name] / column["pairs"] for name in PAIR_MEANS}
    for name, counts in TOKEN_MEANS.items():
        tokens = sum(column[count] for count in counts)
        logged[name] = column[name] / tokens if tokens else 0.0
    return logged


class MetricSums:
    """Running column sums. `add` neither copies to the host nor waits for the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, table: Tensor) -> None:
        """Add a batch's (B, K) table."""
        sums = table.sum(0)
        self._sums = sums if self._sums is None else self._sums + sums

    def tensor(self, device: torch.device) -> Tensor:
        """The sums of this process, (K,)."""
        if self._sums is not None:
            return self._sums
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(len(COLUMNS), dtype=dtype, device=device)

    def load(self, sums: Sequence[float], device: torch.device) -> None:
        """Continue from sums that a checkpoint kept."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.tensor(list(sums), dtype=dtype, device=device)

    def clear(self) -> None:
        self._sums = None
