"""Where rows come from: files, saved folders, dataset_info.json entries and the hub."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from fastdpo.data.arrow_rows import arrow_rows
from fastdpo.data.errors import DataError
from fastdpo.data.files import FILE_TYPES, PlacedRow, file_type, read_file
from fastdpo.data.rows.llama_factory import Columns, DatasetEntry, is_preference, parse_entry, read_entries
from fastdpo.wording import did_you_mean, first_line


@dataclass(frozen=True)
class Source:
    """Rows with their places; their columns and how many are meant, where a dataset_info.json entry says so."""

    name: str
    rows: Iterable[PlacedRow]
    columns: Columns | None = None
    num_samples: int | None = None


def open_source(source: str, *, split: str, config: str | None, dataset_dir: str | None) -> Source:
    """Find what `source` names: an entry of `dataset_dir`, a file, a folder, or a dataset on the hub."""
    path = Path(source).expanduser()
    if dataset_dir is not None:
        folder = Path(dataset_dir).expanduser()
        entries = read_entries(folder)
        if source in entries:
            return _open_entry(parse_entry(source, entries[source], folder), split, config)
        if not path.exists():
            hint = did_you_mean(source, entries, "`")
            hint = f"; {hint}" if hint else f" (it has {', '.join(entries) or 'none'})."
            raise DataError(f"{folder / 'dataset_info.json'} has no entry `{source}`{hint}")
    if path.is_file():
        return Source(source, read_file(path, split), _sibling_columns(path))
    if path.is_dir():
        return _open_folder(path, split, config)
    if has_magic(source):
        files = [Path(file) for file in sorted(glob(str(path), recursive=True)) if file_type(Path(file)) is not None]
        if not files:
            raise DataError(f"no data file ({', '.join(FILE_TYPES)}) matches {source}.")
        return Source(source, (row for file in files for row in read_file(file, split)), _sibling_columns(files[0]))
    if file_type(path) is not None or source.startswith((".", "/", "~")):
        raise DataError(f"{source} does not exist.")
    return Source(source, dataset_rows(from_hub(source, config, split), source))


def dataset_rows(dataset: Dataset, where: str) -> Iterator[PlacedRow]:
    """Rows of a `datasets` dataset; the place is the index that finds the row again, `where[3]`."""
    as_written = arrow_rows(dataset.features.arrow_schema, decoded=True)
    return ((f"{where}[{index}]", as_written(row)) for index, row in enumerate(cast("Iterable[Any]", dataset)))


def _sibling_columns(path: Path) -> Columns | None:
    """The columns of a data file that an entry of the dataset_info.json beside it names."""
    if not (path.parent / "dataset_info.json").is_file():
        return None
    for name, entry in read_entries(path.parent).items():
        if is_preference(entry) and entry.get("file_name") == path.name:
            return parse_entry(name, entry, path.parent).columns
    return None


def _open_entry(entry: DatasetEntry, split: str, config: str | None) -> Source:
    if entry.file is None:
        name = str(entry.hub_name)
        dataset = from_hub(name, config or entry.subset, entry.split or split)
        return Source(name, dataset_rows(dataset, name), entry.columns, entry.num_samples)
    if entry.file.is_dir():
        files = sorted(file for file in entry.file.iterdir() if file_type(file) is not None)
        rows = (row for file in files for row in read_file(file, split))
        return Source(str(entry.file), rows, entry.columns, entry.num_samples)
    if not entry.file.is_file():
        raise DataError(f"dataset_info.json entry `{entry.name}` names {entry.file}, which does not exist.")
    return Source(str(entry.file), read_file(entry.file, split), entry.columns, entry.num_samples)


def _open_folder(path: Path, split: str, config: str | None) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = _from_disk(path)
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise DataError(f"{path} has no split {split!r}; it has {', '.join(map(str, saved))}.")
            saved = saved[split]
        elif split != "train":
            raise DataError(f"{path} is one saved dataset and has only the split train; asked for {split!r}.")
        return Source(str(path), dataset_rows(saved, str(path)))
    if (path / "dataset_info.json").is_file():
        entries = read_entries(path)
        usable = [name for name, entry in entries.items() if is_preference(entry)]
        if len(usable) == 1:
            return _open_entry(parse_entry(usable[0], entries[usable[0]], path), split, config)
        raise DataError(
            f"{path / 'dataset_info.json'} has {len(usable)} preference entries "
            f"({', '.join(usable) or 'none'}); choose one with --dataset_name NAME --dataset_dir {path}."
        )
    files = _split_files(path, split, config)
    if files is not None:
        return Source(str(path), (row for file in files for row in read_file(file)))
    return Source(str(path), dataset_rows(from_hub(str(path), config, split), str(path)))


def _from_disk(path: Path) -> Dataset | DatasetDict:
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:  # a missing, cut or foreign file
        what = f"{error.filename} is missing" if isinstance(error, FileNotFoundError) else first_line(error)
        raise DataError(f"{path} is a save_to_disk folder that cannot be read ({what}); save it again.") from error


def _split_files(path: Path, split: str, config: str | None) -> list[Path] | None:
    """The data files that `datasets` finds for a split of a folder; None where only `datasets` can read them."""
    try:
        splits = load_dataset_builder(str(path), config).config.data_files
    except (ValueError, OSError) as error:
        raise _not_loaded(str(path), error) from error
    # a name such as train[:10%] is for datasets
    if not isinstance(splits, dict) or not split.isidentifier():
        return None
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}.")
    files = [Path(file) for file in splits[split]]
    return files if all(file.is_file() and file_type(file) is not None for file in files) else None


def from_hub(name: str, config: str | None, split: str, **files: Any) -> Dataset:
    """`datasets.load_dataset`, for a hub name or a folder of data files, with one sentence where it fails.

    files: its `data_dir` and `data_files`.
    """
    try:
        dataset = load_dataset(name, config, split=split, **files)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise DataError(
            f"{name} is neither a file nor a folder here, and the hub could not be reached or has no such "
            f"dataset ({first_line(error)})."
        ) from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"{name}: a data file could not be read ({first_line(cause)}).") from error
    except (ValueError, OSError) as error:
        raise _not_loaded(name, error) from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name}: split {split!r} is a {type(dataset).__name__}; wanted one split, such as train.")
    return dataset


def _not_loaded(name: str, error: BaseException) -> DataError:
    folder = Path(name)
    if folder.is_dir() and not any(file_type(file) is not None for file in folder.rglob("*")):
        held = f"no data files ({', '.join(FILE_TYPES)}), no saved dataset and no dataset_info.json"
        return DataError(f"{name} holds {held}.")
    return DataError(f"{name} could not be loaded ({first_line(error)}).")
