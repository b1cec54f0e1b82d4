"""What was not measured, and why: reasons are compared and shown, so each is worded once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SAME_PATH = "same path as fastdpo; not timed twice"
NO_TIME = "no time left"
OUT_OF_MEMORY = "out of memory"
NO_ROOM = "no room beside the others"
WRONG = "failed the oracle"
# endings of reasons that are no failure
BENIGN = (SAME_PATH, NO_TIME, OUT_OF_MEMORY, NO_ROOM)


@dataclass(frozen=True)
class Missing:
    """An entry, or with entry "" a whole case, that was not measured, and why."""

    case: str
    entry: str
    reason: str

    def __str__(self) -> str:
        return f"{self.case}: {f'{self.entry}: ' if self.entry else ''}{self.reason}"


def reasons(record: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(case, entry) -> reason, of a record."""
    return {(m["case"], m["entry"]): m["reason"] for m in record.get("missing", ())}


def in_a_cell(reason: str | None) -> str:
    """A reason where a table has no number; wrong results are a long story."""
    return WRONG if reason and WRONG in reason else reason or "-"
