"""Preference pairs -> one padded batch, with the places where the loss reads log-probs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TRUNCATION_MODES = ("keep_start", "keep_end")
# the reference's sums over each completion, and their parts beyond the shorter completion's length
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_tail_logps", "ref_rejected_tail_logps")


def check_truncation(max_length: int | None, truncation_mode: str) -> None:
    """Raise `ValueError` unless both are values that the collator can truncate with."""
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode is {truncation_mode!r}; wanted one of {', '.join(TRUNCATION_MODES)}.")
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length is {max_length}; wanted at least 2 (a context token and a scored one), or None for no limit."
        )


@dataclass
class DataCollatorForPreference:
    """Pads the sequences of B pairs to one length T; chosen sequences are first, rejected ones second.

    A sequence is prompt + completion, cut to `max_length` tokens (`keep_start`: the first ones, `keep_end`:
    the last ones) and padded on the right. Examples have `prompt_ids`, `chosen_ids` and `rejected_ids`
    (ints). The batch holds CPU tensors:

    - `input_ids`, `attention_mask` (2B, T) int64. The mask comes from lengths: a pad token that is also the
      EOS token stays visible where it is part of a completion.
    - `targets` (M,) int64: the completion tokens that are scored, sequence after sequence.
    - `rows` (M,) int64: for each target the position that predicts it (the one before it), as an index into
      the flattened (2B * T) positions.
    - `offsets` (2B + 1,) int64: sequence s owns targets[offsets[s]:offsets[s + 1]].
    - those of `REFERENCE_COLUMNS` that the examples have, (B,) fp32.

    A completion token at position 0 (an empty prompt, or one that `keep_end` cut off) has no position before
    it and is not scored. A sequence without a scored token has an empty segment.

    Raises `ValueError` for an unknown `truncation_mode` or a `max_length` under 2.

    Example:
        >>> collator = DataCollatorForPreference(pad_token_id=0)
        >>> batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}])
        >>> batch["input_ids"].tolist()
        [[1, 2, 3, 4], [1, 2, 5, 0]]
        >>> batch["rows"].tolist(), batch["targets"].tolist(), batch["offsets"].tolist()
        ([1, 2, 5], [3, 4, 5], [0, 2, 3])
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_truncation(self.max_length, self.truncation_mode)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sequences: list[Tensor] = []
        first_scored: list[int] = []
        for side in ("chosen_ids", "rejected_ids"):
            for example in examples:
                prompt = torch.as_tensor(example["prompt_ids"], dtype=torch.long)
                completion = torch.as_tensor(example[side], dtype=torch.long)
                ids, cut = self._truncate(torch.cat([prompt, completion]))
                sequences.append(ids)
                first_scored.append(max(len(prompt) - cut, 1))

        longest = max(map(len, sequences))
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        input_ids = torch.full((len(sequences), longest), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        rows, targets, counts = [], [], [0]
        for index, (ids, start) in enumerate(zip(sequences, first_scored, strict=True)):
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            scored = ids[start:]
            targets.append(scored)
            rows.append(index * longest + start - 1 + torch.arange(len(scored)))
            counts.append(len(scored))

        stored = {
            name: torch.tensor([example[name] for example in examples], dtype=torch.float32)
            for name in REFERENCE_COLUMNS
            if all(example.get(name) is not None for example in examples)
        }
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "rows": torch.cat(rows),
            "targets": torch.cat(targets),
            "offsets": torch.tensor(counts).cumsum(0),
            **stored,
        }

    def _truncate(self, ids: Tensor) -> tuple[Tensor, int]:
        """The kept tokens and how many were cut off in front of them."""
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, 0
        if self.truncation_mode == "keep_start":
            return ids[: self.max_length], 0
        return ids[-self.max_length :], len(ids) - self.max_length
