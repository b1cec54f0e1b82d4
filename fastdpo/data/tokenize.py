"""Preference rows -> prompt_ids, chosen_ids, rejected_ids: the ids that TRL 1.16 makes of the same rows."""

import logging
from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdpo.data.collate import check_truncation
from fastdpo.data.errors import DataError
from fastdpo.data.formats import warn_unused
from fastdpo.data.messages import for_template, from_json
from fastdpo.data.tokenize_report import TokenizeReport

logger = logging.getLogger(__name__)

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_PROMPT_CUT = "_prompt_tokens_cut"


def common_prefix_length(ids: list[int], other: list[int]) -> int:
    """How many leading tokens two sequences share."""
    for length, (token, other_token) in enumerate(zip(ids, other, strict=False)):
        if token != other_token:
            return length
    return min(len(ids), len(other))


def tokenize_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tools: str | None = None) -> dict[str, Any]:
    """One row of texts, or of lists of messages -> `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Prompt, prompt + chosen and prompt + rejected are tokenized as wholes (messages through the chat template,
    the prompt with the generation prompt; text with the EOS token after the completion). A completion is what
    follows the common prefix of prompt and whole, the shorter of both completions' prefixes, so that tokens
    which merge across the boundary, or a template that renders the last turn otherwise, end up in the
    completions and both completions share `prompt_ids`. This is TRL 1.16's rule
    (`DPOTrainer._prepare_dataset`).

    `tools` (a list, or its JSON text) and `chat_template_kwargs` (a dict, or its JSON text) go to the
    template; rows without tools get those in `tools` (JSON text).
    """
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        prompt_ids = tokenizer(prompt)["input_ids"]
        whole = [
            tokenizer(prompt + (text if text.endswith(eos) else text + eos))["input_ids"] for text in (chosen, rejected)
        ]
    else:
        options = {
            "tools": from_json(row.get("tools")) or from_json(tools),
            **(from_json(row.get("chat_template_kwargs")) or {}),
        }
        prompt = for_template(prompt)
        prompt_ids = _apply_template(tokenizer, prompt, add_generation_prompt=True, **options)
        whole = [
            _apply_template(tokenizer, prompt + for_template(messages), **options) for messages in (chosen, rejected)
        ]
    shared = min(common_prefix_length(prompt_ids, ids) for ids in whole)
    return {
        "prompt_ids": prompt_ids[:shared],
        "chosen_ids": whole[0][shared:],
        "rejected_ids": whole[1][shared:],
        _PROMPT_CUT: len(prompt_ids) - shared,
    }


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    name: str = "train",
    keep: Sequence[str] = (),
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    tools: str | None = None,
) -> tuple[Dataset | IterableDataset, TokenizeReport]:
    """Tokenize the rows of `load_preferences` or `normalize_dataset`.

    Returns the dataset with columns `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ints, not truncated:
    the collator truncates) and a report. With `truncation_mode="keep_start"` rows whose prompt alone has
    `max_length` tokens or more are dropped and counted: no completion token of theirs could be scored. So are
    other rows that leave nothing to score in either completion. A dataset that already has the three columns
    is only checked (lists of ints of 0 or more) and filtered, and keeps its columns that are named in `keep`. An
    `IterableDataset` is mapped, checked and filtered lazily.

    Before all that, prompts are cut from the left to `max_prompt_length` tokens and completions from the right to
    `max_completion_length` (as TRL up to 0.28); kept rows that lost tokens are counted. `tools`: see `tokenize_row`.

    Raises `DataError` when the rows need what the tokenizer lacks (a chat template, an EOS token), when a
    column is missing, when the template refuses a row, when given ids are none, or when no row is left.
    """
    check_truncation(max_length, truncation_mode)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name}: the dataset has no row.")
    tokenized = set(ID_COLUMNS) <= first.keys()
    kept_columns = [*ID_COLUMNS, *(column for column in keep if tokenized and column in first)]
    if tokenized:
        warn_unused(set(first).difference(keep), name)
        if isinstance(dataset, IterableDataset):
            dataset = dataset.map(_check_ids, with_indices=True, fn_kwargs={"name": name})
    else:
        _check_tokenizer(first, tokenizer, name)
        options: dict[str, Any] = {
            "with_indices": True,
            "fn_kwargs": {"tokenizer": tokenizer, "name": name, "tools": tools},
            "remove_columns": list(first),
        }
        if isinstance(dataset, Dataset):
            # one process more than rows would only start for nothing
            options |= {
                "num_proc": min(num_proc, len(dataset)) if num_proc else None,
                "desc": f"Tokenizing {name}",
            }
        dataset = dataset.map(_tokenize_indexed, **options)

    parts = (max_prompt_length, max_completion_length, max_completion_length)
    if isinstance(dataset, IterableDataset):
        if any(parts):
            dataset = dataset.map(_shorten, fn_kwargs={"parts": parts})
        limits = {"max_length": max_length, "truncation_mode": truncation_mode}
        dataset = dataset.select_columns(kept_columns).filter(_is_usable, fn_kwargs=limits)
        return dataset, TokenizeReport(name, None, max_length)

    lengths = _lengths(dataset, name if tokenized else None)
    kept, report = _select(lengths, max_length, truncation_mode, name, parts)
    if not kept:
        raise DataError(_none_left(lengths, report))
    if report.prompt_cut:
        logger.warning(
            f"{name}: in {report.prompt_cut} of {len(kept)} rows the prompt alone ends in other tokens than "
            "before its completion (the template renders it otherwise, or tokens merge across the boundary); "
            "the completion starts where they part."
        )
    if len(kept) < len(dataset):
        dataset = dataset.select(kept)
    if report.shortened_prompts or report.shortened_chosen or report.shortened_rejected:
        dataset = dataset.map(_shorten, fn_kwargs={"parts": parts}, desc=f"Shortening {name}")
    return dataset.select_columns(kept_columns), report


