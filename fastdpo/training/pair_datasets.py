"""Datasets of pairs as the trainer takes them -> tokenized, counted, with the columns that samplers read."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PreTrainedTokenizerBase

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import REFERENCE_COLUMNS, DataCollatorForPreference
from fastdpo.data.findings import repeated_pairs, special_token_findings, template_findings
from fastdpo.data.formats import normalize_dataset
from fastdpo.data.limits import measure
from fastdpo.data.tokenize_dataset import ID_COLUMNS, TokenizeReport, tokenize_dataset
from fastdpo.models.load import check_token_ids
from fastdpo.wording import count

logger = logging.getLogger(__name__)

PairDataset = Dataset | IterableDataset


class PairDatasets:
    """The datasets of a trainer, tokenized one after another.

    Attributes:
        train, evaluation: as Trainer takes them; `evaluation` may be a dict.
        reports: what tokenization did to each, by name ("train", "eval", or the key in the dict).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: DPOConfig, train: Any, evaluation: Any) -> None:
        """Raises TypeError, ValueError, DataError as `prepare_dataset`."""
        self.tokenizer, self.args = tokenizer, args
        self.reports: dict[str, TokenizeReport] = {}
        several = isinstance(evaluation, dict)
        self._before = {"train_dataset": train, **(evaluation if several else {"eval_dataset": evaluation})}
        self.train = None if train is None else self.prepare(train, "train")
        self.evaluation: Any = None
        if several:
            self.evaluation = {name: self.prepare(dataset, name) for name, dataset in evaluation.items()}
        elif evaluation is not None:
            self.evaluation = self.prepare(evaluation, "eval")

    def prepare(self, dataset: PairDataset, name: str) -> PairDataset:
        """One more dataset, tokenized."""
        with dataset_bars(shown=not self.args.disable_tqdm):
            dataset, self.reports[name] = prepare_dataset(dataset, self.tokenizer, self.args, name)
        return dataset

    def collator(self) -> DataCollatorForPreference:
        """The one that a trainer takes where it was given none."""
        return DataCollatorForPreference(
            pad_token_id=cast(int, self.tokenizer.pad_token_id),
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            pad_to_multiple_of=cast("int | None", self.args.pad_to_multiple_of),
        )

    def check_token_ids(self, embedded: int) -> None:
        """Refuse rows, tokenized elsewhere, that a model of `embedded` tokens cannot read. Raises ValueError."""
        for name, dataset in self._before.items():
            check_token_ids(dataset, embedded, name)

    def all(self) -> list[PairDataset]:
        """Of training, then of evaluation."""
        return list(by_name(self.train, self.evaluation).values())


def by_name(train: Any, evaluation: Any) -> dict[str, Any]:
    """Datasets as Trainer takes them -> "train", and "eval" or "eval-KEY" for each of several; those that are there."""
    several = isinstance(evaluation, dict)
    evals = {f"eval-{key}": data for key, data in evaluation.items()} if several else {"eval": evaluation}
    return {name: data for name, data in {"train": train, **evals}.items() if data is not None}


def prepare_dataset(
    dataset: PairDataset, tokenizer: PreTrainedTokenizerBase, args: DPOConfig, name: str
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
    dataset = normalize_dataset(dataset, skip_bad_rows=args.skip_bad_rows, where=f"{name}_dataset")
    first = next(iter(dataset), {})
    dataset, report = tokenize_dataset(
        dataset,
        tokenizer,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        num_proc=args.dataset_num_proc,
        name=name,
        # log-probs that came with the data are used where they are asked for
        keep=REFERENCE_COLUMNS if args.precompute_ref_log_probs else (),
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        tools=cast("str | None", args.tools),
        on_overlong=args.on_overlong,
        scored_turns=args.scored_turns,
    )
    _warn_of_findings(first, dataset, tokenizer, name)
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
    )
    logger.log(logging.WARNING if any(lost) else logging.INFO, str(report))
    strategy = getattr(args, "train_sampling_strategy", "random")
    by_length = strategy in ("group_by_length", "batch_rebalance") or getattr(args, "group_by_length", False)
    if by_length and isinstance(dataset, Dataset) and args.length_column_name not in dataset.column_names:
        # Trainer would look for input_ids; a pair is padded to its longer side
        sizes = measure(dataset)
        lengths = np.minimum(sizes.prompt + np.maximum(*sizes.completions), args.max_length or sys.maxsize)
        dataset = dataset.add_column(args.length_column_name, cast(Any, lengths.tolist()))
    return dataset, report


def _warn_of_findings(row: dict[str, Any], pairs: PairDataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """One warning for each thing that looks wrong; row: the first one as it was given. Of a stream one pair is read."""
    if not isinstance(pairs, Dataset):
        one = next(iter(pairs), None)
        if one is None:
            return
        pairs = Dataset.from_list([{column: one[column] for column in ID_COLUMNS}])
    findings = special_token_findings(pairs, tokenizer)
    given_ids = set(ID_COLUMNS) <= row.keys()
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
