"""What a chat template shows of a row: a conversation of the row's shape, with words of its own in every place, is
rendered once, and the words are looked for."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from jinja2 import TemplateRuntimeError
from transformers import PreTrainedTokenizerBase

from fastdpo.data.errors import RowError
from fastdpo.data.rows.messages import Message

# what reasoning is called beside `content`
_REASONING = ("reasoning_content", "reasoning", "thinking")
# what templates look for in a content, so that a conversation of the same shape must have it too
_TAGS = re.compile(r"(</?think>|</?tool_response>|</?tool_call>)")
BEFORE_THINK = "content before </think>"
TOOLS = "tools"
# roles that templates know; of others it is looked whether an answer of theirs begins as the template begins answers
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_MOST_SHAPES = 10_000

_seen: dict[Any, "Shown"] = {}


class Shown(NamedTuple):
    """left_out: (role, field) of what a template does not show. refusal: why the row cannot be used, "" if it can."""

    left_out: tuple[tuple[str, str], ...] = ()
    refusal: str = ""


@contextmanager
def template_errors() -> Iterator[None]:
    """What a template does wrong, a division by zero or a loop without end, as `jinja2.TemplateError` too."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error) or "there is not enough memory"
        raise TemplateRuntimeError(f"{type(error).__name__}: {reason}") from error


def check_shown(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    completion: list[Message],
    options: Mapping[str, Any],
    side: str,
) -> tuple[tuple[str, str], ...]:
    """(role, field) of everything in a conversation that its template leaves out; once for each shape.

    options: of the template, with `tools`. side: what the message calls the completion.

    Raises:
        RowError: nothing of a whole turn is shown, or an answer is by somebody whom the template does not know.
        jinja2.TemplateError: the template refuses the conversation.
    """
    conversation = [*prompt, *completion]
    others = {name: value for name, value in options.items() if name != TOOLS}
    shape = (
        str(tokenizer.chat_template),
        tuple(map(_shape, conversation)),
        len(prompt),
        side,
        bool(options.get(TOOLS)),
        json.dumps(others, sort_keys=True, default=str) if others else "",
    )
    shown = _seen.get(shape)
    if shown is None:
        if len(_seen) >= _MOST_SHAPES:
            _seen.clear()
        shown = _seen[shape] = _look(tokenizer, conversation, len(prompt), options, side)
    if shown.refusal:
        raise RowError(shown.refusal)
    return shown.left_out


def _shape(message: Message) -> tuple[Any, ...]:
    """Equal for messages that a template treats alike."""
    keys = []
    for key, value in message.items():
        if key == "role":
            keys.append(value)
        elif key == "content":
            keys.append(tuple(piece if tag else bool(piece.strip()) for piece, tag in _pieces(value)))
        elif key == "tool_calls":
            keys.append(tuple(bool(_function(call).get("arguments")) for call in value))
        else:
            keys.append((key, bool(value)))
    return tuple(keys)


def _pieces(content: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a content, and whether each is a tag."""
    if "<" not in content:
        yield content, False
        return
    for index, piece in enumerate(_TAGS.split(content)):
        yield piece, index % 2 == 1


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    return call.get("function", call)


class _Words:
    """Words that are in no template."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return f"Qz{self.count:04d}x"


def _look(
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[Message],
    prompt: int,
    options: Mapping[str, Any],
    side: str,
) -> Shown:
    word = _Words()
    probes, marks = [], []
    for message in conversation:
        probe, fields = _probe(message, word)
        probes.append(probe)
        marks.append(fields)
    options, tool_words = _probe_tools(options, word)

    def render(messages: list[Message], **more: Any) -> str:
        with template_errors():
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options, **more))

    text = render(probes)
    left_out: list[tuple[str, str]] = []
    for index, (message, fields) in enumerate(zip(conversation, marks, strict=True)):
        left_out += dict.fromkeys((message["role"], field) for field, mark in fields if mark not in text)
        said = [field for field, _ in fields if field not in (*_REASONING, BEFORE_THINK)]
        if said and not any(mark in text for field, mark in fields if field in said):
            place = f"prompt[{index}]" if index < prompt else f"{side}[{index - prompt}]"
            return Shown((), _nothing_of(place, message["role"], said[0]))
    if tool_words and not any(mark in text for mark in tool_words):
        left_out.append(("", TOOLS))
    role = conversation[prompt]["role"]
    if role not in _ROLES and not text.startswith(render(probes[:prompt], add_generation_prompt=True)):
        return Shown(
            (), f"`{side}[0].role` is {role!r}, and the chat template begins answers otherwise; name it 'assistant'"
        )
    return Shown(tuple(left_out))


def _nothing_of(place: str, role: str, field: str) -> str:
    if role not in _ROLES[:5]:
        return f"`{place}.role` is {role!r}, of which the chat template shows nothing; name it 'user' or 'assistant'"
    return (
        f"the chat template shows nothing of `{place}`, a turn of role {role!r} with {field}; take a template that "
        "does, or leave the turn out"
    )


def _probe(message: Message, word: _Words) -> tuple[Message, list[tuple[str, str]]]:
    """A message of the same shape, and the words that stand for its fields."""
    probe, fields = dict(message), []
    pieces = list(_pieces(message["content"]))
    thinking = max((index for index, (piece, tag) in enumerate(pieces) if tag and piece == "</think>"), default=-1)
    content = ""
    for index, (piece, tag) in enumerate(pieces):
        if not tag and piece.strip():
            mark = word()
            fields.append((BEFORE_THINK if index < thinking else "content", mark))
            # with the white space around it
            piece = piece.replace(piece.strip(), mark)
        content += piece
    probe["content"] = content
    for key in _REASONING:
        if isinstance(message.get(key), str) and message[key].strip():
            probe[key] = word()
            fields.append((key, probe[key]))
    if message.get("tool_calls"):
        probe["tool_calls"] = [_probe_call(call, word, fields) for call in message["tool_calls"]]
    return probe, fields


def _probe_call(call: Mapping[str, Any], word: _Words, fields: list[tuple[str, str]]) -> dict[str, Any]:
    function = {**_function(call), "name": word()}
    fields.append(("tool_calls", function["name"]))
    if function.get("arguments"):
        name, value = word(), word()
        function["arguments"] = {name: value}
        fields += [("arguments of tool_calls", name), ("arguments of tool_calls", value)]
    return {**call, "function": function} if "function" in call else function


def _probe_tools(options: Mapping[str, Any], word: _Words) -> tuple[dict[str, Any], list[str]]:
    if not options.get(TOOLS):
        return dict(options), []
    marks = [word(), word()]
    tool = {
        "name": marks[0],
        "description": marks[1],
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": []},
    }
    return {**options, TOOLS: [{"type": "function", "function": tool}]}, marks


def left_out_sentence(role: str, field: str, rows: int, total: int, first: str) -> str:
    """What a template leaves out of a data set, and what to do."""
    where = f"in {rows} of {total} rows (the first: {first})"
    if field == TOOLS:
        return f"the chat template shows no tools, and {where} there are some; take a template that does"
    if field == BEFORE_THINK:
        what, fix = f"what stands before </think> in {role} turns", "the model is not trained on it"
    elif field in _REASONING:
        what = f"`{field}` of {role} turns"
        fix = "write it into `content` as <think>...</think> if the model is to learn it"
    else:
        what, fix = f"{field} of {role} turns", "take a template that shows it"
    return f"the chat template leaves out {what} {where}; {fix}"
