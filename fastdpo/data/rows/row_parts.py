"""What the forms of rows share: their types, and single turns made of a column's text."""

from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.data.rows.messages import Message, check_text
from fastdpo.data.rows.notes import Note

Row = Mapping[str, Any]
# a row under TRL's columns, and what was done
Taken = tuple[Row, Note | None]


def without(row: Row, *names: str) -> dict[str, Any]:
    """The row without some columns."""
    return {name: value for name, value in row.items() if name not in names}


def user(value: Any, place: str) -> Message:
    return _turn("user", value, place)


def answer(value: Any, place: str) -> Message:
    return _turn("assistant", value, place)


def _turn(role: str, value: Any, place: str) -> Message:
    check_text(value, place)
    if not value.strip():
        raise RowError(f"`{place}` is empty")
    return {"role": role, "content": value}


def earlier_turns(value: Any, place: str) -> list[Message]:
    """A `history` of pairs, the user's text and the assistant's, as messages."""
    messages: list[Message] = []
    for turn in value or []:
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError(f"`{place}` is not a list of [user text, assistant text]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages
