"""Preference rows -> prompt_ids, chosen_ids, rejected_ids: the ids that TRL 1.16 makes of the same rows."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdpo.data.collate import check_truncation
from fastdpo.data.errors import DataError
from fastdpo.data.messages import for_template, from_json

logger = logging.getLogger(__name__)

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# what the collator and the trainer read beside the ids
KEPT_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_PROMPT_CUT = "_prompt_tokens_cut"


@dataclass(frozen=True)
class TokenizeReport:
    """What tokenization kept, dropped and will cut. Counts are rows (pairs); None for a lazy IterableDataset.

    rows: rows that are left.
    dropped_long_prompt: rows dropped because the prompt alone fills `max_length` (keep_start only, as TRL).
    truncated_chosen, truncated_rejected: kept rows whose sequence the collator cuts at `max_length`.
    empty_after_truncation: kept rows in which a completion has no scored token.
    prompt_cut: rows whose prompt ends in tokens that are not a prefix of prompt + completion; these tokens
        are left out (see `tokenize_row`).
    """

    name: str
    rows: int | None
    max_length: int | None
    dropped_long_prompt: int | None = None
    truncated_chosen: int | None = None
    truncated_rejected: int | None = None
    empty_after_truncation: int | None = None
    prompt_cut: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.rows is None:
            return f"{self.name}: streamed, rows are tokenized as they come and not counted"
        if self.max_length is None:
            return f"{self.name}: {self.rows} pairs, no max_length"
        return (
            f"{self.name}: {self.rows} pairs; max_length {self.max_length} cuts {self.truncated_chosen} "
            f"chosen and {self.truncated_rejected} rejected; dropped {self.dropped_long_prompt} whose prompt "
            "alone fills it"
        )


def common_prefix_length(ids: list[int], other: list[int]) -> int:
    """How many leading tokens two sequences share."""
    for length, (token, other_token) in enumerate(zip(ids, other, strict=False)):
        if token != other_token:
            return length
    return min(len(ids), len(other))


def tokenize_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One row of texts, or of lists of messages -> `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Prompt, prompt + chosen and prompt + rejected are tokenized as wholes (messages through the chat template,
    the prompt with the generation prompt; text with the EOS token after the completion). A completion is what
    follows the common prefix of prompt and whole, the shorter of both completions' prefixes, so that tokens
    which merge across the boundary, or a template that renders the last turn otherwise, end up in the
    completions and both completions share `prompt_ids`. This is TRL 1.16's rule
    (`DPOTrainer._prepare_dataset`).

    `tools` (a list, or its JSON text) and `chat_template_kwargs` (a dict, or its JSON text) go to the
    template.
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
            "tools": from_json(row.get("tools")),
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
) -> tuple[Dataset | IterableDataset, TokenizeReport]:
    """Tokenize the rows of `load_preferences` or `normalize_dataset`.

    Returns the dataset with columns `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ints, not truncated:
    the collator truncates), with `ref_chosen_logps` and `ref_rejected_logps` where the rows have them, and a
    report. With `truncation_mode="keep_start"` rows whose prompt alone has `max_length` tokens or more are
    dropped and counted: no completion token of theirs could be scored. A dataset that already has the three
    columns is only filtered. An `IterableDataset` is mapped and filtered lazily.

    Raises `DataError` when the rows need what the tokenizer lacks (a chat template, an EOS token), when a
    column is missing, when the template refuses a row, or when no row is left.
    """
    check_truncation(max_length, truncation_mode)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name}: the dataset has no row.")
    if not set(ID_COLUMNS) <= first.keys():
        _check_tokenizer(first, tokenizer, name)
        options: dict[str, Any] = {
            "with_indices": True,
            "fn_kwargs": {"tokenizer": tokenizer, "name": name},
            "remove_columns": [column for column in first if column not in KEPT_COLUMNS],
        }
        if isinstance(dataset, Dataset):
            # one process more than rows would only start for nothing
            options |= {
                "num_proc": min(num_proc, len(dataset)) if num_proc else None,
                "desc": f"Tokenizing {name}",
            }
        dataset = dataset.map(_tokenize_indexed, **options)
        if isinstance(dataset, IterableDataset):
            dataset = dataset.remove_columns(_PROMPT_CUT)

    limit = max_length if truncation_mode == "keep_start" else None
    if isinstance(dataset, IterableDataset):
        if limit is not None:
            dataset = dataset.filter(_prompt_fits, fn_kwargs={"max_length": limit})
        return dataset, TokenizeReport(name, None, max_length)

    lengths = _lengths(dataset)
    kept = range(len(dataset)) if limit is None else [i for i, n in enumerate(lengths["prompt_ids"]) if n < limit]
    if not kept:
        raise DataError(
            f"{name}: all {len(dataset)} rows were dropped, since each prompt alone has "
            f"max_length={max_length} tokens or more (the shortest has {min(lengths['prompt_ids'])}); raise "
            "max_length."
        )
    report = _count(lengths, kept, max_length, truncation_mode, name)
    if report.prompt_cut:
        logger.warning(
            f"{name}: in {report.prompt_cut} of {len(kept)} rows the prompt alone ends in other tokens than "
            "before its completion (the template renders it otherwise, or tokens merge across the boundary); "
            "the completion starts where they part."
        )
    if len(kept) < len(dataset):
        dataset = dataset.select(kept)
    if _PROMPT_CUT in dataset.column_names:
        dataset = dataset.remove_columns(_PROMPT_CUT)
    return dataset, report


def _tokenize_indexed(row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    try:
        return tokenize_row(row, tokenizer)
    except TemplateError as error:
        raise DataError(f"{name}[{index}]: the chat template refuses this row: {error}") from None


def _prompt_fits(row: dict[str, Any], max_length: int) -> bool:
    return len(row["prompt_ids"]) < max_length


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


def _lengths(dataset: Dataset) -> dict[str, list[int]]:
    """Lengths of the id columns, and the cut tokens, read from Arrow without making Python lists of ids."""
    columns = [column for column in (*ID_COLUMNS, _PROMPT_CUT) if column in dataset.column_names]
    lengths: dict[str, list[int]] = {column: [] for column in columns}
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        for column in columns:
            for chunk in cast("pa.Table", table).column(column).chunks:
                lengths[column] += (chunk if column == _PROMPT_CUT else chunk.value_lengths()).to_pylist()
    return lengths


def _count(
    lengths: dict[str, list[int]],
    kept: Sequence[int],
    max_length: int | None,
    truncation_mode: str,
    name: str,
) -> TokenizeReport:
    truncated = {"chosen_ids": 0, "rejected_ids": 0}
    empty = 0
    for index in kept:
        prompt = lengths["prompt_ids"][index]
        scored = []
        for side in truncated:
            whole = prompt + lengths[side][index]
            over = max(whole - max_length, 0) if max_length is not None else 0
            truncated[side] += over > 0
            prompt_left = prompt if truncation_mode == "keep_start" else max(prompt - over, 0)
            # position 0 has nothing before it that could predict it
            scored.append(whole - over - max(prompt_left, 1))
        empty += min(scored) < 1
    return TokenizeReport(
        name=name,
        rows=len(kept),
        max_length=max_length,
        dropped_long_prompt=len(lengths["prompt_ids"]) - len(kept),
        truncated_chosen=truncated["chosen_ids"],
        truncated_rejected=truncated["rejected_ids"],
        empty_after_truncation=empty,
        prompt_cut=sum(lengths[_PROMPT_CUT][index] > 0 for index in kept) if _PROMPT_CUT in lengths else 0,
    )


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    # transformers 5 answers with a BatchEncoding
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return encoded["input_ids"]
