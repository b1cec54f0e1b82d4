"""Chat messages and tools: checked, stored in Arrow columns, and opened again for the chat template."""

import json
from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.wording import why_not_json

Message = dict[str, Any]

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


def clean_messages(messages: list[Any], name: str) -> list[Message]:
    """Check `role` and `content` (text; optional beside `tool_calls`); raises `RowError`.

    Nulls are left out (Arrow adds them where other rows have a key), and the arguments of tool calls become
    JSON text: each function has its own arguments, while a column has one type.
    """
    cleaned = []
    for index, message in enumerate(messages):
        place = f"{name}[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(f"`{place}` is not a message with `role` and `content`")
        message = without_nulls(message)
        calls = message.get("tool_calls") or []
        content = message.get("content", "" if calls else None)
        check_text(content, f"{place}.content")
        message = {**message, "content": content}
        if calls:
            message["tool_calls"] = [_stored_call(call, f"{place}.tool_calls") for call in calls]
        _refuse_huge_integers(message, place)
        cleaned.append(message)
    return cleaned


def parse_tools(value: Any) -> list[Any] | None:
    """The tools that the template shows, from a list or its JSON text; raises `RowError`."""
    if not value:
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else without_nulls(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"`tools` holds {why_not_json(error)}") from None
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
    return without_nulls(options)


def without_nulls(value: Any) -> Any:
    """The same value without the keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def to_json(value: Any) -> str | None:
    """JSON text for a free-form object: in an Arrow column each row would get every row's keys."""
    return value if value is None or isinstance(value, str) else json.dumps(without_nulls(value), ensure_ascii=False)


def from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def for_template(messages: list[Message]) -> list[Message]:
    """Messages as chat templates expect them: no nulls, the arguments of tool calls as objects."""
    opened = []
    for message in without_nulls(messages):
        if message.get("tool_calls"):
            message["tool_calls"] = [_opened_call(call) for call in message["tool_calls"]]
        opened.append(message)
    return opened


def _refuse_huge_integers(value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(item, str):
                _refuse_huge_integers(item, f"{place}.{name}")
    elif isinstance(value, list):
        for item in value:
            _refuse_huge_integers(item, place)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RowError(f"`{place}` is an integer of more than 64 bits, which cannot be stored; write it as text")


def _stored_call(call: Any, place: str) -> Message:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise RowError(f"`{place}` is not a list of calls with a `name`")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            raise RowError(f"`{place}` has arguments that are not JSON: {arguments[:40]!r}") from None
    function = {**function, "arguments": to_json(arguments)}
    return {**call, "function": function} if "function" in call else function


def _opened_call(call: Message) -> Message:
    function = call.get("function", call)
    function = {**function, "arguments": from_json(function.get("arguments"))}
    return {**call, "function": function} if "function" in call else function
