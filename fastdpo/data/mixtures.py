"""Several datasets as one, parts of datasets, and the pairs that are split off for evaluation."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from fastdpo.data.data_files import DataFiles
from fastdpo.data.errors import DataError
from fastdpo.data.formats import load_preferences, mark_normalized, stream_preferences
from fastdpo.data.rows.sides import LABEL
from fastdpo.wording import count, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of a mixture, under TRL's names (`DatasetConfig`).

    path: whatever `load_preferences` takes; also json, csv or parquet with `data_files` or `data_dir`.
    name: configuration of a hub dataset. columns: those that are kept (a list, as in TRL), or our name -> the file's
    name or names (a mapping; the first that a row has). fraction: the share in the mixture (see `mix`). rate: the share
    of the dataset's own rows that is taken, as `data_scale_rate` of all datasets.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: DataFiles | None = None
    split: str = "train"
    columns: list[str] | dict[str, str | list[str]] | None = None
    fraction: float | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        """What messages call it: its files, where the path only says of what type they are."""
        files = self.data_files
        if isinstance(files, Mapping):
            files = files.get(self.split)
        return self.path if not files else files if isinstance(files, str) else ", ".join(files)


def parse_mixture(items: Any, where: str = "datasets") -> list[DatasetSpec]:
    """TRL's `datasets:` list. Raises `DataError` with the place and the key."""
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise DataError(f"{where} should be a list of datasets, each with a `path`, got {items!r}.")
    return [_parse_spec(item, f"{where}[{index}]") for index, item in enumerate(items)]


