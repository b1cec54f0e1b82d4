"""Unpaired rows: one answer and whether it is a good one."""

from collections.abc import Mapping
from typing import Any


def is_unpaired(row: Mapping[str, Any]) -> bool:
    """Whether a row has one answer with a label: `prompt`, `completion`, `label`; `kto_tag`; `messages` and `label`."""
    if any(row.get(side) is not None for side in ("chosen", "rejected", "rejected_response", "rejected_messages")):
        return False
    answered = row.get("completion") is not None or row.get("messages") is not None
    return row.get("kto_tag") is not None or (row.get("label") is not None and answered)
