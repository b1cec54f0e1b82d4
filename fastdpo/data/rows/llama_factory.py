"""LLaMA-Factory's ranking rows (alpaca, sharegpt, openai) and the dataset_info.json that describes them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.data.errors import DataError, RowError
from fastdpo.data.rows.columns import with_system
from fastdpo.data.rows.messages import Message, check_text, clean_message, parse_calls, parse_tools
from fastdpo.data.rows.row_parts import earlier_turns
from fastdpo.wording import why_not_json

_SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_DEFAULT_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
}
# an entry that names columns leaves the others unused, as in LLaMA-Factory; these always have a name
_REQUIRED_COLUMNS = {
    "prompt": "instruction",
    "response": "output",
    "messages": "conversations",
    "chosen": "chosen",
    "rejected": "rejected",
}
_MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class Columns:
    """Where a LLaMA-Factory row keeps its parts: `columns` (here `names`) and `tags` of a dataset_info.json entry.

    `formatting` is alpaca, sharegpt or openai. Tags that an entry leaves out keep the formatting's defaults.
    """

    formatting: str = "alpaca"
    names: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def unpaired(self) -> bool:
        """Whether rows have one answer and a label."""
        return "kto_tag" in self.names

    def column(self, part: str) -> str | None:
        return {**_REQUIRED_COLUMNS, **(self.names or _DEFAULT_COLUMNS)}.get(part)

    @property
    def read(self) -> set[str]:
        """The columns that this layout reads beside the pair."""
        parts = ("prompt", "query", "history") if self.formatting == "alpaca" else ("messages",)
        return {str(self.column(part)) for part in (*parts, "system", "tools")}

    def get(self, row: Mapping[str, Any], part: str) -> Any:
        column = self.column(part)
        return row.get(column) if column else None

    def require(self, row: Mapping[str, Any], part: str) -> Any:
        column = str(self.column(part))
        if column not in row:
            raise RowError(f"missing column `{column}`; found {', '.join(f'`{name}`' for name in row)}")
        if row[column] is None:
            raise RowError(f"`{column}` is null")
        return row[column]

    def tag(self, name: str) -> str:
        defaults = _OPENAI_TAGS if self.formatting == "openai" else _SHAREGPT_TAGS
        return self.tags.get(name) or defaults[name]


_SHAREGPT = Columns("sharegpt")


def detect_columns(row: Mapping[str, Any]) -> Columns | None:
    """Where a row keeps its parts that is LLaMA-Factory's without saying so; None for TRL's formats."""
    if row.get("prompt") is not None:
        return None
    column = "conversations" if "conversations" in row else "messages"
    turns = row.get(column)
    if turns is not None and (column == "conversations" or _is_answered(turns, row.get("chosen"))):
        first = turns[0] if isinstance(turns, list) and turns else None
        openai = isinstance(first, Mapping) and "role" in first
        return Columns("openai" if openai else "sharegpt", {**_DEFAULT_COLUMNS, "messages": column})
    if "instruction" in row and not isinstance(row.get("chosen"), list):
        return Columns("alpaca")
    return None


def _is_answered(turns: Any, chosen: Any) -> bool:
    """Whether `chosen` answers `messages`. TRL's rows of whole dialogues may have the column as metadata."""
    if isinstance(chosen, list) and chosen:
        chosen = chosen[0]
        return isinstance(chosen, Mapping) and chosen.get("role", chosen.get("from")) in ("assistant", "gpt")
    last = turns[-1] if isinstance(turns, list) and turns else None
    asked = isinstance(last, Mapping) and last.get("role", last.get("from")) in ("user", "human", "tool", "observation")
    return isinstance(chosen, Mapping) or (asked and isinstance(chosen, str))


def is_turn(value: Any) -> bool:
    """Whether this is a sharegpt turn."""
    return isinstance(value, Mapping) and "from" in value and "value" in value and "role" not in value


def message_of_turn(turn: Any, place: str) -> Message:
    """A sharegpt turn as a message; raises `RowError`."""
    return _message(turn, place, _SHAREGPT)


