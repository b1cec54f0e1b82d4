"""Rows for the losses of single answers: pairs taken apart, and answers set beside other rows' prompts."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from fastdpo.data.formats import mark_normalized
from fastdpo.data.mixtures import joined
from fastdpo.data.rows.sides import LABEL, MISMATCHED, SIDES, UNPAIRED, sides_of
from fastdpo.wording import count

logger = logging.getLogger(__name__)

COMPLETION = UNPAIRED[0]
# so many pairs are taken apart at a time: their chosen answers come first, then their rejected ones, as in TRL 1.16
_BLOCK = 1000
_ENDINGS = ("", "_ids", "_mask")


def as_unpaired(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """Pairs, normalized or tokenized, as two unpaired rows each: `completion` and `label`; unpaired rows as they are.

    The order is that of TRL 1.16's `unpair_preference_dataset`: of each 1000 pairs the chosen answers, then the
    rejected.
    """
    columns = dataset.column_names or list(next(iter(dataset)))
    if sides_of(columns) == UNPAIRED:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(_take_apart, batched=True, batch_size=_BLOCK, remove_columns=columns)
    logger.info(f"{name}: {count(len(dataset), 'pair')} taken apart into {2 * len(dataset)} unpaired rows.")
    halves = [_half(dataset, columns, side) for side in SIDES]
    rows = np.arange(len(dataset))
    order = [
        part + side * len(dataset)
        for start in range(0, len(dataset), _BLOCK)
        for part in (rows[start : start + _BLOCK],)
        for side in (0, 1)
    ]
    whole = joined(halves)
    return mark_normalized(whole.select(np.concatenate(order)), whole)


def _half(dataset: Dataset, columns: Sequence[str], side: str) -> Dataset:
    other = next(name for name in SIDES if name != side)
    half = dataset.remove_columns([f"{other}{end}" for end in _ENDINGS if f"{other}{end}" in columns])
    names = {f"{side}{end}": f"{COMPLETION}{end}" for end in _ENDINGS if f"{side}{end}" in columns}
    half = half.rename_columns(names)
    if LABEL in half.column_names:  # a column of the pairs' own
        half = half.remove_columns(LABEL)
    return mark_normalized(half.add_column(LABEL, [side == SIDES[0]] * len(half)), dataset)


def _take_apart(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same for a stream's pairs."""
    pairs = len(next(iter(batch.values())))
    apart: dict[str, list[Any]] = {LABEL: [True] * pairs + [False] * pairs}
    for name, values in batch.items():
        end = next((end for end in reversed(_ENDINGS) if name in (f"{side}{end}" for side in SIDES)), None)
        if end is not None:
            apart[f"{COMPLETION}{end}"] = batch[f"{SIDES[0]}{end}"] + batch[f"{SIDES[1]}{end}"]
        elif name != LABEL:
            apart[name] = values + values
    return apart


def with_mismatched(dataset: Dataset | IterableDataset, block: int) -> Dataset | IterableDataset:
    """Tokenized unpaired rows with `KL_completion_ids` (and `KL_completion_mask`): another row's completion.

    Within each `block` of rows the completions move on by one row, the last to the first, as in TRL 1.16: a batch of
    such a block has the same completions twice, under their own and under other prompts. A last row that is alone in
    its block gets the completion of the row before it (TRL: its own, which is no mismatch). Columns that are there
    already stay.
    """
    columns = [f"{COMPLETION}{end}" for end in _ENDINGS[1:]]
    names = dataset.column_names or list(next(iter(dataset)))
    if MISMATCHED + columns[0] in names:
        return dataset
    columns = [column for column in columns if column in names]
    if isinstance(dataset, IterableDataset):
        return dataset.map(_moved_on, batched=True, batch_size=block, fn_kwargs={"columns": columns})
    rows = len(dataset)
    origin = np.arange(rows) - 1
    starts = np.arange(0, rows, block)
    origin[starts] = np.minimum(starts + block, rows) - 1
    if rows > 1 and starts[-1] == rows - 1:
        origin[-1] = rows - 2
    moved = dataset.select_columns(columns).select(origin)
    moved = moved.rename_columns({column: MISMATCHED + column for column in columns})
    return concatenate_datasets([dataset, moved], axis=1)


def _moved_on(batch: dict[str, list[Any]], columns: Sequence[str]) -> dict[str, list[Any]]:
    return {MISMATCHED + column: [batch[column][-1], *batch[column][:-1]] for column in columns}