def _tokenize_indexed(
    row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, name: str, tools: str | None
) -> dict[str, Any]:
    try:
        return tokenize_row(row, tokenizer, tools)
    except TemplateError as error:
        raise DataError(f"{name}[{index}]: the chat template refuses this row: {error}") from None


def _shorten(row: dict[str, Any], parts: tuple[int | None, ...]) -> dict[str, Any]:
    """The prompt's last tokens and the completions' first ones; `parts`: how many of each, None for all."""
    cuts = (slice(-parts[0] if parts[0] else None, None), slice(parts[1]), slice(parts[2]))
    return {column: row[column][cut] for column, cut in zip(ID_COLUMNS, cuts, strict=True)}


def _check_ids(row: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    for column in ID_COLUMNS:
        ids: Any = row.get(column)
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # a stream formatted as numpy or torch
        if not isinstance(ids, list) or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise DataError(_bad_ids(name, index, column))
    return row


def _bad_ids(name: str, index: int, column: str) -> str:
    return f"{name}[{index}]: `{column}` is not a list of token ids; wanted integers of 0 or more."


def _is_usable(row: dict[str, Any], max_length: int | None, truncation_mode: str) -> bool:
    prompt = len(row["prompt_ids"])
    return any(_scored(prompt, len(row[side]), max_length, truncation_mode)[1] for side in ID_COLUMNS[1:])


def _scored(prompt: int, completion: int, max_length: int | None, truncation_mode: str) -> tuple[int, int]:
    """How many tokens the collator cuts off a sequence of these lengths, and how many it then scores."""
    whole = prompt + completion
    over = max(whole - max_length, 0) if max_length is not None else 0
    prompt_left = prompt if truncation_mode == "keep_start" else max(prompt - over, 0)
    # position 0 has nothing before it that could predict it
    return over, max(whole - over - max(prompt_left, 1), 0)


def _check_tokenizer(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    missing = [column for column in ("prompt", "chosen", "rejected") if column not in row]
    if missing:
        raise DataError(f"{name}: missing column `{missing[0]}`; found {', '.join(row)}.")
    if isinstance(row["prompt"], str):
        if tokenizer.eos_token is None:
            raise DataError(
                f"{name}: the tokenizer has no EOS token, which ends every completion; set tokenizer.eos_token."
            )
    elif tokenizer.chat_template is None:
        raise DataError(
            f"{name}: the rows are messages, but the tokenizer has no chat template; set "
            "tokenizer.chat_template, use the tokenizer of a chat model, or give prompt, chosen and rejected "
            "as text."
        )


def _lengths(dataset: Dataset, check: str | None) -> dict[str, list[int]]:
    """Lengths of the id columns, and the cut tokens, read from Arrow without making Python lists of ids.

    check: the dataset's name where the ids come from elsewhere; `DataError` then names the first row whose ids
    are none.
    """
    columns = [column for column in (*ID_COLUMNS, _PROMPT_CUT) if column in dataset.column_names]
    lengths: dict[str, list[int]] = {column: [] for column in columns}
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        for column in columns:
            for chunk in cast("pa.Table", table).column(column).chunks:
                if check is not None:
                    bad = _first_bad_ids(chunk)
                    if bad is not None:
                        raise DataError(_bad_ids(check, len(lengths[column]) + bad, column))
                lengths[column] += (
                    chunk if column == _PROMPT_CUT else pc.call_function("list_value_length", [chunk])
                ).to_pylist()
    return lengths


def _first_bad_ids(chunk: Any) -> int | None:
    """The first element of an Arrow array that is not a list of integers of 0 or more."""
    kind = chunk.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)):
        return 0
    ids = chunk.flatten()
    if not chunk.null_count and not ids.null_count and (pc.call_function("min", [ids]).as_py() or 0) >= 0:
        return None
    return next(
        index
        for index, row in enumerate(chunk.to_pylist())
        if row is None or any(token is None or token < 0 for token in row)
    )


