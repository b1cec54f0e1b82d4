"""Rows of any source and format -> a dataset of preference rows, with bad rows named by file and line."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from fastdpo.data.arrow_rows import arrow_rows
from fastdpo.data.bad_rows import settle_bad_rows
from fastdpo.data.data_files import BUILDERS, DataFiles, open_data_files, with_columns
from fastdpo.data.errors import DataError, RowError
from fastdpo.data.rows.llama_factory import Columns
from fastdpo.data.rows.messages import pack_messages, parse_template_options, to_json
from fastdpo.data.rows.notes import Note, Notes
from fastdpo.data.rows.preference import Preference, Unpaired, preference_from_row
from fastdpo.data.rows.sides import LABEL, SIDES, UNPAIRED, is_tokenized, sides_of
from fastdpo.data.sources import PlacedRow, Source, dataset_rows, open_source
from fastdpo.wording import count

__all__ = ["DataError", "Preference", "Unpaired", "load_preferences", "normalize_dataset", "preference_from_row"]

logger = logging.getLogger(__name__)

_OPTIONS = ("tools", "chat_template_kwargs")
# reference log-probs computed elsewhere, as TRL's rows may have them; the trainer computes its own
_UNUSED = ("ref_chosen_logps", "ref_rejected_logps")
# The mark of a dataset whose rows are pairs already: its fingerprint, kept beside it. `datasets` gives the result of an
# operation a fingerprint of its own, and a dataset that is formatted in place too, so the mark holds for exactly these
# rows: whatever a caller makes of them is looked at again. Copies keep it; a dataset that is saved and loaded has none.
_MARK = "_fastdpo_normalized"
# beside it, where each row of the table came from (`pairs.jsonl:4`), also those that a selection leaves out
_PLACES = "_fastdpo_places"


def load_preferences(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    dataset_dir: str | None = None,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    columns: list[str] | Mapping[str, str | list[str]] | None = None,
    skip_bad_rows: bool = False,
    seed: int = 42,
) -> Dataset:
    """Load preference rows; columns `prompt`, `chosen`, `rejected` (text, or lists of messages), or of unpaired rows
    `prompt`, `completion`, `label` (bool).

    `tools` and `chat_template_kwargs` (as JSON text) are kept where rows have them; other columns are left out. A value
    of a message that is no text is stored as text too: `rows.messages.for_template` opens it.
    Reference log-probs in the rows (`ref_chosen_logps`, `ref_rejected_logps`) are not used: a warning says so.

    `source` is a file (json: an array or one row per line, jsonl, csv, parquet), a `save_to_disk` folder, a
    folder with a dataset_info.json of one preference entry, an entry's name with `dataset_dir`, or a
    dataset's name on the hub. Rows may be in any format of `preference_from_row`. `data_dir` and `data_files` are
    those of `datasets.load_dataset`, whose `path` is then the source (json, csv, parquet, a folder or a hub name).

    columns: the row's columns that are looked at (a list), or our name -> the row's name (a mapping), such as
    {"prompt": "question"}. seed: draws the rows where a dataset_info.json entry has `num_samples`.

    Raises `DataError` that lists every bad row; with `skip_bad_rows` it warns and goes on without them.
    """
    opened = _open(source, split, config, dataset_dir, data_dir, data_files, columns)
    dataset = _build(opened.rows, opened.name, opened.columns, skip_bad_rows)
    return _sample(dataset, opened.num_samples, opened.name, seed)


def stream_preferences(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    dataset_dir: str | None = None,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    columns: list[str] | Mapping[str, str | list[str]] | None = None,
    skip_bad_rows: bool = False,
) -> IterableDataset:
    """As `load_preferences`, with rows that are read when they are asked for, in every epoch again.

    A bad row raises `DataError` with its file and line when it is reached, or is left out with a warning. All of a
    json array is in memory, and one line of other files.
    """
    where = {"split": split, "config": config, "data_dir": data_dir}
    options = {**where, "dataset_dir": dataset_dir, "data_files": data_files, "columns": columns}
    stream = {"source": source, "options": options, "skip_bad_rows": skip_bad_rows}
    # features are known before a row is read: each is read once, and not for its columns
    first = next(_streamed(**stream), None)
    if first is None:
        raise DataError(f"{source} is empty; wanted preference rows with `prompt`, `chosen` and `rejected`.")
    dataset = IterableDataset.from_generator(_streamed, gen_kwargs=stream)
    return dataset.select_columns(list(first))


def _streamed(source: str, options: dict[str, Any], skip_bad_rows: bool) -> Iterator[dict[str, Any]]:
    notes, skipped, sides = Notes(), 0, None
    opened = _open(source, **options)
    for place, value in opened.rows:
        try:
            if isinstance(value, RowError):
                raise value
            stored, row_notes = _stored(value, opened.columns)
            sides = sides or sides_of(stored)
            _refuse_other_kind(stored, sides)
        except RowError as error:
            if not skip_bad_rows:
                raise DataError(f"{place}: {error}.") from None
            skipped += 1
            logger.warning(f"{place}: skipped: {error} ({count(skipped, 'bad row')} so far)")
            continue
        for note in notes.add(place, row_notes):
            logger.log(note.level, f"{opened.name}: {note.text} (the first row is {place}).")
        yield stored


def _open(
    source: str,
    split: str,
    config: str | None,
    dataset_dir: str | None,
    data_dir: str | None,
    data_files: DataFiles | None,
    columns: list[str] | Mapping[str, str | list[str]] | None,
) -> Source:
    if data_dir is None and data_files is None and source not in BUILDERS:
        opened = open_source(source, split=split, config=config, dataset_dir=dataset_dir)
    else:
        opened = open_data_files(source, data_dir=data_dir, data_files=data_files, split=split, config=config)
    if columns is None:
        return opened
    # a mapping says where the parts are
    kept = opened.columns if isinstance(columns, list) else None
    return replace(opened, rows=with_columns(opened.rows, columns), columns=kept)


def _sample(dataset: Dataset, rows: int | None, where: str, seed: int) -> Dataset:
    """LLaMA-Factory's `num_samples`: that many rows in random order, more than once where there are fewer."""
    if rows is None:
        return dataset
    generator = np.random.default_rng(seed)
    there = len(dataset)
    drawn = [generator.permutation(there)[:rows], generator.integers(there, size=max(rows - there, 0))]
    logger.info(f"{where}: num_samples draws {rows} of {count(there, 'row')}.")
    return mark_normalized(dataset.select(np.concatenate(drawn)), dataset)


