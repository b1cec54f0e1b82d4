"""One row in any accepted format -> one Preference record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.data.rows.cells import open_cells
from fastdpo.data.rows.forms import form_of
from fastdpo.data.rows.llama_factory import Columns, detect_columns, messages_from_row, sharegpt_messages
from fastdpo.data.rows.messages import ONLY_TEXT, Message, check_text, clean_messages, parse_tools, with_system
from fastdpo.data.rows.unpaired import is_unpaired

SIDES = ("chosen", "rejected")
# columns that would change what is trained, were they read: under these names nothing reads them
_MISNAMED = {
    **dict.fromkeys(("system_prompt", "system_message", "sys_prompt"), "system"),
    **dict.fromkeys(("functions", "available_tools", "tool_list", "tool_schemas"), "tools"),
}
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# columns that hold what the model is asked; a row of texts that has one and no `prompt` would lose it
_PROMPT_LIKE = ("question", "query", "input", "context", "messages", "history")


@dataclass(frozen=True)
class Preference:
    """One preference pair: all three text, or all three lists of messages (`role`, `content`, ...).

    `tools` are the tools that the chat template shows, a list of function descriptions. `notes` say what of the row is
    not used, or how it became a pair.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def preference_from_row(row: Any, columns: Columns | None = None) -> Preference:
    """One row in any accepted format; raises `RowError` with the reason.

    - TRL standard and conversational, with `prompt`, or without it (the prompt is what chosen and rejected
      begin with in common: whole messages, or characters).
    - A text `prompt` beside lists of messages: it becomes the user message, unless the messages hold it
      already. Messages that begin with the whole `prompt` on both sides are not asked twice.
    - LLaMA-Factory's alpaca (`instruction`), sharegpt and openai (`conversations`) ranking rows, recognised
      by their columns or described by `columns`. They become messages, since LLaMA-Factory applies a template
      to them.
    - minimind's dpo.jsonl (chosen and rejected lists of messages).
    - What `forms.FORMS` lists: a pair under other names, several answers with scores, dialogues as text.

    Content in parts that are all text is joined; a list of messages may be JSON text.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is {type(row).__name__}; wanted an object with `chosen` and `rejected`")
    row = open_cells(row)
    media = next((name for name in _MEDIA if row.get(name)), None)
    if media is not None:
        raise RowError(f"`{media}` holds something, and {ONLY_TEXT}")
    notes: list[str] = []
    if columns is None:
        form = form_of(row)
        if form is not None:
            row = form.pair(row)
            notes.append(form.note)
        elif is_unpaired(row):
            raise RowError(
                'is an answer with a verdict, and no pair; the loss is one of pairs: unpaired rows take loss_type="kto"'
            )
        columns = detect_columns(row)
    parts = _trl_parts(row, notes) if columns is None else messages_from_row(row, columns, notes)
    prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        _refuse_empty(value, side)
    if not isinstance(prompt, str):
        prompt, chosen, rejected = (clean_messages(parts[name], name) for name in ("prompt", *SIDES))
        _check_completion(chosen, "chosen")
        _check_completion(rejected, "rejected")
    for name, meant in _MISNAMED.items():
        if row.get(name) and not row.get(meant):
            notes.append(f"`{name}` is not used; name it `{meant}` if the model is to see it")
    return Preference(prompt, chosen, rejected, parts["tools"], tuple(notes))


def _trl_parts(row: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    chosen, rejected = (_side(row, side) for side in SIDES)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("one of `chosen` and `rejected` is text and the other a list of messages; wanted one kind")
    prompt = _side(row, "prompt") if "prompt" in row else None
    if prompt == []:
        raise RowError("`prompt` is empty")

    if prompt is None:
        prompt, chosen, rejected = _split_prompt(row, chosen, rejected)
    elif isinstance(chosen, str):
        if not isinstance(prompt, str):
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        elif prompt.strip() and all(_goes_on(text, prompt) for text in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            notes.append("`chosen` and `rejected` repeat the whole `prompt`, which is taken once")
    elif isinstance(prompt, str):
        prompt, chosen, rejected = _join_text_prompt(prompt, chosen, rejected)
    elif chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]

    if row.get("system"):
        if isinstance(prompt, str):
            raise RowError("`system` would be lost beside a text `prompt`: put it into `prompt`, or use messages")
        prompt = with_system(prompt, row["system"], "system", notes)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": parse_tools(row.get("tools"))}


def _goes_on(text: Any, prompt: str) -> bool:
    return text.startswith(prompt) and bool(text[len(prompt) :].strip())


def _side(row: Mapping[str, Any], side: str) -> str | list[Message]:
    if side not in row:
        raise RowError(f"missing column `{side}`; found {', '.join(f'`{name}`' for name in row) or 'nothing'}")
    value = [row[side]] if isinstance(row[side], Mapping) and side != "prompt" else row[side]
    if isinstance(value, list):
        return clean_messages(sharegpt_messages(value, side), side)
    check_text(row[side], side, "text or a list of messages")
    return row[side]


def _split_prompt(row: Mapping[str, Any], chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that two wholes share: the rule of TRL's `extract_prompt`."""
    if isinstance(chosen, str):
        lost = [name for name in _PROMPT_LIKE if row.get(name)]
        if lost:
            raise RowError(f"no `prompt`, but `{lost[0]}` looks like one: rename it to `prompt`")
    _refuse_empty(chosen, "chosen")
    _refuse_empty(rejected, "rejected")
    end = next((index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if end is None:  # one continues the other, or both are the same: what they share last is still the answer
        end = min(len(chosen), len(rejected)) - 1
    elif end > 0 and chosen[end - 1] == " ":  # the space before a word belongs to the word, as tokenizers have it
        end -= 1
    if end == 0:
        raise RowError("no `prompt`, and `chosen` and `rejected` have no common beginning to take it from")
    return chosen[:end], chosen[end:], rejected[end:]


def _join_text_prompt(prompt: str, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    if not (chosen and rejected and chosen[0] == rejected[0] and chosen[0]["role"] != "assistant"):
        return [{"role": "user", "content": prompt}], chosen, rejected
    messages, chosen, rejected = _split_prompt({}, chosen, rejected)
    if not any(prompt.strip() in message["content"] for message in messages):
        raise RowError("the text `prompt` is not in the messages that `chosen` and `rejected` begin with")
    return messages, chosen, rejected


def _refuse_empty(value: str | list[Message], name: str) -> None:
    if not value or (isinstance(value, str) and not value.strip()):
        raise RowError(f"`{name}` is empty")


def _check_completion(messages: list[Message], name: str) -> None:
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError(f"`{name}[{index}].content` is empty")
    if messages[-1]["role"] in ("user", "system", "tool"):
        raise RowError(f"`{name}` ends with a {messages[-1]['role']} turn; wanted an assistant turn")
