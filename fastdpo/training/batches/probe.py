"""A run's own longest rows, laid out both ways and compared."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.rows.sides import id_columns
from fastdpo.models.adapters import evaluating
from fastdpo.models.forward import LogprobForward, unwrap_peft
from fastdpo.ops.switches import widest_float

logger = logging.getLogger(__name__)


# what two kernels of a right layout may differ by, root mean square over tokens, in nats
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}


class LayoutProbe:
    """Log-probs (M,) of a collated batch under a model: no dropout, no gradient, no random number drawn.

    In float64 where the device has it.

    device: where the model is trained; left out, where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: LogprobForward,
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        autocast: Callable[[], AbstractContextManager[Any]],
        device: torch.device | None = None,
    ) -> None:
        self.model, self.forward, self.prepare, self.autocast = model, forward, prepare, autocast
        causal_lm = cast(PreTrainedModel, unwrap_peft(model))
        self.device = next(causal_lm.parameters()).device if device is None else device
        # what learned positions end at
        self.positions: int | None = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
        with autocast():
            mixed = torch.is_autocast_enabled(self.device.type)
            self.dtype = torch.get_autocast_dtype(self.device.type) if mixed else causal_lm.dtype

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            evaluating(self.model),
            self.autocast(),
            self.forward.installed(),
        ):
            return self.model(**self.prepare(batch))["logprob"].to(widest_float(self.device.type))


def difference(probe: LayoutProbe, collator: DataCollatorForPreference, rows: Sequence[dict[str, Any]]) -> str | None:
    """How a layout's log-probs of rows differ from those of padded rows, in words; None where they do not.

    They may by three times what padding alone changes, and by rounding: root mean square over tokens.
    """
    padded = replace(collator, layout="padded", pad_to_multiple_of=None)
    batch = padded(rows)
    width = batch["input_ids"].shape[1]
    wider = replace(padded, pad_to_multiple_of=max(width, min(width + 19, probe.positions or width + 19)))
    expected = probe(batch)
    noise, off = _distance(probe(wider(rows)), expected), _distance(probe(collator(rows)), expected)
    allowed = max(3 * noise, ROUNDING[probe.dtype])
    logger.debug(f"{collator.layout}: {off:.3g} nats from padded, padding alone {noise:.3g}, allowed {allowed:.3g}.")
    if off <= allowed:
        return None
    return f"log-probs of {collator.layout} rows are off by {off:.3g} nats a token, where rounding is {allowed:.3g}"


def _distance(one: Tensor, other: Tensor) -> float:
    """Root mean square; infinite where a value is NaN."""
    return float((one - other).square().mean().sqrt().nan_to_num(nan=math.inf))


class ProbeRows(NamedTuple):
    """What a layout is judged on: `rows` to compare on, the longest sequence of the run (None where unknown), and
    whether rows have one answer each."""

    rows: list[dict[str, Any]]
    longest: int | None
    unpaired: bool = False

    @classmethod
    def of(cls, datasets: Sequence[Any], max_length: int | None) -> "ProbeRows":
        """See `_telling_rows`, of the first dataset; streams show no rows."""
        known = [dataset for dataset in datasets if isinstance(dataset, Dataset) and len(dataset)]
        if len(known) < len(datasets) or not known:
            return cls([], max_length)
        return cls(_telling_rows(known[0], max_length), max(longest_sequence(one, max_length) for one in known))


def longest_sequence(dataset: Dataset, max_length: int | None) -> int:
    """Tokens of the longest sequence after the cut."""
    longest = max(prompt + max(completions) for prompt, *completions in zip(*_lengths(dataset), strict=True))
    return longest if max_length is None else min(longest, max_length)


def _telling_rows(dataset: Dataset, max_length: int | None) -> list[dict[str, Any]]:
    """The rows with the longest prompt, the longest sequence, and most tokens of prompt and all answers."""
    limit = max_length or math.inf
    lengths = [
        [min(prompt, limit), *(min(prompt + completion, limit) for completion in completions)]
        for prompt, *completions in zip(*_lengths(dataset), strict=True)
    ]
    together = [sum(sequences) - prompt for prompt, *sequences in lengths]
    keys = (lambda row: lengths[row][0], lambda row: max(lengths[row][1:]), lambda row: together[row])
    # among equals, as many are where rows are cut, the one with most answer tokens to compare
    numbers = {max(range(len(lengths)), key=lambda row: (key(row), together[row] - lengths[row][0])) for key in keys}
    return [cast("dict[str, Any]", dataset[row]) for row in sorted(numbers)]


def _lengths(dataset: Dataset) -> list[list[int]]:
    table = dataset.with_format("arrow")
    return [
        pc.call_function("list_value_length", [table[name][:]]).to_pylist() for name in id_columns(table.column_names)
    ]