def _select(
    lengths: dict[str, list[int]],
    max_length: int | None,
    truncation_mode: str,
    name: str,
    parts: tuple[int | None, ...],
) -> tuple[list[int], TokenizeReport]:
    """The rows that have something to score, and the counts of the others."""
    kept: list[int] = []
    long_prompt = unscored = empty = 0
    truncated, shortened = [0, 0], [0, 0, 0]
    for index, found in enumerate(zip(*(lengths[column] for column in ID_COLUMNS), strict=True)):
        prompt, *completions = (min(n, limit or n) for n, limit in zip(found, parts, strict=True))
        if truncation_mode == "keep_start" and max_length is not None and prompt >= max_length:
            long_prompt += 1
            continue
        cut, scored = zip(*(_scored(prompt, n, max_length, truncation_mode) for n in completions), strict=True)
        if not any(scored):
            unscored += 1
            continue
        kept.append(index)
        truncated = [total + (over > 0) for total, over in zip(truncated, cut, strict=True)]
        shortened = [
            total + (n > left) for total, n, left in zip(shortened, found, (prompt, *completions), strict=True)
        ]
        empty += not all(scored)
    report = TokenizeReport(
        name=name,
        rows=len(kept),
        max_length=max_length,
        dropped_long_prompt=long_prompt,
        dropped_unscored=unscored,
        truncated_chosen=truncated[0],
        truncated_rejected=truncated[1],
        empty_after_truncation=empty,
        shortened_prompts=shortened[0],
        shortened_chosen=shortened[1],
        shortened_rejected=shortened[2],
        prompt_cut=sum(lengths[_PROMPT_CUT][index] > 0 for index in kept) if _PROMPT_CUT in lengths else 0,
    )
    return kept, report


def _none_left(lengths: dict[str, list[int]], report: TokenizeReport) -> str:
    total, long_prompt = len(lengths["prompt_ids"]), report.dropped_long_prompt
    rows = f"all {total} rows were" if total > 1 else "the only row was"
    if not long_prompt:
        return f"{report.name}: {rows} dropped, since no completion has a token that could be scored."
    rest = f" or no scored token ({report.dropped_unscored})" if report.dropped_unscored else ""
    return (
        f"{report.name}: {rows} dropped, since each prompt alone has max_length={report.max_length} tokens or "
        f"more{rest} (the shortest has {min(lengths['prompt_ids'])}); raise max_length."
    )


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    # transformers 5 answers with a BatchEncoding
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return encoded["input_ids"]
