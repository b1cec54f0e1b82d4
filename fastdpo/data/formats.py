"""Every accepted row format -> one Preference record, and bad rows named by file and line."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from fastdpo.data.errors import DataError, RowError, count
from fastdpo.data.llama_factory import Layout, detect_layout, messages_from_row
from fastdpo.data.messages import (
    Message,
    check_text,
    clean_messages,
    parse_template_options,
    parse_tools,
    to_json,
)
from fastdpo.data.sources import PlacedRow, dataset_rows, open_source

__all__ = ["DataError", "Preference", "load_preferences", "normalize_dataset", "preference_from_row"]

logger = logging.getLogger(__name__)

_SIDES = ("chosen", "rejected")
# columns that hold what the model is asked; a row of texts that has one and no `prompt` would lose it
_PROMPT_LIKE = ("question", "query", "input", "context", "messages", "history")
_OPTIONS = ("tools", "chat_template_kwargs")
# reference log-probs computed elsewhere, as TRL's rows may have them; the trainer computes its own
_UNUSED = ("ref_chosen_logps", "ref_rejected_logps")
_SHOWN = 50
_SKIPPED_SHOWN = 5


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


def load_preferences(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    dataset_dir: str | None = None,
    skip_bad_rows: bool = False,
) -> Dataset:
    """Load preference pairs; columns `prompt`, `chosen`, `rejected` (text, or lists of messages).

    `tools` and `chat_template_kwargs` (as JSON text) are kept where rows have them; other columns are left out.
    Reference log-probs in the rows (`ref_chosen_logps`, `ref_rejected_logps`) are not used: a warning says so.

    `source` is a file (json: an array or one row per line, jsonl, csv, parquet), a `save_to_disk` folder, a
    folder with a dataset_info.json of one preference entry, an entry's name with `dataset_dir`, or a
    dataset's name on the hub. Rows may be in any format of `preference_from_row`.

    Raises `DataError` that lists every bad row; with `skip_bad_rows` it warns and goes on without them.
    """
    opened = open_source(source, split=split, config=config, dataset_dir=dataset_dir)
    return _build(opened.rows, opened.name, opened.layout, skip_bad_rows)


def normalize_dataset(
    dataset: Dataset | IterableDataset, *, skip_bad_rows: bool = False, where: str = "train_dataset"
) -> Dataset | IterableDataset:
    """The same for a dataset in hand; a bad row is named `where[index]`.

    One that is tokenized already (`prompt_ids`, `chosen_ids`, `rejected_ids`) comes back as it is. An
    `IterableDataset` is mapped row by row as it is read, and always has the columns `tools` and
    `chat_template_kwargs` too; a bad row raises when it is reached, or is left out with a warning that counts it.
    """
    first = next(iter(dataset), {})
    if isinstance(first, Mapping) and {"prompt_ids", "chosen_ids", "rejected_ids"} <= first.keys():
        return dataset
    if isinstance(dataset, IterableDataset):
        if first == {}:
            raise DataError(f"{where} is empty; wanted preference rows with `prompt`, `chosen` and `rejected`.")
        if not isinstance(first, Mapping):
            raise DataError(f"{where}[0] is {type(first).__name__}; wanted an object with `chosen` and `rejected`.")
        warn_unused(first, where)
        options = {"skip_bad_rows": skip_bad_rows, "where": where, "skipped": set()}
        # one row at a time, so that no row is read before it is asked for
        normal = dataset.map(_normalize_one, batched=True, batch_size=1, with_indices=True, fn_kwargs=options)
        return normal.select_columns(["prompt", *_SIDES, *_OPTIONS])
    return _build(dataset_rows(dataset, where), where, None, skip_bad_rows)


def warn_unused(columns: Iterable[str], where: str) -> None:
    """One line where columns hold reference log-probs, which nothing reads."""
    unused = sorted(set(columns) & set(_UNUSED))
    if unused:
        logger.warning(
            f"{where}: {' and '.join(unused)} {'is' if len(unused) == 1 else 'are'} ignored: the reference "
            "log-probs are computed in training."
        )


def preference_from_row(row: Any, layout: Layout | None = None) -> Preference:
    """One row in any accepted format; raises `RowError` with the reason.

    - TRL standard and conversational, with `prompt`, or without it (the prompt is what chosen and rejected
      begin with in common: whole messages, or characters).
    - A text `prompt` beside lists of messages: it becomes the user message, unless the messages hold it
      already. Messages that begin with the whole `prompt` on both sides are not asked twice.
    - LLaMA-Factory's alpaca (`instruction`), sharegpt and openai (`conversations`) ranking rows, recognised
      by their columns or described by `layout`. They become messages, since LLaMA-Factory applies a template
      to them.
    - minimind's dpo.jsonl (chosen and rejected lists of messages).
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is {type(row).__name__}; wanted an object with `chosen` and `rejected`")
    layout = layout or detect_layout(row)
    if layout is not None:
        parts = messages_from_row(row, layout)
    else:
        parts = _trl_parts(row)
    prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        _refuse_empty(value, side)
    if not isinstance(prompt, str):
        prompt, chosen, rejected = (clean_messages(parts[name], name) for name in ("prompt", *_SIDES))
        _check_completion(chosen, "chosen")
        _check_completion(rejected, "rejected")
    return Preference(prompt, chosen, rejected, parts["tools"])


