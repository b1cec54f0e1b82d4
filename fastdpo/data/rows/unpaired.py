"""Unpaired rows: one answer and whether it is a good one."""

from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.data.rows.llama_factory import (
    Columns,
    alpaca_answer,
    alpaca_prompt,
    conversation,
    is_turn,
    message_of_turn,
    turn_answers,
    wrap_tools,
)
from fastdpo.data.rows.row_parts import Row, answer, earlier_turns, user, without
from fastdpo.data.rows.sides import LABEL

# LLaMA-Factory's name of the label
_TAG = "kto_tag"
# columns of whole dialogues, whose last turn is the answer
_DIALOGUES = ("messages", "conversations", "conversation")
# the answer under the names of other tools
_ANSWERS = ("response", "output", "answer")
_QUESTIONS = ("instruction", "query", "question", "prompt")
_WORDS = {"true": True, "false": False, "desirable": True, "undesirable": False, "1": True, "0": False}


def is_unpaired(row: Mapping[str, Any]) -> bool:
    """Whether a row has one answer with a label: `prompt`, `completion`, `label`; `kto_tag`; `messages` and `label`."""
    if any(row.get(side) is not None for side in ("chosen", "rejected", "rejected_response", "rejected_messages")):
        return False
    if row.get(_TAG) is not None:
        return True
    answered = row.get("completion") is not None or any(row.get(name) is not None for name in _DIALOGUES)
    asked = any(row.get(name) is not None for name in _QUESTIONS)
    answered = answered or (asked and any(row.get(name) is not None for name in _ANSWERS))
    return LABEL in row and answered


def unpaired_columns(row: Row) -> dict[str, Any]:
    """The row under TRL's columns: `prompt`, `completion` and `label`, beside what it has else; raises `RowError`.

    A dialogue (`messages`, `conversations`) ends with the answer. An answer to an `instruction`, a `query` or a
    `question` is one of a chat, as the tools that have these columns put it through a template.
    """
    name = _TAG if row.get(_TAG) is not None else LABEL
    row = {**without(row, _TAG), LABEL: read_label(row[name], name)}
    if row.get("completion") is not None:
        return row
    dialogue = next((name for name in _DIALOGUES if row.get(name) is not None), None)
    if dialogue is not None:
        turns = _dialogue(row[dialogue], dialogue)
        if turns[-1].get("role") != "assistant":
            raise RowError(f"`{dialogue}` does not end with an assistant turn, which `{name}` is about")
        return {**without(row, dialogue), "prompt": turns[:-1], "completion": turns[-1:]}
    said = next((name for name in _ANSWERS if row.get(name) is not None), None)
    if said is None:
        raise RowError(f"has `{name}`, but no `completion` (nor {', '.join(f'`{other}`' for other in _ANSWERS)})")
    asked = next((name for name in _QUESTIONS if row.get(name) is not None), None)
    if asked is None:
        raise RowError(f"has `{name}` and `{said}`, but no `prompt`")
    if asked == "prompt":
        return {**without(row, said), "completion": row[said]}
    if asked == "instruction":
        prompt = alpaca_prompt(row, Columns("alpaca"))
        return {
            **without(row, said, asked, "input", "history"),
            "prompt": prompt,
            "completion": [answer(row[said], said)],
        }
    prompt = [*earlier_turns(row.get("history"), "history"), user(row[asked], asked)]
    return {**without(row, said, asked, "history"), "prompt": prompt, "completion": [answer(row[said], said)]}


def _dialogue(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"`{column}` is not a list of two messages or more")
    return [message_of_turn(turn, f"{column}[{index}]") if is_turn(turn) else turn for index, turn in enumerate(value)]


def described_columns(row: Row, columns: Columns) -> dict[str, Any]:
    """The same for a row that a dataset_info.json entry with a column `kto_tag` describes; raises `RowError`."""
    label = read_label(columns.require(row, "kto_tag"), str(columns.column("kto_tag")))
    if columns.formatting == "alpaca":
        prompt = alpaca_prompt(row, columns)
        completion = [alpaca_answer(columns.require(row, "response"), columns.column("response"))]
    else:
        column = str(columns.column("messages"))
        turns = columns.require(row, "messages")
        if not isinstance(turns, list) or len(turns) < 2:
            raise RowError(f"`{column}` is not a list of two turns or more")
        prompt = conversation({**row, column: turns[:-1]}, columns)
        completion = turn_answers(turns[-1], "messages", columns)
    taken = {"prompt": prompt, "completion": completion, LABEL: label}
    options = {"system": columns.get(row, "system"), "tools": wrap_tools(columns.get(row, "tools"))}
    return {**taken, **options, "chat_template_kwargs": row.get("chat_template_kwargs")}


def read_label(value: Any, column: str) -> bool:
    """True for a desirable answer; raises `RowError` for what is neither."""
    known = isinstance(value, bool | int | float) and value in (0, 1)
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    if not known:
        raise RowError(f"`{column}` is {value!r}; wanted true (a desirable answer) or false")
    return bool(value)
