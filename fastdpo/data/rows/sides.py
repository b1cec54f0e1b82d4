"""The answers of a row: chosen and rejected of a pair, or the one completion of an unpaired row; and their columns."""

from collections.abc import Collection

SIDES = ("chosen", "rejected")
UNPAIRED = ("completion",)
# whether the completion of an unpaired row is desirable
LABEL = "label"
# in front of the completion's columns: the completion of another row, which KTO estimates its KL with
MISMATCHED = "KL_"


def sides_of(columns: Collection[str]) -> tuple[str, ...]:
    """The answers that normalized or tokenized rows with these columns have."""
    return UNPAIRED if "completion" in columns or "completion_ids" in columns else SIDES


def id_columns(columns: Collection[str]) -> list[str]:
    """Of tokenized rows: the columns of token ids."""
    return [f"{part}_ids" for part in ("prompt", *sides_of(columns))]


def mask_columns(columns: Collection[str]) -> list[str]:
    """1 for a scored token, 0 for context; absent: 0 in the prompt, 1 in the completions."""
    return [f"{part}_mask" for part in ("prompt", *sides_of(columns))]


def token_columns(columns: Collection[str]) -> list[str]:
    """Of these columns the ones that make a tokenized row: ids, masks where all of them are there, and the label."""
    masks = mask_columns(columns)
    label = [LABEL] if sides_of(columns) == UNPAIRED else []
    return [*id_columns(columns), *(masks if set(masks) <= set(columns) else ()), *label]


def is_tokenized(columns: Collection[str]) -> bool:
    """Whether rows with these columns are token ids already."""
    return set(id_columns(columns)) <= set(columns)
