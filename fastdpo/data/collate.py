"""Preference rows -> one batch, with the places where the loss reads log-probs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.data.layouts import BATCH_LAYOUTS, place
from fastdpo.data.rows.sides import LABEL, MISMATCHED, SIDES, UNPAIRED, sides_of

TRUNCATION_MODES = ("keep_start", "keep_end")
# the reference's sums over each completion, and their parts beyond the shorter completion's length
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_tail_logps", "ref_rejected_tail_logps")
# the same of unpaired rows: over the completion, and over the other row's under the same prompt
UNPAIRED_REFERENCE_COLUMNS = ("ref_logps", "ref_KL_logps")
# where a batch has the sequences of prompts with other rows' completions
KL_BATCH = "kl"


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
    """Cuts the sequences of B pairs, or of B unpaired rows, to `max_length` and lays them out in one batch.

    A sequence is prompt + completion, cut to `max_length` tokens (`keep_start`: the first ones, `keep_end`: the last
    ones). Examples have `prompt_ids`, `chosen_ids` and `rejected_ids` (ints). Layouts, of `BATCH_LAYOUTS`:

    - `padded`: a row for each sequence, chosen ones first, padded on the right.
    - `packed`: several sequences to a row, one behind the other.
    - `shared`: as packed, but the tokens that the two sequences of a pair begin with stand there once.

    The batch holds CPU tensors (but for `spans`), of R rows of T slots:

    - `input_ids` (R, T) int64, and for the padded layout, where R = 2B, `attention_mask` (R, T) int64, which comes from
      lengths: a pad token that is also the EOS token stays visible where it is part of a completion.
    - for the other layouts `position_ids` (R, T) int64, which begin at 0 with each sequence, `documents` (R, T) int32,
      the number of what may attend to each other (-1: padding), and `branches` (R, T) int32: 0 what a pair shares, 1
      and 2 what follows in the chosen and in the rejected sequence. See `attention.allowed`.
      `spans` says the same as a list: for each document where it begins, its shared part ends, its chosen part ends and
      it ends, in flattened slots.
    - `targets` (M,) int64: the tokens that are scored, sequence after sequence, chosen ones first.
    - `rows` (M,) int64: for each target the slot that predicts it (of the token before it), as an index into the
      flattened (R * T) slots. With `shared` two targets may have one slot.
    - `offsets` (2B + 1,) int64: sequence s owns targets[offsets[s]:offsets[s + 1]].
    - `lengths` (2B,) int64: the tokens of each sequence after the cut.
    - those of `REFERENCE_COLUMNS` that the examples have, (B,) fp32.

    Unpaired examples have `completion_ids` and `label` in the place of `chosen_ids` and `rejected_ids`. Their batch has
    B sequences, one a row where it is padded, `label` (B,) bool, and where they have `KL_completion_ids` (another row's
    completion, see `mismatched.with_mismatched`) under `kl` a batch of its own of prompts with these.

    Completion tokens are scored and prompt tokens are not, unless an example has `prompt_mask`, `chosen_mask` or
    `rejected_mask`: 0 or 1 for each token of that part. A token at position 0 (an empty prompt, or one that `keep_end`
    cut off) has no position before it and is not scored. A sequence without a scored token has an empty segment.

    max_row_tokens: rows of `packed` and `shared` are filled up to so many tokens; left out, to the longest document.

    Raises `ValueError` for an unknown `truncation_mode` or `layout`, or a `max_length` under 2.

    Example:
        >>> collator = DataCollatorForPreference(pad_token_id=0)
        >>> batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}])
        >>> batch["input_ids"].tolist()
        [[1, 2, 3, 4], [1, 2, 5, 0]]
        >>> batch["rows"].tolist(), batch["targets"].tolist(), batch["offsets"].tolist()
        ([1, 2, 5], [3, 4, 5], [0, 2, 3])
        >>> collator.layout = "shared"
        >>> batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}])
        >>> batch["input_ids"].tolist(), batch["position_ids"].tolist(), batch["branches"].tolist()
        ([[1, 2, 3, 4, 5]], [[0, 1, 2, 3, 2]], [[0, 0, 1, 1, 2]])
        >>> batch["rows"].tolist()
        [1, 2, 1]
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    layout: str = "padded"
    max_row_tokens: int | None = None

    def __post_init__(self) -> None:
        check_truncation(self.max_length, self.truncation_mode)
        if self.layout not in BATCH_LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; wanted one of {', '.join(BATCH_LAYOUTS)}.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if sides_of(examples[0]) == SIDES:
            return {**self._batch(examples, SIDES), **_stored(examples, REFERENCE_COLUMNS)}
        if self.layout == "shared":
            raise ValueError("layout 'shared' is for pairs, and these rows have one completion each; use 'packed'.")
        labels = torch.tensor([bool(example[LABEL]) for example in examples])
        batch = {**self._batch(examples, UNPAIRED), LABEL: labels}
        other = MISMATCHED + UNPAIRED[0]
        if f"{other}_ids" in examples[0]:
            batch[KL_BATCH] = self._batch(examples, (other,))
        return {**batch, **_stored(examples, UNPAIRED_REFERENCE_COLUMNS)}

    def _batch(self, examples: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
        cut = [self._sequence(example, side) for side in sides for example in examples]
        placed = place(
            self.layout, [ids for ids, _ in cut], self.pad_token_id, self.pad_to_multiple_of, self.max_row_tokens
        )
        rows, targets, counts = [], [], [0]
        for (ids, scored), where in zip(cut, placed.places, strict=True):
            targets.append(ids[scored])
            rows.append(where[scored.nonzero()[:, 0] - 1])
            counts.append(len(targets[-1]))
        return {
            **placed.inputs,
            "rows": torch.cat(rows),
            "targets": torch.cat(targets),
            "offsets": torch.tensor(counts).cumsum(0),
            "lengths": torch.tensor([len(ids) for ids, _ in cut]),
        }

    def _sequence(self, example: Mapping[str, Any], side: str) -> tuple[Tensor, Tensor]:
        """What is left of a sequence, and which of its tokens are scored (bool)."""
        parts = [torch.as_tensor(example[f"{part}_ids"], dtype=torch.long) for part in ("prompt", side)]
        masks = [
            torch.full((len(ids),), usual)
            if example.get(f"{part}_mask") is None
            else torch.as_tensor(example[f"{part}_mask"], dtype=torch.bool)
            for part, ids, usual in zip(("prompt", side), parts, (False, True), strict=True)
        ]
        ids, scored = torch.cat(parts), torch.cat(masks)
        if self.max_length is not None and len(ids) > self.max_length:
            kept = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
            ids, scored = ids[kept], scored[kept].clone()
        scored[:1] = False
        return ids, scored


def _stored(examples: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Tensor]:
    """Those of these columns that every example has, (B,) fp32."""
    return {
        name: torch.tensor([example[name] for example in examples], dtype=torch.float32)
        for name in columns
        if all(example.get(name) is not None for example in examples)
    }
