"""Datasets as the trainer takes them -> tokenized, counted, with the columns that samplers read."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PreTrainedTokenizerBase

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import REFERENCE_COLUMNS, UNPAIRED_REFERENCE_COLUMNS, DataCollatorForPreference
from fastdpo.data.findings import balance_findings, repeated_pairs, special_token_findings, template_findings
from fastdpo.data.formats import normalize_dataset
from fastdpo.data.limits import measure
from fastdpo.data.rows.sides import LABEL, MISMATCHED, UNPAIRED, id_columns, is_tokenized, sides_of
from fastdpo.data.tokenize_dataset import TokenizeReport, tokenize_dataset
from fastdpo.losses.unpaired import UNPAIRED_LOSSES
from fastdpo.models.load import check_token_ids
from fastdpo.training.unpaired_rows import as_unpaired, with_mismatched
from fastdpo.wording import count

logger = logging.getLogger(__name__)

PairDataset = Dataset | IterableDataset


def prepare_all(
    datasets: Any, name: str, tokenizer: PreTrainedTokenizerBase, args: DPOConfig, reports: dict[str, TokenizeReport]
) -> Any:
    """A dataset, or each of a dict of them under its key, tokenized, with its entry in `reports`; None stays None.

    Raises:
        TypeError, ValueError, DataError: as `prepare`.
    """
    if datasets is None:
        return None
    if isinstance(datasets, dict):
        return {key: prepare_all(each, key, tokenizer, args, reports) for key, each in datasets.items()}
    dataset, reports[name] = prepare(datasets, name, tokenizer, args)
    return dataset


def collator_for(tokenizer: PreTrainedTokenizerBase, args: DPOConfig) -> DataCollatorForPreference:
    """The one that a trainer takes where it was given none."""
    return DataCollatorForPreference(
        pad_token_id=cast(int, tokenizer.pad_token_id),
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        pad_to_multiple_of=cast("int | None", args.pad_to_multiple_of),
    )


def check_all_token_ids(train: Any, evaluation: Any, embedded: int) -> None:
    """Refuse rows, tokenized elsewhere, that a model of `embedded` tokens cannot read. Raises ValueError."""
    evals = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for name, dataset in {"train_dataset": train, **evals}.items():
        check_token_ids(dataset, embedded, name)


def by_name(train: Any, evaluation: Any) -> dict[str, Any]:
    """Datasets as Trainer takes them -> "train", and "eval" or "eval-KEY" for each of several; those that are there."""
    several = isinstance(evaluation, dict)
    evals = {f"eval-{key}": data for key, data in evaluation.items()} if several else {"eval": evaluation}
    return {name: data for name, data in {"train": train, **evals}.items() if data is not None}


def prepare(
    dataset: PairDataset, name: str, tokenizer: PreTrainedTokenizerBase, args: DPOConfig
) -> tuple[PairDataset, TokenizeReport]:
    """Normalize and tokenize; what was dropped or will be cut is logged.

    Raises:
        TypeError, ValueError, DataError: not a dataset, a stream to precompute for, or rows that are no pairs.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"{name} dataset must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}.")
    if args.precompute_ref_log_probs and not isinstance(dataset, Dataset):
        raise ValueError(
            f"precompute_ref_log_probs needs the {name} dataset as a datasets.Dataset, got {type(dataset).__name__}; "
            "load it whole, or leave precompute_ref_log_probs out."
        )
    with dataset_bars(shown=not args.disable_tqdm):
        dataset = normalize_dataset(dataset, skip_bad_rows=args.skip_bad_rows, where=f"{name}_dataset")
        first = next(iter(dataset), {})
        if args.unpaired:
            dataset = as_unpaired(dataset, name)
        elif sides_of(first) == UNPAIRED:
            raise ValueError(
                f"{name} dataset: the rows are single answers with a label, and the loss {', '.join(args.loss_type)} "
                f"compares pairs; take loss_type {', '.join(UNPAIRED_LOSSES)}, or rows with chosen and rejected."
            )
        columns = dataset.column_names or list(first)
        dataset, report = tokenize_dataset(
            dataset,
            tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            name=name,
            # log-probs that came with the data are used where they are asked for
            keep=_kept(columns, args),
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            tools=cast("str | None", args.tools),
            on_overlong=args.on_overlong,
            scored_turns=args.scored_turns,
            skip_bad_rows=args.skip_bad_rows,
        )
        if args.estimates_kl:
            dataset = with_mismatched(dataset, args.per_device_train_batch_size)
    _warn_of_findings(first, dataset, tokenizer, name)
    if args.unpaired and name == "train" and isinstance(dataset, Dataset):
        for sentence in balance_findings(dataset[LABEL], args):
            logger.warning(f"{name}: {sentence}")
    lost = (
        report.dropped_overlong,
        report.dropped_long_prompt,
        report.dropped_unscored,
        report.truncated_chosen,
        report.truncated_rejected,
        report.empty_after_truncation,
        report.shortened_prompts,
        report.shortened_chosen,
        report.shortened_rejected,
        report.truncated_completions,
        report.shortened_completions,
    )
    logger.log(logging.WARNING if any(lost) else logging.INFO, str(report))
    strategy = getattr(args, "train_sampling_strategy", "random")
    by_length = strategy in ("group_by_length", "batch_rebalance") or getattr(args, "group_by_length", False)
    if by_length and isinstance(dataset, Dataset) and args.length_column_name not in dataset.column_names:
        # Trainer would look for input_ids; a pair is padded to its longer side
        sizes = measure(dataset)
        lengths = np.minimum(sizes.prompt + sizes.longer, args.max_length or sys.maxsize)
        dataset = dataset.add_column(args.length_column_name, cast(Any, lengths.tolist()))
    return dataset, report


def _kept(columns: Sequence[str], args: DPOConfig) -> list[str]:
    """Of a tokenized dataset what is used beside its tokens: log-probs that came with the data, where they are asked
    for, and mismatched completions."""
    precomputed = (*REFERENCE_COLUMNS, *UNPAIRED_REFERENCE_COLUMNS) if args.precompute_ref_log_probs else ()
    return [name for name in columns if name in precomputed or (args.unpaired and name.startswith(MISMATCHED))]


def _warn_of_findings(row: dict[str, Any], pairs: PairDataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """One warning for each thing that looks wrong; row: the first one as it was given. Of a stream one pair is read."""
    if not isinstance(pairs, Dataset):
        one = next(iter(pairs), None)
        if one is None:
            return
        pairs = Dataset.from_list([{column: one[column] for column in id_columns(one)}])
    findings = special_token_findings(pairs, tokenizer)
    given_ids = is_tokenized(row)
    if not given_ids and name == "train":
        findings += template_findings(row, tokenizer)
    identical, duplicated = repeated_pairs(pairs)
    if identical and given_ids:  # of texts and messages it was said before they were tokenized
        findings.append(
            f"chosen and rejected are identical in {identical} of {count(len(pairs), 'row')}; they teach nothing."
        )
    if duplicated:
        findings.append(f"{duplicated} of {count(len(pairs), 'row')} are the same as an earlier one; they are kept.")
    for sentence in findings:
        logger.warning(f"{name}: {sentence}")


@contextmanager
def dataset_bars(shown: bool) -> Iterator[None]:
    """Inside it `datasets`, which knows nothing of `disable_tqdm`, shows bars only if `shown`; afterwards as before."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
