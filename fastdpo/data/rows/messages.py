"""Chat messages and tools: checked, stored in Arrow columns, and opened again for the chat template."""

import json
from collections.abc import Mapping
from datetime import date
from typing import Any, TypeGuard

from fastdpo.data.errors import RowError
from fastdpo.wording import why_not_json

Message = dict[str, Any]

# In front of JSON text that stands for a value of a message which is no text. A column of Arrow structs would give
# every message every other message's keys at any depth, and one type to each key; texts have neither trouble.
MARK = "fastdpo-json:"
_PLAIN = ("role", "content")  # always text, stored as it is
# the arguments of `apply_chat_template` that tokenization passes itself
_OWN_OPTIONS = {"conversation", "tokenize", "return_dict", "add_generation_prompt"}


def check_text(value: Any, place: str, expected: str = "text") -> None:
    """Raise `RowError` unless the value is text that can be stored."""
    if value is None:
        raise RowError(f"`{place}` is null")
    if not isinstance(value, str):
        raise RowError(f"`{place}` is {type(value).__name__}; wanted {expected}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"`{place}` has half a surrogate pair at character {error.start}, which is no text") from None


def is_message(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def clean_messages(messages: list[Any], name: str) -> list[Message]:
    """Messages as the chat template gets them, whether they are new or stored; raises `RowError`.

    Every key is kept. A key of a message itself that is null counts as absent; nulls inside values stay. `content`
    is text (optional beside `tool_calls`); a list of text parts is joined. The arguments of tool calls are objects,
    also where they came as JSON text.
    """
    return [clean_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def clean_message(message: Any, place: str, content_name: str = "content") -> Message:
    """The same for one message. content_name: what the row calls its content."""
    if not is_message(message):
        raise RowError(f"`{place}` is not a message with `role` and `content`")
    cleaned = {name: value for name, value in message.items() if value is not None}
    if not _is_plain(cleaned):
        cleaned = _open_values(cleaned, place)
    content = cleaned.get("content", "" if cleaned.get("tool_calls") else None)
    if isinstance(content, list):
        content, more = _open_parts(content, f"{place}.{content_name}")
        twice = more.keys() & cleaned.keys()
        if twice:
            raise RowError(f"`{place}` has `{min(twice)}` twice, as a key and as a part of `{content_name}`")
        cleaned |= more
    check_text(content, f"{place}.{content_name}")
    cleaned["content"] = content
    return cleaned


def join_parts(parts: list[Any], place: str) -> str:
    """The text of content parts (`{"type": "text", "text": ...}`); raises `RowError` for parts of another type."""
    if not parts:
        raise RowError(f"`{place}` is an empty list; wanted text")
    return "".join(_part_text(part, f"{place}[{index}]") for index, part in enumerate(parts))


def _open_parts(parts: list[Any], place: str) -> tuple[str, Message]:
    """The text of content parts, and what is a key of its own: LLaMA-Factory's `reasoning` and `tool_call` parts."""
    kinds: dict[str, list[tuple[str, Any]]] = {"reasoning": [], "tool_call": [], "text": []}
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        kinds[kind if kind in ("reasoning", "tool_call") else "text"].append((f"{place}[{index}]", part))
    more: Message = {}
    if kinds["reasoning"]:
        more["reasoning_content"] = "".join(_part_text(part, at, "reasoning") for at, part in kinds["reasoning"])
    if kinds["tool_call"]:
        more["tool_calls"] = [call for at, part in kinds["tool_call"] for call in parse_calls(part.get("value"), at)]
    if not parts:
        raise RowError(f"`{place}` is an empty list; wanted text")
    return "".join(_part_text(part, at) for at, part in kinds["text"]), more


def _part_text(part: Any, place: str, wanted: str = "text") -> str:
    if not isinstance(part, Mapping):
        whole = place.rpartition("[")[0]
        raise RowError(f'`{whole}` is list; wanted text, or parts such as {{"type": "text", "text": "..."}}')
    kind = part.get("type", "text")
    if kind != wanted:
        raise RowError(
            f"`{place}` is a part of type {kind!r}, and only text is trained here (not models of "
            "AutoModelForImageTextToText); take such rows out"
        )
    text = part["text"] if part.get("text") is not None else part.get("value")
    check_text(text, f"{place}.text")
    return str(text)


def pack_messages(messages: list[Message], name: str) -> list[dict[str, str]]:
    """Messages for an Arrow column: each value is text, others as JSON text after `MARK`. `for_template` opens them.

    Raises `RowError` for a value that JSON does not have.
    """
    return [
        message
        if _is_plain(message)
        else {key: _pack(key, value, f"{name}[{index}]") for key, value in message.items()}
        for index, message in enumerate(messages)
    ]


def for_template(messages: list[Message]) -> list[Message]:
    """Stored messages as chat templates expect them: what was written, without the keys of other messages."""
    opened = []
    for message in messages:
        message = {name: value for name, value in message.items() if value is not None}
        opened.append(message if _is_plain(message) else _open_values(message, "messages"))
    return opened


def parse_tools(value: Any) -> list[Any] | None:
    """The tools that the template shows, from a list or its JSON text; raises `RowError`."""
    if not value:
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else value
        if isinstance(tools, list):
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, RecursionError) as error:
        raise RowError(f"`tools` holds {why_not_json(error)}") from None
    if tools is None:  # the JSON text of nothing
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("`tools` is not a list of function descriptions, nor its JSON text")
    return tools or None


def parse_template_options(value: Any) -> dict[str, Any] | None:
    """`chat_template_kwargs` from a mapping or its JSON text; raises `RowError`."""
    if value is None or value == "":
        return None
    try:
        options = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RowError(f"`chat_template_kwargs` holds {why_not_json(error)}") from None
    if not isinstance(options, Mapping):
        raise RowError(f"`chat_template_kwargs` is {type(options).__name__}; wanted an object (or its JSON text)")
    taken = sorted(_OWN_OPTIONS & options.keys())
    if taken:
        raise RowError(f"`chat_template_kwargs` has `{taken[0]}`, which is set here and cannot be changed")
    return dict(options)


def to_json(value: Any, place: str) -> str | None:
    """JSON text for a free-form object (None for None): an Arrow column would give each row every row's keys."""
    if value is None:
        return None
    try:
        text = json.dumps(value, ensure_ascii=False, default=_as_json)
    except (TypeError, ValueError) as error:
        raise RowError(f"`{place}` cannot be stored as JSON ({error})") from None
    check_text(text, place)
    return text


def from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def parse_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls from JSON text of one `{"name", "arguments"}` or a list of them; raises `RowError`."""
    try:
        calls = from_json(value)
        calls = calls if isinstance(calls, list) else [calls]
        return [
            {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls
        ]
    except (TypeError, KeyError, ValueError, RecursionError):
        raise RowError(f"`{place}` is not JSON text of a call with `name` and `arguments`") from None


def _is_plain(message: Message) -> bool:
    """Whether there is nothing beside role and content."""
    return len(message) == 2 and "content" in message


def _as_json(value: Any) -> Any:
    """What Arrow and numpy hold and JSON does not: dates and arrays."""
    if isinstance(value, date):  # datetime too
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds {type(value).__name__}")


def _pack(key: str, value: Any, place: str) -> str:
    if isinstance(value, str) and (key in _PLAIN or not value.startswith(MARK)):
        check_text(value, f"{place}.{key}")
        return value
    return f"{MARK}{to_json(value, f'{place}.{key}')}"


def _open_values(message: Message, place: str) -> Message:
    opened = {name: value if name in _PLAIN else _open(value) for name, value in message.items()}
    if opened.get("tool_calls"):
        opened["tool_calls"] = _open_calls(opened["tool_calls"], f"{place}.tool_calls")
    return opened


def _open(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(MARK):
        return value
    try:
        return json.loads(value[len(MARK) :])
    except ValueError:  # somebody's text that begins so; it is packed like a value that is no text
        return value


def _open_calls(calls: Any, place: str) -> list[Any]:
    try:
        calls = from_json(calls)
    except ValueError:
        calls = None
    if not isinstance(calls, list):
        raise RowError(f"`{place}` is not a list of calls with a `name`")
    return [_open_call(call, place) for call in calls]


def _open_call(call: Any, place: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise RowError(f"`{place}` is not a list of calls with a `name`")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise RowError(f"`{place}` has arguments that are not JSON: {arguments[:40]!r}") from None
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