def messages_from_row(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """One ranking row -> `prompt`, `chosen`, `rejected` as lists of messages, `tools` and `notes`.

    alpaca: the prompt is instruction + newline + input (if any) as a user message, after `history` (pairs of
    user and assistant texts) and `system`; chosen and rejected are texts and become assistant messages, since
    LLaMA-Factory puts them through a chat template. sharegpt and openai: an odd number of turns after an
    optional system turn, the last one by the user (or a tool), and an answer each in chosen and rejected: a text, a
    turn, or a list of turns. A turn keeps its other keys.

    Raises `RowError` with the reason.
    """
    if columns.formatting == "alpaca":
        prompt = alpaca_prompt(row, columns)
        answers = [[alpaca_answer(columns.require(row, side), columns.column(side))] for side in ("chosen", "rejected")]
    else:
        prompt = conversation(row, columns)
        answers = [turn_answers(columns.require(row, side), side, columns) for side in ("chosen", "rejected")]
    prompt, notes = with_system(prompt, columns.get(row, "system"), str(columns.column("system")))
    return {
        "prompt": prompt,
        "chosen": answers[0],
        "rejected": answers[1],
        "tools": wrap_tools(columns.get(row, "tools")),
        "notes": notes,
    }


def alpaca_prompt(row: Mapping[str, Any], columns: Columns) -> list[Message]:
    messages = earlier_turns(columns.get(row, "history"), str(columns.column("history")))
    parts = [columns.require(row, "prompt"), columns.get(row, "query")]
    for part, text in zip(("prompt", "query"), parts, strict=True):
        if text is not None:
            check_text(text, str(columns.column(part)))
    query = "\n".join(text for text in parts if text)
    if not query:
        raise RowError(f"`{columns.column('prompt')}` is empty")
    return [*messages, {"role": "user", "content": query}]


def alpaca_answer(value: Any, column: str | None) -> Message:
    if not isinstance(value, str):
        raise RowError(f"`{column}` is {type(value).__name__}; wanted text beside an instruction")
    return _text_answer(value, str(column))


def _text_answer(value: str, column: str) -> Message:
    if not value.strip():
        raise RowError(f"`{column}` is empty")
    return {"role": "assistant", "content": value}


def conversation(row: Mapping[str, Any], columns: Columns) -> list[Message]:
    column = columns.column("messages")
    turns = columns.require(row, "messages")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"`{column}` is {'empty' if turns == [] else type(turns).__name__}; wanted a list of turns")
    messages = [_message(turn, f"{column}[{index}]", columns) for index, turn in enumerate(turns)]
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    if columns.formatting == "sharegpt":
        for index, message in enumerate(spoken):
            if (message["role"] == "assistant") != (index % 2 == 1) or message["role"] == "system":
                place = len(messages) - len(spoken) + index
                raise RowError(f"`{column}[{place}]` is out of turn; wanted user and assistant turns in alternation")
    if not spoken or spoken[-1]["role"] not in ("user", "tool"):
        raise RowError(f"`{column}` does not end with a user turn, so chosen and rejected answer nothing")
    return messages


def turn_answers(value: Any, side: str, columns: Columns) -> list[Message]:
    column = str(columns.column(side))
    if isinstance(value, str):
        return [_text_answer(value, column)]
    if isinstance(value, list) and value:
        return [_message(turn, f"{column}[{index}]", columns) for index, turn in enumerate(value)]
    message = _message(value, column, columns)
    if message["role"] != "assistant":
        raise RowError(f"`{column}` is a {message['role']} turn; wanted an assistant turn")
    if not message["content"].strip() and not message.get("tool_calls"):
        raise RowError(f"`{column}.{columns.tag('content_tag')}` is empty")
    return [message]


