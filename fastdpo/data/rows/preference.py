"""One row in any accepted format -> one Preference record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.data.rows.cells import open_cells
from fastdpo.data.rows.columns import refuse_media, system_messages, unread_columns, with_system
from fastdpo.data.rows.forms import known_form
from fastdpo.data.rows.llama_factory import Columns, detect_columns, is_turn, message_of_turn, messages_from_row
from fastdpo.data.rows.messages import Message, check_text, clean_message, is_message, parse_tools
from fastdpo.data.rows.notes import Note
from fastdpo.data.rows.unpaired import is_unpaired

SIDES = ("chosen", "rejected")
# columns that hold what the model is asked; a row of texts that has one and no `prompt` would lose it
_PROMPT_LIKE = ("question", "query", "input", "context", "messages", "history")


@dataclass(frozen=True)
class Preference:
    """One preference pair: all three text, or all three lists of messages (`role`, `content`, ...).

    `tools` are the tools that the chat template shows, a list of function descriptions. `notes` say what was done to
    the row, and what of it is not used.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None
    notes: tuple[Note, ...] = field(default=(), compare=False)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def preference_from_row(row: Any, columns: Columns | None = None) -> Preference:
    """One row in any accepted format; raises `RowError` with the reason.

    - TRL standard and conversational, with `prompt`, or without it (the prompt is what chosen and rejected
      begin with in common: whole messages, or characters).
    - A text `prompt` beside lists of messages: it becomes the user message, unless the messages hold it
      already. Answers that begin with the whole `prompt` on both sides are not asked twice.
    - LLaMA-Factory's alpaca (`instruction`), sharegpt and openai (`conversations`) ranking rows, recognised
      by their columns or described by `columns`. They become messages, since LLaMA-Factory applies a template
      to them.
    - minimind's dpo.jsonl (chosen and rejected lists of messages).
    - The forms of other tools in `forms.py`. Sharegpt turns (`from`, `value`) may stand wherever messages may.

    Messages keep every key that they came with.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is {type(row).__name__}; wanted an object with `chosen` and `rejected`")
    row = open_cells(row)
    notes: tuple[Note, ...] = ()
    described = columns is not None
    if columns is None:
        row, notes = known_form(row)
        if is_unpaired(row):
            raise RowError(
                "is unpaired (one answer and a label), which is not trained yet: bring pairs with `chosen` and "
                "`rejected`"
            )
        refuse_media(row)
        columns = detect_columns(row)
    parts = _trl_parts(row) if columns is None else messages_from_row(row, columns)
    prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        _refuse_empty(value, side)
        if not isinstance(prompt, str):
            _check_completion(value, side)
    # a dataset_info.json entry that names columns leaves the others unused on purpose
    unread = () if described else unread_columns(row, prompt, columns.read if columns else ())
    return Preference(prompt, chosen, rejected, parts["tools"], (*notes, *parts["notes"], *unread))


def _trl_parts(row: Mapping[str, Any]) -> dict[str, Any]:
    notes: tuple[Note, ...] = ()
    chosen, rejected = (_side(row, side) for side in SIDES)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("one of `chosen` and `rejected` is text and the other a list of messages; wanted one kind")
    prompt = _side(row, "prompt") if "prompt" in row else None
    if prompt == []:
        raise RowError("`prompt` is empty")

    if prompt is None:
        prompt, chosen, rejected = _split_prompt(row, chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str):
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        elif _repeats(prompt, chosen, rejected):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            notes = (Note("the text `prompt`, which chosen and rejected both repeat, is taken once"),)
    elif isinstance(prompt, str):
        prompt, chosen, rejected = _join_text_prompt(prompt, chosen, rejected)
    elif chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]

    system = row.get("system")
    if isinstance(prompt, str):
        if system_messages(system, "system"):
            raise RowError("`system` would be lost beside a text `prompt`: put it into `prompt`, or use messages")
    elif system is not None:
        prompt, notes = with_system(prompt, system, "system")
    tools = parse_tools(row.get("tools"))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": tools, "notes": notes}


def _side(row: Mapping[str, Any], side: str) -> str | list[Message]:
    if side not in row:
        raise RowError(f"missing column `{side}`; found {', '.join(f'`{name}`' for name in row) or 'nothing'}")
    value: Any = row[side]
    if is_turn(value) or (is_message(value) and not value.keys().isdisjoint(("content", "tool_calls"))):
        value = [value]
    if isinstance(value, list):
        return [_message(item, f"{side}[{index}]") for index, item in enumerate(value)]
    check_text(value, side, "text or a list of messages")
    return str(value)


def _message(item: Any, place: str) -> Message:
    return message_of_turn(item, place) if is_turn(item) else clean_message(item, place)


def _repeats(prompt: str, chosen: str, rejected: str) -> bool:
    """Whether both answers begin with the whole prompt. One word alone may begin two answers by chance."""
    if not prompt.strip() or prompt.strip().isalnum():
        return False
    return all(text.startswith(prompt) and text[len(prompt) :].strip() for text in (chosen, rejected))


def _split_prompt(row: Mapping[str, Any], chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that two wholes share: the rule of TRL's `extract_prompt`."""
    lost = [name for name in _PROMPT_LIKE if row.get(name)]
    if lost and isinstance(chosen, str):
        raise RowError(f"no `prompt`, but `{lost[0]}` looks like one: rename it to `prompt`")
    _refuse_empty(chosen, "chosen")
    _refuse_empty(rejected, "rejected")
    end = next((index for index, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if end is None:  # one continues the other, or both are the same: what they share last is still the answer
        end = min(len(chosen), len(rejected)) - 1
    elif end > 0 and chosen[end - 1] == " ":  # the space before a word belongs to the word, as tokenizers have it
        end -= 1
    if end == 0:
        if lost:
            raise RowError(f"no `prompt`, but `{lost[0]}` looks like one: rename it to `prompt`")
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
