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
from fastdpo.data.rows.sides import LABEL, SIDES, UNPAIRED
from fastdpo.data.rows.unpaired import described_columns, is_unpaired, unpaired_columns

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


@dataclass(frozen=True)
class Unpaired:
    """One answer, and whether it is desirable; the rest as `Preference` has it."""

    prompt: str | list[Message]
    completion: str | list[Message]
    label: bool
    tools: list[Any] | None = None
    notes: tuple[Note, ...] = field(default=(), compare=False)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def preference_from_row(row: Any, columns: Columns | None = None) -> Preference | Unpaired:
    """One row in any accepted format; raises `RowError` with the reason.

    - TRL standard and conversational, with `prompt`, or without it (the prompt is what chosen and rejected
      begin with in common: whole messages, or characters).
    - A text `prompt` beside lists of messages: it becomes the user message, unless the messages hold it
      already. Answers that begin with the whole `prompt` on both sides are not asked twice.
    - LLaMA-Factory's alpaca (`instruction`), sharegpt and openai (`conversations`) ranking rows, recognised
      by their columns or described by `columns`. They become messages, since LLaMA-Factory applies a template
      to them.
    - minimind's dpo.jsonl (chosen and rejected lists of messages).
    - Unpaired rows: TRL's `prompt`, `completion` and `label`, and the forms in `unpaired.py`.
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
        refuse_media(row)
    unpaired = is_unpaired(row) if columns is None else columns.unpaired
    if unpaired:
        row, columns = unpaired_columns(row) if columns is None else described_columns(row, columns), None
    elif columns is None:
        columns = detect_columns(row)
    sides = UNPAIRED if unpaired else SIDES
    parts = _trl_parts(row, sides) if columns is None else messages_from_row(row, columns)
    prompt = parts["prompt"]
    for side in sides:
        _refuse_empty(parts[side], side)
        if not isinstance(prompt, str):
            _check_completion(parts[side], side)
    # a dataset_info.json entry that names columns leaves the others unused on purpose
    unread = () if described else unread_columns(row, prompt, columns.read if columns else ())
    notes = (*notes, *parts["notes"], *unread)
    if unpaired:
        return Unpaired(prompt, parts["completion"], row[LABEL], parts["tools"], notes)
    return Preference(prompt, parts["chosen"], parts["rejected"], parts["tools"], notes)


def _trl_parts(row: Mapping[str, Any], sides: tuple[str, ...]) -> dict[str, Any]:
    notes: tuple[Note, ...] = ()
    answers = [_side(row, side) for side in sides]
    if len({isinstance(answer, str) for answer in answers}) > 1:
        raise RowError("one of `chosen` and `rejected` is text and the other a list of messages; wanted one kind")
    texts = isinstance(answers[0], str)
    prompt = _side(row, "prompt") if "prompt" in row else None
    if prompt == []:
        raise RowError("`prompt` is empty")

    if prompt is None:
        prompt, *answers = _split_prompt(row, *answers) if sides == SIDES else _last_turn(row, answers[0])
    elif texts:
        if not isinstance(prompt, str):
            answers = [[{"role": "assistant", "content": text}] for text in answers]
        elif sides == SIDES and _repeats(prompt, answers):
            answers = [text[len(prompt) :] for text in answers]
            notes = (Note("the text `prompt`, which chosen and rejected both repeat, is taken once"),)
    elif isinstance(prompt, str):
        prompt, *answers = _join_text_prompt(prompt, answers)
    elif all(messages[: len(prompt)] == prompt for messages in answers):
        answers = [messages[len(prompt) :] for messages in answers]

    system = row.get("system")
    if isinstance(prompt, str):
        if system_messages(system, "system"):
            raise RowError("`system` would be lost beside a text `prompt`: put it into `prompt`, or use messages")
    elif system is not None:
        prompt, notes = with_system(prompt, system, "system")
    tools = parse_tools(row.get("tools"))
    return {"prompt": prompt, **dict(zip(sides, answers, strict=True)), "tools": tools, "notes": notes}


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


def _repeats(prompt: str, answers: list[Any]) -> bool:
    """Whether both answers begin with the whole prompt. One word alone may begin two answers by chance, and one answer
    may begin with the question."""
    if not prompt.strip() or prompt.strip().isalnum():
        return False
    return all(text.startswith(prompt) and text[len(prompt) :].strip() for text in answers)


def _last_turn(row: Mapping[str, Any], completion: Any) -> tuple[Any, Any]:
    """The prompt of a whole dialogue whose last turn is the answer."""
    if isinstance(completion, str):
        lost = next((name for name in _PROMPT_LIKE if row.get(name)), None)
        raise RowError(f"no `prompt`, but `{lost}` looks like one: rename it to `prompt`" if lost else "no `prompt`")
    if len(completion) < 2:
        raise RowError("no `prompt`, and `completion` has one turn alone")
    return completion[:-1], completion[-1:]


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


def _join_text_prompt(prompt: str, answers: list[Any]) -> tuple[Any, ...]:
    first = answers[0][0] if answers[0] else None
    whole = first is not None and first["role"] != "assistant"
    if not (whole and all(messages and messages[0] == first for messages in answers)):
        return [{"role": "user", "content": prompt}], *answers
    messages, *answers = _split_prompt({}, *answers) if len(answers) > 1 else _last_turn({}, answers[0])
    if not any(prompt.strip() in message["content"] for message in messages):
        raise RowError("the text `prompt` is not in the messages that the answers begin with")
    return messages, *answers


def _refuse_empty(value: str | list[Message], name: str) -> None:
    if not value or (isinstance(value, str) and not value.strip()):
        raise RowError(f"`{name}` is empty")


def _check_completion(messages: list[Message], name: str) -> None:
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError(f"`{name}[{index}].content` is empty")
    if messages[-1]["role"] in ("user", "system", "tool"):
        raise RowError(f"`{name}` ends with a {messages[-1]['role']} turn; wanted an assistant turn")