def normalize_dataset(
    dataset: Dataset | IterableDataset, *, skip_bad_rows: bool = False, where: str = "train_dataset"
) -> Dataset | IterableDataset:
    """The same for a dataset in hand; a bad row is named `where[index]`.

    One that is tokenized already (`prompt_ids`, `chosen_ids`, `rejected_ids`, or `completion_ids`), or normalized and
    as it was then (`is_normalized`), comes back as it is. An `IterableDataset` is mapped row by row as it is read, and
    always has the columns `tools` and `chat_template_kwargs` too; a bad row raises when it is reached, or is left out
    with a warning that counts it.
    """
    if is_normalized(dataset):
        return dataset
    first = next(iter(dataset), {})
    if isinstance(first, Mapping) and is_tokenized(first):
        return dataset
    if isinstance(dataset, IterableDataset):
        if first == {}:
            raise DataError(f"{where} is empty; wanted preference rows with `prompt`, `chosen` and `rejected`.")
        if not isinstance(first, Mapping):
            raise DataError(f"{where}[0] is {type(first).__name__}; wanted an object with `chosen` and `rejected`.")
        warn_unused(first, where)
        schema = None if dataset.features is None else dataset.features.arrow_schema
        names = _columns_of(first, dataset)
        options = {"skip_bad_rows": skip_bad_rows, "where": where, "schema": schema, "skipped": set(), "notes": Notes()}
        # one row at a time, so that no row is read before it is asked for
        options["names"] = names
        normal = dataset.map(_normalize_one, batched=True, batch_size=1, with_indices=True, fn_kwargs=options)
        return normal.select_columns(names)
    return _build(dataset_rows(dataset, where), where, None, skip_bad_rows)


def mark_normalized(dataset: Dataset, *origins: Dataset) -> Dataset:
    """The dataset itself, marked. origins: those that its rows are taken from; all must be marked for it to be."""
    if all(is_normalized(origin) for origin in origins):
        setattr(dataset, _MARK, dataset._fingerprint)
    if len(origins) == 1 and len(origins[0]._data) == len(dataset._data):
        setattr(dataset, _PLACES, getattr(origins[0], _PLACES, None))
    elif origins:
        setattr(dataset, _PLACES, [place for origin in origins for place in places_of(origin, "?")])
    return dataset


def places_of(dataset: Dataset, where: str) -> list[str]:
    """Where each row came from: the file and the line, if they are known, else `where[index]`."""
    places = getattr(dataset, _PLACES, None)
    if not is_normalized(dataset) or places is None or len(places) != len(dataset._data):
        return [f"{where}[{index}]" for index in range(len(dataset))]
    if dataset._indices is None:
        return places
    return [places[index] for index in dataset._indices.column(0).to_pylist()]


def is_normalized(dataset: object) -> bool:
    """Whether its rows are as `load_preferences` or `normalize_dataset` made them."""
    return isinstance(dataset, Dataset) and getattr(dataset, _MARK, None) == dataset._fingerprint


def warn_unused(columns: Iterable[str], where: str) -> None:
    """One line where columns hold reference log-probs, which nothing reads."""
    unused = sorted(set(columns) & set(_UNUSED))
    if unused:
        logger.warning(
            f"{where}: {' and '.join(unused)} {'is' if len(unused) == 1 else 'are'} ignored: the reference "
            "log-probs are computed in training."
        )