def _trl_parts(row: Mapping[str, Any]) -> dict[str, Any]:
    chosen, rejected = (_side(row, side) for side in _SIDES)
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


def _build(rows: Iterable[PlacedRow], where: str, layout: Layout | None, skip_bad_rows: bool) -> Dataset:
    kept: list[dict[str, Any]] = []
    names: set[str] = set()
    places: list[str] = []
    bad: list[tuple[str, str]] = []
    for place, value in rows:
        try:
            if isinstance(value, RowError):
                raise value
            kept.append(_stored(value, layout))
            names |= value.keys() & set(_UNUSED)
            places.append(place)
        except RowError as error:
            bad.append((place, str(error)))
    if not kept and not bad:
        raise DataError(f"{where} is empty; wanted preference rows with `prompt`, `chosen` and `rejected`.")
    if bad and (not skip_bad_rows or not kept):
        raise DataError(_list_bad_rows(where, bad, len(kept) + len(bad), skip_bad_rows))
    if bad:
        first = "; ".join(f"{place}: {reason}" for place, reason in bad[:_SKIPPED_SHOWN])
        more = f"; and {len(bad) - _SKIPPED_SHOWN} more" if len(bad) > _SKIPPED_SHOWN else ""
        logger.warning(f"{where}: skipped {count(len(bad), 'bad row')} of {len(kept) + len(bad)}: {first}{more}")
    _refuse_mixed(where, [not isinstance(row["prompt"], str) for row in kept], places)
    warn_unused(names, where)
    identical = sum(row["chosen"] == row["rejected"] for row in kept)
    if identical:
        logger.warning(
            f"{where}: chosen and rejected are identical in {identical} of {count(len(kept), 'row')}; they are kept "
            "and teach nothing (their loss has no gradient)."
        )
    columns = {name: [row[name] for row in kept] for name in kept[0]}
    for name in _OPTIONS:
        if all(value is None for value in columns[name]):
            del columns[name]
    try:
        return Dataset.from_dict(columns)
    except OverflowError as error:
        raise DataError(f"{where}: a number in the messages is too large to be stored: {error}.") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{where}: a key of the messages has several types in different rows: {error}.") from error


def _stored(value: Any, layout: Layout | None = None) -> dict[str, Any]:
    """The columns of one row, with None for an option that it lacks; raises `RowError`."""
    try:
        preference = preference_from_row(value, layout)
        columns = {name: getattr(preference, name) for name in ("prompt", *_SIDES)}
        # free-form objects travel as JSON text: an Arrow column would give every row every row's keys
        options = (preference.tools, parse_template_options(value.get("chat_template_kwargs")))
        return columns | {name: to_json(option) for name, option in zip(_OPTIONS, options, strict=True)}
    except RecursionError:
        raise RowError("is nested too deeply") from None


def _list_bad_rows(where: str, bad: list[tuple[str, str]], total: int, skipping: bool) -> str:
    reasons = Counter(reason for _, reason in bad)
    if len(bad) == total > 1 and len(reasons) == 1:
        return f"{where}: none of the {total} rows can be used; each: {bad[0][1]}."
    lines = [f"  {place}: {reason}" for place, reason in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    fix = "No row is left." if skipping else "Fix them, or go on without them with --skip_bad_rows."
    return "\n".join([f"{where}: {count(len(bad), 'bad row')} of {total}:", *lines, fix])


def _refuse_mixed(where: str, conversational: list[bool], places: list[str]) -> None:
    chats = sum(conversational)
    if chats in (0, len(conversational)):
        return
    minority = chats * 2 <= len(conversational)
    place = places[conversational.index(minority)]
    kinds = ("plain text", "lists of messages")
    raise DataError(
        f"{where} mixes {count(len(conversational) - chats, 'row')} of plain text with {chats} of messages; wanted "
        f"one kind. The first of {kinds[minority]}: {place}."
    )


def _normalize_one(
    batch: dict[str, list[Any]], indices: list[int], skip_bad_rows: bool, where: str, skipped: set[str]
) -> dict[str, list[Any]]:
    row = {name: values[0] for name, values in batch.items()}
    try:
        return {name: [value] for name, value in _stored(row).items()}
    except RowError as error:
        if not skip_bad_rows:
            raise DataError(f"{where}[{indices[0]}]: {error}.") from None
        said = f"{where}[{indices[0]}]: skipped: {error}"
    if said not in skipped:  # a stream is read again: for its columns, and in every epoch
        skipped.add(said)
        logger.warning(f"{said} ({count(len(skipped), 'bad row')} so far)")
    # no row, also in the columns that are dropped afterwards
    return {name: [] for name in (*batch, "prompt", *_SIDES, *_OPTIONS)}
