"""Chat messages and tools: checked, stored in Arrow columns, and opened again for the chat template."""

import json
from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.wording import why_not_json

Message = dict[str, Any]

# the arguments of `apply_chat_template` that tokenization passes itself
_OWN_OPTIONS = {"conversation", "tokenize", "return_dict", "add_generation_prompt"}
# In an Arrow column a free-form value would get every other row's keys, as nulls. So a message's value that is no text
# is stored as JSON text behind this mark, with which no text begins.
_MARK = "\x1fjson:"
# deeper than this is no tool call, and Python's own functions go not much deeper
_DEEPEST = 200
_MEDIA_PARTS = ("image", "image_url", "video", "audio", "input_audio", "document")


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
    """Check `role` and `content` (text, or parts that are text; optional beside `tool_calls`); raises `RowError`.

    A message keeps every key that it came with, and the nulls inside their values. A key whose value is null is as good
    as absent, and is left out.
    """
    cleaned = []
    for index, message in enumerate(messages):
        place = f"{name}[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(f"`{place}` is not a message with `role` and `content`")
        # opened: a row that was normalized before, and changed since
        message = {key: _opened(value) for key, value in message.items() if value is not None}
        calls = message.get("tool_calls") or []
        content = joined_parts(message.get("content", "" if calls else None), f"{place}.content")
        check_text(content, f"{place}.content")
        if not isinstance(calls, list):
            raise RowError(f"`{place}.tool_calls` is not a list of calls with a `name`")
        for call in calls:
            _check_call(call, f"{place}.tool_calls")
        cleaned.append({**message, "content": content})
    return cleaned


def joined_parts(content: Any, place: str) -> Any:
    """Content in parts that are all text (`{"type": "text", "text": ...}`) as one text; anything else as it is.

    Raises `RowError` for a part that is no text.
    """
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list):
        return content
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise RowError(f"`{place}` is {type(content).__name__}; wanted text, or parts that are text")
        # LLaMA-Factory's newer form has `value`
        kind, text = part.get("type", "text"), part.get("text", part.get("value"))
        if kind != "text" or not isinstance(text, str):
            what = f"a part of type {kind!r}" if kind != "text" else "a part without text"
            raise RowError(f"`{place}[{index}]` is {what}; {ONLY_TEXT if kind in _MEDIA_PARTS else 'wanted text'}")
        texts.append(text)
    return "".join(texts)


def with_system(prompt: list[Message], system: Any, column: str, notes: list[str]) -> list[Message]:
    """The prompt after a `system` column: text, content in parts, a system message or a list of one.

    Messages that begin with a system turn keep theirs; a column that says something else is named in `notes`. Raises
    `RowError`.
    """
    if not system:
        return prompt
    if isinstance(system, list) and len(system) == 1 and isinstance(system[0], Mapping) and "role" in system[0]:
        system = system[0]
    if isinstance(system, Mapping) and "role" in system:
        if system["role"] not in ("system", "developer"):
            raise RowError(f"`{column}` is a {system['role']} turn; wanted a system turn")
        (message,) = clean_messages([system], column)
    else:
        content = joined_parts(system, column)
        check_text(content, column)
        message = {"role": "system", "content": content}
    if not prompt or prompt[0].get("role") != "system":
        return [message, *prompt]
    if prompt[0].get("content") != message["content"]:
        notes.append(f"`{column}` is not used, since the messages begin with a system turn of their own")
    return prompt


ONLY_TEXT = "only text is trained here, and images, videos and sounds take a model of AutoModelForImageTextToText"


def parse_tools(value: Any, column: str = "tools") -> list[Any] | None:
    """The tools that the template shows, from a list or its JSON text; raises `RowError`."""
    if not value:
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else value
        if isinstance(tools, list):  # each may be JSON text of its own
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, RecursionError) as error:
        raise RowError(f"`{column}` holds {why_not_json(error)}") from None
    if tools is None:  # the JSON text of nothing
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"`{column}` is not a list of function descriptions, nor its JSON text")
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


def to_json(value: Any) -> str | None:
    """JSON text for a free-form object: in an Arrow column each row would get every row's keys."""
    return value if value is None or isinstance(value, str) else _json(value)


def from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def stored_messages(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as columns of texts; `for_template` opens them again. Raises `RowError` for what cannot be stored."""
    return [{key: _stored(value, key) for key, value in message.items()} for message in messages]


def for_template(messages: list[Message]) -> list[Message]:
    """Messages as chat templates expect them: no key with a null, the arguments of tool calls as objects."""
    opened = []
    for message in messages:
        message = {key: _opened(value) for key, value in message.items() if value is not None}
        if message.get("tool_calls"):
            message["tool_calls"] = [_opened_call(call) for call in message["tool_calls"]]
        opened.append(message)
    return opened


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _stored(value: Any, key: str) -> str:
    if isinstance(value, str) and not value.startswith(_MARK):
        text = value
    else:
        text = _MARK + _json(value)
        if _depth(value) > _DEEPEST:
            raise RowError("is nested too deeply")
    check_text(text, key)
    return text


def _depth(value: Any) -> int:
    """How many objects and lists are in each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, Mapping | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, Mapping) else item)]
    return depth


def _opened(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(_MARK):
        return value
    try:
        return json.loads(value.removeprefix(_MARK))
    except ValueError:  # not ours
        return value


def _check_call(call: Any, place: str) -> None:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise RowError(f"`{place}` is not a list of calls with a `name`")
    arguments = function.get("arguments")
    if arguments and isinstance(arguments, str):
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            raise RowError(f"`{place}` has arguments that are not JSON: {arguments[:40]!r}") from None


def _opened_call(call: Message) -> Message:
    function = call.get("function", call)
    function = {**function, "arguments": from_json(function.get("arguments") or {})}
    return {**call, "function": function} if "function" in call else function