def _build(rows: Iterable[PlacedRow], where: str, entry_columns: Columns | None, skip_bad_rows: bool) -> Dataset:
    kept: list[dict[str, Any]] = []
    names: set[str] = set()
    places: list[str] = []
    bad: list[tuple[str, str]] = []
    notes = Notes()
    for place, value in rows:
        try:
            if isinstance(value, RowError):
                raise value
            stored, row_notes = _stored(value, entry_columns)
            kept.append(stored)
            notes.add(place, row_notes)
            names |= value.keys() & set(_UNUSED)
            places.append(place)
        except RowError as error:
            bad.append((place, str(error)))
    if not kept and not bad:
        raise DataError(f"{where} is empty; wanted preference rows with `prompt`, `chosen` and `rejected`.")
    settle_bad_rows(where, bad, len(kept), skip_bad_rows)
    _refuse_mixed(where, [LABEL in row for row in kept], places, ("pairs", "single answers"))
    chats = [not isinstance(row["prompt"], str) for row in kept]
    _refuse_mixed(where, chats, places, ("plain text", "messages"))
    warn_unused(names, where)
    notes.log(where, len(kept))
    identical = 0 if LABEL in kept[0] else sum(row["chosen"] == row["rejected"] for row in kept)
    if identical:
        logger.warning(
            f"{where}: chosen and rejected are identical in {identical} of {count(len(kept), 'row')}; they are kept "
            "and teach nothing (their loss has no gradient)."
        )
    columns = {name: [row[name] for row in kept] for name in kept[0]}
    for name in _OPTIONS:
        if all(value is None for value in columns[name]):
            del columns[name]
    dataset = Dataset.from_dict(columns)
    setattr(dataset, _PLACES, places)
    return mark_normalized(dataset)


def _stored(value: Any, entry_columns: Columns | None = None) -> tuple[dict[str, Any], tuple[Note, ...]]:
    """The columns of one row, with None for an option that it lacks, and what was done; raises `RowError`."""
    try:
        preference = preference_from_row(value, entry_columns)
        sides = UNPAIRED if isinstance(preference, Unpaired) else SIDES
        columns: dict[str, Any] = {name: getattr(preference, name) for name in ("prompt", *sides)}
        if preference.conversational:
            columns = {name: pack_messages(messages, name) for name, messages in columns.items()}
        if isinstance(preference, Unpaired):
            columns[LABEL] = preference.label
        # free-form objects travel as JSON text: an Arrow column would give every row every row's keys
        options = (preference.tools, parse_template_options(value.get("chat_template_kwargs")))
        columns |= {name: to_json(option, name) for name, option in zip(_OPTIONS, options, strict=True)}
        return columns, preference.notes
    except RecursionError:
        raise RowError("is nested too deeply") from None


def _refuse_mixed(where: str, second: list[bool], places: list[str], kinds: tuple[str, str]) -> None:
    """Raise `DataError` for rows of two kinds. second: whether each row is of the second."""
    seconds = sum(second)
    if seconds in (0, len(second)):
        return
    minority = seconds * 2 <= len(second)
    place = places[second.index(minority)]
    counts = (f"{count(len(second) - seconds, 'row')} of {kinds[0]}", f"{seconds} of {kinds[1]}")
    raise DataError(
        f"{where} mixes {' with '.join(counts)}; wanted one kind. The first row of {kinds[minority]}: {place}."
    )


def _columns_of(first: Any, stream: IterableDataset) -> list[str]:
    """The columns of a stream's rows, as the first one that can be used has them."""
    for row in itertools.chain([first], stream):
        with suppress(RowError):
            return list(_stored(row)[0])
    return ["prompt", *SIDES, *_OPTIONS]


def _refuse_other_kind(row: Mapping[str, Any], sides: tuple[str, ...]) -> None:
    if sides_of(row) != sides:
        kinds = ("an unpaired row", "pairs") if sides == SIDES else ("a pair", "unpaired rows")
        raise RowError(f"is {kinds[0]} among {kinds[1]}; wanted one kind")


def _normalize_one(
    batch: dict[str, list[Any]],
    indices: list[int],
    skip_bad_rows: bool,
    where: str,
    schema: Any,
    skipped: set[str],
    notes: Notes,
    names: list[str],
) -> dict[str, list[Any]]:
    """One row of a stream; schema: Arrow's, None where the rows come from Python."""
    row = {name: values[0] for name, values in batch.items()}
    try:
        if schema is not None:
            row = arrow_rows(schema, decoded=True)(row)
        stored, row_notes = _stored(row)
        _refuse_other_kind(stored, sides_of(names))
        for note in notes.add(f"{where}[{indices[0]}]", row_notes):
            logger.log(note.level, f"{where}: {note.text} (the first row is {where}[{indices[0]}]).")
        return {name: [value] for name, value in stored.items()}
    except RowError as error:
        if not skip_bad_rows:
            raise DataError(f"{where}[{indices[0]}]: {error}.") from None
        said = f"{where}[{indices[0]}]: skipped: {error}"
    if said not in skipped:  # a stream is read again: for its columns, and in every epoch
        skipped.add(said)
        logger.warning(f"{said} ({count(len(skipped), 'bad row')} so far)")
    # no row, also in the columns that are dropped afterwards
    return {name: [] for name in (*batch, *names)}
