"""Preference rows -> a dataset of token ids, without the rows that `max_length` leaves nothing of."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from fastdpo.data.bad_rows import settle_bad_rows
from fastdpo.data.collate import check_truncation
from fastdpo.data.errors import DataError, RowError
from fastdpo.data.formats import places_of, warn_unused
from fastdpo.data.limits import Limits, apply_limits, keep_row, measure, none_left
from fastdpo.data.rows.messages import for_template
from fastdpo.data.rows.sides import LABEL, SIDES, id_columns, is_tokenized, mask_columns, sides_of, token_columns
from fastdpo.data.shown import left_out_sentence
from fastdpo.data.template_bounds import check_template
from fastdpo.data.tokenize_report import TokenizeReport
from fastdpo.data.tokenize_row import LEFT_OUT, PROMPT_CUT, SCORED_TURNS, template_options, tokenize_row

__all__ = ["TokenizeReport", "tokenize_dataset"]

logger = logging.getLogger(__name__)

# columns of a tokenized row that go with it no further
_REFUSAL, _SAME = "_refusal", "_same_tokens"


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
    on_overlong: str = "truncate",
    scored_turns: str = "last",
    skip_bad_rows: bool = False,
) -> tuple[Dataset | IterableDataset, TokenizeReport]:
    """Tokenize the rows of `load_preferences` or `normalize_dataset`.

    Returns the dataset with columns `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ints, not truncated:
    the collator truncates), or of unpaired rows `prompt_ids`, `completion_ids`, `label`, and a report. With
    `truncation_mode="keep_start"` rows whose prompt alone has `max_length` tokens or more are dropped and counted: no
    completion token of theirs could be scored. So are other rows that leave nothing to score in either completion. A
    dataset that already has these columns is only checked (lists of ints of 0 or more) and filtered, and keeps its
    columns that are named in `keep`. An `IterableDataset` is mapped, checked and filtered lazily.

    Before all that, prompts are cut from the left to `max_prompt_length` tokens and completions from the right to
    `max_completion_length` (as TRL up to 0.28); kept rows that lost tokens are counted. `tools`: see `tokenize_row`.

    on_overlong: of a pair with a sequence longer than `max_length`, "truncate" leaves the cutting to the collator,
    "drop" leaves the pair out and counts it, "error" raises `DataError` with the first of such rows and their lengths.

    scored_turns: see `tokenize_row`; "all" adds `prompt_mask`, `chosen_mask`, `rejected_mask` (lists of 0 and 1, as
    long as the ids, not truncated) to rows of messages. A tokenized dataset may bring all three.

    skip_bad_rows: rows that the chat template refuses, or of which it shows nothing of a turn, are left out and named;
    else they raise, all of them named. What else a template leaves out of rows is counted and said (`report.left_out`).

    Raises `DataError` when the rows need what the tokenizer lacks (a chat template, an EOS token), when a
    column is missing, when the template refuses a row, when given ids or masks are none, or when no row is left.
    """
    check_truncation(max_length, truncation_mode)
    if scored_turns not in SCORED_TURNS:
        raise ValueError(f"scored_turns is {scored_turns!r}; wanted one of {', '.join(SCORED_TURNS)}.")
    limits = Limits(max_length, truncation_mode, max_prompt_length, max_completion_length, on_overlong)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name}: the dataset has no row.")
    tokenized = is_tokenized(first)
    left_out: tuple[str, ...] = ()
    if tokenized:
        warn_unused(set(first).difference(keep), name)
        columns = token_columns(first)
        if LABEL in columns and LABEL not in first:
            raise DataError(f"{name}: missing column `{LABEL}`; found {', '.join(first)}.")
        if isinstance(dataset, IterableDataset):
            dataset = dataset.map(_check_row, with_indices=True, fn_kwargs={"name": name})
        else:
            _check_rows(dataset, name)
    else:
        _check_tokenizer(first, tokenizer, name, tools)
        masked = scored_turns == "all" and not isinstance(first["prompt"], str)
        masks = mask_columns(first) if masked else []
        columns = token_columns([*id_columns(first), *masks])
        if isinstance(dataset, Dataset):
            dataset, left_out = tokenize_rows(dataset, tokenizer, name, tools, scored_turns, num_proc, skip_bad_rows)
        else:
            options = {"tokenizer": tokenizer, "tools": tools, "scored_turns": scored_turns}
            dataset = dataset.map(_tokenize_row, fn_kwargs=options, remove_columns=_read(first))
            stream = {"name": name, "skip_bad_rows": skip_bad_rows}
            dataset = dataset.filter(_usable, with_indices=True, fn_kwargs=stream)

    if scored_turns == "all" and not set(mask_columns(columns)) <= set(columns):
        what = "tokenized already, without masks" if tokenized else "texts, which have no turns"
        logger.warning(f"{name}: scored_turns='all' changes nothing: the rows are {what}.")
    columns += [column for column in keep if tokenized and column in first]
    if isinstance(dataset, IterableDataset):
        if limits.shortens:
            dataset = dataset.map(limits.shorten)
        dataset = dataset.select_columns(columns)
        dataset = dataset.filter(keep_row, with_indices=True, fn_kwargs={"limits": limits, "name": name})
        return dataset, TokenizeReport(name, None, max_length)

    lengths = measure(dataset)
    kept, report = apply_limits(lengths, limits, name)
    report = replace(report, left_out=left_out)
    for sentence in left_out:
        logger.warning(f"{name}: {sentence}.")
    if not len(kept):
        raise DataError(none_left(lengths, report))
    if report.prompt_cut:
        logger.warning(
            f"{name}: in {report.prompt_cut} of {len(kept)} rows the prompt alone ends in other tokens than "
            "before its completion (the template renders it otherwise, or tokens merge across the boundary); "
            "the completion starts where they part."
        )
    if len(kept) < len(dataset):
        dataset = dataset.select(kept)
    if any(
        (report.shortened_prompts, report.shortened_chosen, report.shortened_rejected, report.shortened_completions)
    ):
        dataset = dataset.map(limits.shorten, desc=f"Shortening {name}")
    return dataset.select_columns(columns), report


def tokenize_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tools: str | None = None,
    scored_turns: str = "last",
    num_proc: int | None = None,
    skip_bad_rows: bool = False,
) -> tuple[Dataset, tuple[str, ...]]:
    """Every row that can be used, and what the chat template leaves out of them, a sentence each.

    Raises:
        DataError: with all rows that cannot, unless they are skipped.
    """
    tokenized = dataset.map(
        _tokenize_row,
        fn_kwargs={"tokenizer": tokenizer, "tools": tools, "scored_turns": scored_turns},
        remove_columns=_read(dataset.column_names),
        # one process more than rows would only start for nothing
        num_proc=min(num_proc, len(dataset)) if num_proc else None,
        desc=f"Tokenizing {name}",
    )
    return _usable_rows(tokenized, name, places_of(dataset, name), skip_bad_rows)


def _read(columns: Iterable[str]) -> list[str]:
    """Of the columns those that tokenization takes the place of."""
    return [column for column in columns if column != LABEL]


def _tokenize_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tools: str | None, scored_turns: str
) -> dict[str, Any]:
    """As `tokenize_row`, with columns for why a row cannot be used, and whether its two answers became one."""
    try:
        columns = tokenize_row(row, tokenizer, tools, scored_turns)
        same = (
            sides_of(row) == SIDES
            and columns["chosen_ids"] == columns["rejected_ids"]
            and row["chosen"] != row["rejected"]
        )
        return {**columns, _REFUSAL: "", _SAME: same}
    except TemplateSyntaxError as error:
        reason = str(error.message).split(". ")[0].rstrip(".")
        raise DataError(f"the tokenizer's chat template is not valid: line {error.lineno}: {reason}.") from None
    except TemplateError as error:
        refusal = f"the chat template refuses this row: {error}"
    except RowError as error:
        refusal = str(error)
    masks = mask_columns(row) if scored_turns == "all" and not isinstance(row["prompt"], str) else ()
    empty = {name: [] for name in (*id_columns(row), *masks)}
    return {**empty, PROMPT_CUT: 0, LEFT_OUT: "", _REFUSAL: refusal, _SAME: False}


def _usable_rows(
    dataset: Dataset, name: str, places: list[str], skip_bad_rows: bool
) -> tuple[Dataset, tuple[str, ...]]:
    """The rows that can be used, and what the template leaves out of them, a sentence each.

    Raises:
        DataError: with all rows that cannot, unless they are skipped.
    """
    columns = dataset.select_columns([_REFUSAL, LEFT_OUT, _SAME])[:]
    bad = [(places[index], refusal) for index, refusal in enumerate(columns[_REFUSAL]) if refusal]
    settle_bad_rows(name, bad, len(dataset) - len(bad), skip_bad_rows)
    rows: dict[str, list[int]] = {}
    same: list[int] = []
    for index, left_out in enumerate(columns[LEFT_OUT]):
        for what in left_out.split("\n") if left_out else ():
            rows.setdefault(what, []).append(index)
        same += [index] if columns[_SAME][index] else []
    total = len(dataset) - len(bad)
    sentences = []
    for what, indices in rows.items():
        role, field = what.split(" ", 1)
        sentences.append(left_out_sentence(role, field, len(indices), total, places[indices[0]]))
    if same:
        sentences.append(
            f"chosen and rejected differ in {len(same)} of {total} rows and are the same tokens there (the first: "
            f"{places[same[0]]}): the chat template leaves out what is different, and they teach nothing"
        )
    if bad:
        dataset = dataset.select([index for index, refusal in enumerate(columns[_REFUSAL]) if not refusal])
    return dataset.remove_columns([_REFUSAL, LEFT_OUT, _SAME]), tuple(sentences)


def _usable(row: dict[str, Any], index: int, name: str, skip_bad_rows: bool) -> bool:
    """Whether a stream's row can be used. Raises `DataError` where it must be."""
    if row[_REFUSAL]:
        settle_bad_rows(name, [(f"{name}[{index}]", row[_REFUSAL])], int(skip_bad_rows), skip_bad_rows)
    return not row[_REFUSAL]


def _check_tokenizer(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str, tools: str | None = None
) -> None:
    sides = sides_of(row)
    missing = [column for column in ("prompt", *sides) if column not in row]
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
            f"tokenizer.chat_template, use the tokenizer of a chat model, or give {', '.join(('prompt', *sides[:-1]))} "
            f"and {sides[-1]} as text."
        )
    else:
        prompt, *answers = (for_template(row[part]) for part in ("prompt", *sides))
        renders = [(prompt, True), *((prompt + answer, False) for answer in answers)]
        check_template(tokenizer, renders, template_options(row, tools), f"{name}[0]")


def _check_rows(dataset: Dataset, name: str) -> None:
    """Raise `DataError` for the first row whose ids or masks are none, without making Python lists of ids."""
    names = dataset.column_names
    ids_columns, masks = id_columns(names), [mask for mask in mask_columns(names) if mask in token_columns(names)]
    columns = [*ids_columns, *masks]
    done = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        chunks: dict[str, Any] = {column: cast("pa.Table", table).column(column).combine_chunks() for column in columns}
        for column, chunk in chunks.items():
            bad = _first_bad_list(chunk)
            if bad is not None:
                raise DataError(_bad_ids(name, done + bad, column))
        for ids, mask in zip(ids_columns, masks, strict=False):
            lengths = [pc.call_function("list_value_length", [chunks[column]]) for column in (ids, mask)]
            same = pc.call_function("all", [pc.call_function("equal", lengths)]).as_py()
            if not same or (pc.call_function("max", [chunks[mask].flatten()]).as_py() or 0) > 1:
                rows = zip(chunks[ids].to_pylist(), chunks[mask].to_pylist(), strict=True)
                bad = next(i for i, (tokens, marks) in enumerate(rows) if not _marks(marks, tokens))
                raise DataError(_bad_mask(name, done + bad, mask, ids))
        done += cast("pa.Table", table).num_rows


def _first_bad_list(chunk: Any) -> int | None:
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


def _check_row(row: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    """The same for one row of a stream."""
    lists = {}
    names = [column for column in token_columns(row) if column != LABEL]
    for column in names:
        ids: Any = row.get(column)
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # a stream formatted as numpy or torch
        if not isinstance(ids, list) or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise DataError(_bad_ids(name, index, column))
        lists[column] = ids
    for ids, mask in zip(id_columns(row), mask_columns(row), strict=True):
        if mask in lists and not _marks(lists[mask], lists[ids]):
            raise DataError(_bad_mask(name, index, mask, ids))
    return row


def _marks(mask: list[int], ids: list[int]) -> bool:
    return len(mask) == len(ids) and max(mask, default=0) <= 1


def _bad_ids(name: str, index: int, column: str) -> str:
    what = "token ids" if column.endswith("_ids") else "marks"
    return f"{name}[{index}]: `{column}` is not a list of {what}; wanted integers of 0 or more."


def _bad_mask(name: str, index: int, mask: str, ids: str) -> str:
    return f"{name}[{index}]: `{mask}` does not mark `{ids}`; wanted 0 or 1 for each of its tokens."