def _parse_spec(item: Any, place: str) -> DatasetSpec:
    names = [field.name for field in fields(DatasetSpec)]
    if not isinstance(item, Mapping):
        raise DataError(f"{place} is {type(item).__name__}; wanted keys {', '.join(names)}.")
    unknown = next((key for key in item if key not in names), None)
    if unknown is not None:
        hint = did_you_mean(unknown, names, "`") or f"wanted {', '.join(names)}."
        raise DataError(f"{place} has the unknown key `{unknown}`; {hint}")
    options = {key: value for key, value in item.items() if value is not None}
    if "path" not in options:
        raise DataError(f"{place} has no `path`.")
    for key in ("path", "name", "data_dir", "split"):
        if not isinstance(options.get(key, ""), str):
            raise DataError(f"{place}: {key} is {type(options[key]).__name__}; wanted text.")
    files = options.get("data_files", "")
    named = list(files.values()) if isinstance(files, Mapping) else [files]
    if not all(_is_texts(value) or isinstance(value, str) for value in named):
        raise DataError(f"{place}: data_files is {files!r}; wanted a file, a list of files, or one for each split.")
    columns = options.get("columns", [])
    if isinstance(columns, Mapping):
        columns = [name for names in columns.values() for name in (names if isinstance(names, list) else [names])]
    if not _is_texts(columns):
        raise DataError(
            f"{place}: columns is {options['columns']!r}; wanted a list of names, or our names with the file's."
        )
    fraction = options.get("fraction", 1.0)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < math.inf:
        raise DataError(f"{place}: fraction is {fraction!r}; wanted a number above 0.")
    rate = options.get("rate", 1.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise DataError(f"{place}: rate is {rate!r}; wanted a share in (0, 1].")
    return DatasetSpec(**options)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def names_of(dataset_name: str, dataset_dir: str | None = None) -> list[str]:
    """The datasets that one argument names: separated by commas, unless a file or folder is called just so."""
    base = Path(dataset_dir).expanduser() if dataset_dir else Path()
    if Path(dataset_name).expanduser().exists() or (base / dataset_name).exists():
        return [dataset_name]
    names = [name.strip() for name in dataset_name.split(",")]
    if not all(names):
        raise DataError(f"{dataset_name!r} names a dataset of no name: leave out the comma too many.")
    return names


def load_mixture(
    specs: Sequence[DatasetSpec],
    *,
    dataset_dir: str | None = None,
    skip_bad_rows: bool = False,
    data_scale_rate: float = 1.0,
    max_samples: int | None = None,
    seed: int = 42,
) -> Dataset:
    """Load, cut and concatenate; columns as `load_preferences`.

    Of each dataset a random `data_scale_rate` of the rows is taken (without repeats; `int(rate * rows)` of them, drawn
    with `seed`), of these the first `max_samples` (LLaMA-Factory's rule), of these what `fraction` leaves.

    Raises `DataError`, as `load_preferences` does; for numbers that leave no row; for datasets that do not mix.
    """
    if not 0 < data_scale_rate <= 1:
        raise DataError(f"data_scale_rate should be a share in (0, 1], got {data_scale_rate}.")
    if max_samples is not None and max_samples < 1:
        raise DataError(f"max_samples should be at least 1, got {max_samples}.")
    parts = []
    for spec in specs:
        part = load_preferences(
            spec.path,
            split=spec.split,
            config=spec.name,
            dataset_dir=dataset_dir,
            data_dir=spec.data_dir,
            data_files=spec.data_files,
            columns=spec.columns,
            skip_bad_rows=skip_bad_rows,
        )
        rows = len(part)
        rate = data_scale_rate * (spec.rate or 1)
        if rate < 1:
            taken = int(rows * rate)
            if not taken:
                name = "rate" if spec.rate else "data_scale_rate"
                raise DataError(f"{spec.label}: {name} {rate:g} of {count(rows, 'row')} is none.")
            part = _taken(part, np.random.default_rng(seed).permutation(rows)[:taken])
        if max_samples is not None and max_samples < len(part):
            part = _taken(part, range(max_samples))
        if len(part) < rows:
            logger.info(f"{spec.label}: {len(part)} of {count(rows, 'row')} are used.")
        parts.append(part)
    return mix(parts, specs)


def _taken(dataset: Dataset, rows: Any) -> Dataset:
    return mark_normalized(dataset.select(rows), dataset)


def mix(parts: Sequence[Dataset], specs: Sequence[DatasetSpec]) -> Dataset:
    """One dataset of several, in their order.

    With fractions (all have one) the mixture has these shares and is as large as it can be without taking a row twice:
    the first `round(share * total)` rows of each, which is TRL's rule. Raises `DataError` for datasets that do not mix.
    """
    shares = _shares(specs)
    if shares is not None:
        total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        taken = [round(float(share) * total) for share in shares]
        if not all(taken):
            empty = specs[taken.index(0)].label
            raise DataError(f"{empty}: its fraction of the {round(total)} rows that the mixture can have is none.")
        said = ", ".join(
            f"{n} of {len(part)} of {spec.label}" for n, part, spec in zip(taken, parts, specs, strict=True)
        )
        logger.info(f"mixture: {said}.")
        parts = [_taken(part, range(n)) for n, part in zip(taken, parts, strict=True)]
    if len(parts) == 1:
        return parts[0]
    single = [LABEL in part.column_names for part in parts]
    texts = [isinstance(part[0]["prompt"], str) for part in parts]
    for kinds, first, second in ((single, "single answers", "pairs"), (texts, "plain text", "messages")):
        if len(set(kinds)) > 1:
            labels = (specs[kinds.index(True)].label, specs[kinds.index(False)].label)
            raise DataError(f"{labels[0]} has rows of {first} and {labels[1]} of {second}; wanted one kind.")
    return joined(parts)


def joined(parts: Sequence[Dataset]) -> Dataset:
    """Normalized datasets of one kind of rows, one after another."""
    if all(part.features == parts[0].features for part in parts):
        return mark_normalized(concatenate_datasets(list(parts)), *parts)
    # messages with other keys are of another type: Arrow finds one that has all of them
    columns = dict.fromkeys(name for part in parts for name in part.column_names)
    rows = [{name: row.get(name) for name in columns} for part in parts for row in cast("Any", part)]
    present = [name for name in columns if any(row[name] is not None for row in rows)]
    return mark_normalized(Dataset.from_dict({name: [row[name] for row in rows] for name in present}), *parts)


def stream_mixture(
    specs: Sequence[DatasetSpec],
    *,
    dataset_dir: str | None = None,
    skip_bad_rows: bool = False,
    max_samples: int | None = None,
    seed: int = 42,
) -> IterableDataset:
    """The datasets as one stream (`stream_preferences`): one after another, or with fractions drawn in these shares
    until one of them ends. max_samples: the first rows of each. Raises `DataError`."""
    parts = []
    for spec in specs:
        options = {field.name: getattr(spec, field.name) for field in fields(spec)}
        del options["fraction"]
        if options.pop("rate"):
            raise DataError(f"{spec.label}: rate needs all of the rows, and a stream has none yet: leave it out.")
        part = stream_preferences(
            options.pop("path"),
            config=options.pop("name"),
            dataset_dir=dataset_dir,
            skip_bad_rows=skip_bad_rows,
            **options,
        )
        parts.append(part if max_samples is None else part.take(max_samples))
    shares = _shares(specs)
    if shares is not None:
        return interleave_datasets(parts, probabilities=shares.tolist(), seed=seed)
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _shares(specs: Sequence[DatasetSpec]) -> "np.ndarray | None":
    """The fractions, of 1 in all; None where no dataset has one. Raises `DataError` where only some have."""
    fractions = [spec.fraction for spec in specs]
    if all(fraction is None for fraction in fractions):
        return None
    without = next((spec.label for spec in specs if spec.fraction is None), None)
    if without is not None:
        raise DataError(f"{without} has no fraction, and other datasets have: give all of them one, or none.")
    return np.array(fractions, dtype=float) / sum(cast("list[float]", fractions))


def split_off(dataset: Dataset, size: float, seed: int = 42) -> tuple[Dataset, Dataset]:
    """What is left, and what is for evaluation: a share below 1 of the rows, or a number of them, drawn with `seed`
    (`datasets.train_test_split`, as TRL and LLaMA-Factory). Raises `DataError` where nothing would be left."""
    if not size > 0 or (size >= 1 and size != int(size)):
        raise DataError(f"test_split_size should be a share below 1 or a number of rows, got {size:g}.")
    rows = math.ceil(size * len(dataset)) if size < 1 else int(size)
    if rows >= len(dataset):
        raise DataError(
            f"test_split_size {size:g} is {count(rows, 'row')} of {len(dataset)}, which leaves none to train on."
        )
    parts = dataset.train_test_split(test_size=rows, seed=seed)
    return mark_normalized(parts["train"], dataset), mark_normalized(parts["test"], dataset)
