"""Rows of one answer and a verdict on it: `prompt`, `completion`, `label`, or LLaMA-Factory's `kto_tag`."""

from collections.abc import Mapping
from typing import Any

# what says whether an answer is good
VERDICTS = ("label", "kto_tag")


def is_unpaired(row: Mapping[str, Any]) -> bool:
    """Whether a row has one answer with a verdict, and no pair."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return False
    answered = any(row.get(name) is not None for name in ("completion", "output", "messages", "conversations"))
    verdict = next((row[name] for name in VERDICTS if row.get(name) is not None), None)
    return answered and (isinstance(verdict, bool) or verdict in (0, 1, "true", "false", "True", "False"))
