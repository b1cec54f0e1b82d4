"""Cells that hold messages as JSON text, as csv files must and others do: opened, or refused in words."""

import json
from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.wording import why_not_json

# (how a message says who speaks, what)
_KEYS = (("role", "content"), ("role", "tool_calls"), ("from", "value"))


def open_cells(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, with lists of messages (or one) in the place of their JSON text. Raises `RowError`.

    Text that is JSON for its own sake, such as an answer that is one, stays text.
    """
    opened = {}
    for name, cell in row.items():
        if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
            value = _open(name, cell)
            if value is not cell:
                opened[name] = value
    return {**row, **opened} if opened else row


def _open(name: str, cell: str) -> Any:
    if name == "history" or any(f'"{key}"' in cell for key in ("role", "from")):
        try:
            value = json.loads(cell)
        except RecursionError as error:
            raise RowError(f"`{name}` holds {why_not_json(error)}") from None
        except ValueError:
            value = None
        if _is_message(value) or (isinstance(value, list) and value and all(map(_is_message, value))):
            return value
        if name == "history" and isinstance(value, list):
            return value
    if cell.lstrip("[ \n").startswith("{'") and ("'role':" in cell or "'from':" in cell):
        raise RowError(f"`{name}` holds messages as Python text; wanted JSON text (or a jsonl file)")
    return cell


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(speaker in value and what in value for speaker, what in _KEYS)
