"""One row in any accepted format -> one Preference record."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.data.rows.llama_factory import Columns, detect_columns, messages_from_row
from fastdpo.data.rows.messages import Message, check_text, clean_messages, parse_tools

SIDES = ("chosen", "rejected")
# columns that hold what the model is asked; a row of texts that has one and no `prompt` would lose it
_PROMPT_LIKE = ("question", "query", "input", "context", "messages", "history")


@dataclass(frozen=True)
class Preference:
    """One preference pair: all three text, or all three lists of messages (`role`, `content`, ...).

    `tools` are the tools that the chat template shows, a list of function descriptions.
    """

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None

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
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is {type(row).__name__}; wanted an object with `chosen` and `rejected`")
    columns = columns or detect_columns(row)
    if columns is not None:
        parts = messages_from_row(row, columns)
    else:
        parts = _trl_parts(row)
    prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        _refuse_empty(value, side)
    if not isinstance(prompt, str):
        prompt, chosen, rejected = (clean_messages(parts[name], name) for name in ("prompt", *SIDES))
        _check_completion(chosen, "chosen")
        _check_completion(rejected, "rejected")
    return Preference(prompt, chosen, rejected, parts["tools"])


def _trl_parts(row: Mapping[str, Any]) -> dict[str, Any]:
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
    elif isinstance(prompt, str):
        prompt, chosen, rejected = _join_text_prompt(prompt, chosen, rejected)
    elif chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]

    system = row.get("system")
    if system and isinstance(system, str):
        if isinstance(prompt, str):
            raise RowError("`system` would be lost beside a text `prompt`: put it into `prompt`, or use messages")
        if prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": parse_tools(row.get("tools"))}


def _side(row: Mapping[str, Any], side: str) -> str | list[Message]:
    if side not in row:
        raise RowError(f"missing column `{side}`; found {', '.join(f'`{name}`' for name in row) or 'nothing'}")
    if isinstance(row[side], list):
        return clean_messages(row[side], side)
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
