"""Columns beside the pair: the system prompt, and those that mean something but are not read."""

from collections.abc import Collection, Mapping
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.data.rows.messages import Message, check_text, clean_message, is_message, join_parts
from fastdpo.data.rows.notes import Note

# column -> what it has to be called to be read
_OTHER_NAMES = {
    **dict.fromkeys(
        (
            "system_prompt",
            "system_message",
            "system_messages",
            "system_instruction",
            "sys_prompt",
            "instruction_prompt",
        ),
        "system",
    ),
    **dict.fromkeys(
        (
            "functions",
            "function_list",
            "function_schemas",
            "available_functions",
            "available_tools",
            "tool_list",
            "tool_schemas",
            "tool_definitions",
            "tools_schema",
        ),
        "tools",
    ),
    **dict.fromkeys(("chat_template_args", "template_kwargs", "template_args"), "chat_template_kwargs"),
}
# columns that hold what was asked, which a row with a `prompt` has beside it
_CONTEXT = ("history", "context", "documents", "input", "instruction", "question", "query")
_REASONING = {
    f"{side}{name}" for side in ("", "chosen_", "rejected_") for name in ("reasoning", "reasoning_content", "thinking")
}
# columns whose name says that the model should see them -> what to do with them
_ADVICE = {
    **{name: f"rename it to `{known}`" for name, known in _OTHER_NAMES.items()},
    **dict.fromkeys(_CONTEXT, "put it into `prompt` if the model should see it"),
    **dict.fromkeys(_REASONING, "put it into the answer's message, as `reasoning_content`"),
    "rejected_tools": "both answers are shown `tools`",
}
_MEDIA = {
    f"{side}{kind}{plural}"
    for side in ("", "rejected_")
    for kind in ("image", "video", "audio")
    for plural in ("", "s")
}


def system_messages(value: Any, column: str) -> list[Message]:
    """The system message of a column: text, a message, a list with one, or text parts; [] for none."""
    if value is None or value in ("", [], {}):
        return []
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) and "type" not in value[0]:
        value = value[0]
    if isinstance(value, Mapping) and "from" in value and "role" not in value:
        value = {"role": value["from"], "content": value.get("value")}
    if is_message(value):
        if value["role"] not in ("system", "developer"):
            raise RowError(f"`{column}` is a message of the role {value['role']!r}; wanted system")
        return [clean_message(value, column)]
    if isinstance(value, list) and all(isinstance(part, Mapping) and "type" in part for part in value):
        value = join_parts(value, column)
    check_text(value, column, "text, or a list with one system message")
    return [{"role": "system", "content": value}]


def with_system(prompt: list[Message], value: Any, column: str) -> tuple[list[Message], tuple[Note, ...]]:
    """The prompt after the column's system message; one that it begins with itself goes first."""
    system = system_messages(value, column)
    if not system or prompt[0]["role"] != "system":
        return [*system, *prompt], ()
    if system[0]["content"] == prompt[0]["content"]:
        return prompt, ()
    return prompt, (Note(f"`{column}` is not used where the messages begin with another system turn", lost=True),)


def refuse_media(row: Mapping[str, Any]) -> None:
    """Raise `RowError` for pictures, videos and sound beside the text."""
    if _MEDIA.isdisjoint(row):
        return
    for name in _MEDIA & row.keys():
        if _holds_something(row[name]):
            raise RowError(
                f"`{name}` holds {name.removeprefix('rejected_').rstrip('s')} data, and only text is trained here (not "
                "models of AutoModelForImageTextToText); take such rows out, or the column where the text needs none"
            )


def unread_columns(row: Mapping[str, Any], prompt: str | list[Message], read: Collection[str] = ()) -> tuple[Note, ...]:
    """A note for each column whose name says that the model should see it, and that nothing reads.

    read: columns that are read in this form.
    """
    if _ADVICE.keys().isdisjoint(row):
        return ()
    unread = [
        name
        for name in row.keys() & _ADVICE.keys() - set(read)
        if _holds_something(row[name]) and not _holds(prompt, row[name]) and row[name] != row.get("tools")
    ]
    return tuple(Note(f"`{name}` is not read; {_ADVICE[name]}", lost=True) for name in sorted(unread))


def _holds_something(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(item is not None for item in value)
    return value is not None and value not in ("", {})


def _holds(prompt: str | list[Message], text: Any) -> bool:
    if not isinstance(text, str):
        return False
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return any(text.strip() in other for other in texts)