def _message(turn: Any, place: str, columns: Columns) -> Message:
    role_tag, content_tag = columns.tag("role_tag"), columns.tag("content_tag")
    if not isinstance(turn, Mapping) or role_tag not in turn:
        raise RowError(f"`{place}` is not a turn with `{role_tag}` and `{content_tag}`")
    role, content = turn[role_tag], turn.get(content_tag)
    roles = {
        columns.tag("user_tag"): "user",
        columns.tag("assistant_tag"): "assistant",
        columns.tag("observation_tag"): "tool",
        columns.tag("function_tag"): "assistant",
        columns.tag("system_tag"): "system",
    }
    if role not in roles:
        raise RowError(f"`{place}.{role_tag}` is {role!r}; wanted one of {', '.join(roles)}")
    rest = {name: item for name, item in turn.items() if name not in (role_tag, content_tag, "role", "content")}
    if role == columns.tag("function_tag"):
        calls = parse_calls(content, f"{place}.{content_tag}")
        return {"role": "assistant", "content": "", **rest, "tool_calls": calls}
    return clean_message({"role": roles[role], "content": content, **rest}, place, content_tag)


def wrap_tools(value: Any) -> list[Any] | None:
    """LLaMA-Factory also takes bare functions; templates expect each inside {"type": "function"}."""
    tools = parse_tools(value) or []
    return [
        tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in tools
    ] or None


@dataclass(frozen=True)
class DatasetEntry:
    """One usable entry of a dataset_info.json: a local file or folder, or a hub name, and how many rows are meant."""

    name: str
    columns: Columns
    file: Path | None
    hub_name: str | None
    subset: str | None
    split: str | None
    num_samples: int | None = None


def read_entries(folder: Path) -> dict[str, Any]:
    """The entries of `folder`/dataset_info.json, unchecked; `DataError` when it is absent or no such file."""
    path = folder / "dataset_info.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; dataset_dir is the folder that holds dataset_info.json.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{line}: {why_not_json(error)}.") from None
    if not isinstance(entries, dict):
        raise DataError(f"{path} holds {type(entries).__name__}; wanted one object that maps names to entries.")
    return entries


def is_preference(entry: Any) -> bool:
    """Whether an entry says that its rows are pairs, or answers with a label."""
    if not isinstance(entry, Mapping):
        return False
    columns = entry.get("columns")
    return bool(entry.get("ranking") or (isinstance(columns, Mapping) and columns.get("kto_tag")))


def parse_entry(name: str, entry: Any, folder: Path) -> DatasetEntry:
    """Check one entry and resolve its file; `DataError` says what cannot be used."""
    place = f"{folder / 'dataset_info.json'}: entry `{name}`"
    if not isinstance(entry, Mapping):
        raise DataError(f"{place} is {type(entry).__name__}; wanted an object.")
    if not is_preference(entry):
        raise DataError(
            f'{place} is not a preference dataset: it has no "ranking": true, and no kto_tag in its columns.'
        )
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{place}: formatting is {formatting!r}; wanted alpaca, sharegpt or openai.")
    for key in ("file_name", "hf_hub_url", "subset", "split"):
        if not isinstance(entry.get(key) or "", str):
            raise DataError(f"{place}: {key} is {type(entry[key]).__name__}; wanted text.")
    names, tags = _names(entry, "columns", place), _names(entry, "tags", place)
    media = [part for part in _MEDIA if names.get(part)]
    if media:
        raise DataError(f"{place} has {', '.join(media)}; only text is supported.")
    if not entry.get("file_name") and not entry.get("hf_hub_url"):
        raise DataError(f"{place} has neither file_name nor hf_hub_url, the two sources that can be read.")
    samples = entry.get("num_samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise DataError(f"{place}: num_samples is {samples!r}; wanted a whole number of at least 1.")
    file = folder / entry["file_name"] if entry.get("file_name") else None
    columns = Columns(formatting, names, tags)
    return DatasetEntry(name, columns, file, entry.get("hf_hub_url"), entry.get("subset"), entry.get("split"), samples)


def _names(entry: Mapping[str, Any], key: str, place: str) -> dict[str, str]:
    names = entry.get(key) or {}
    if not isinstance(names, Mapping) or not all(isinstance(name, str | None) for name in names.values()):
        raise DataError(f"{place}: {key} is not an object that maps names to names.")
    return {part: name for part, name in names.items() if name is not None}
