"""`path`, `data_dir` and `data_files` of `datasets.load_dataset`: files are read here, with line numbers."""

from collections.abc import Iterable, Iterator, Mapping
from glob import glob, has_magic
from pathlib import Path

from fastdpo.data.errors import DataError, RowError
from fastdpo.data.files import COMPRESSED, PlacedRow, file_type, read_file
from fastdpo.data.sources import Source, dataset_rows, from_hub, open_source

DataFiles = str | list[str] | dict[str, str | list[str]]
BUILDERS = {"json": (".json", ".jsonl", ".ndjson"), "csv": (".csv",), "parquet": (".parquet",)}


def open_data_files(
    path: str, *, data_dir: str | None, data_files: DataFiles | None, split: str, config: str | None
) -> Source:
    """Rows of `load_dataset(path, config, data_dir=data_dir, data_files=data_files, split=split)`.

    `path` is json, csv or parquet (the files' type), a folder, or a name on the hub. Patterns (`*`) are expanded.

    Raises `DataError` where a file is missing.
    """
    folder = Path(path).expanduser()
    typed = path in BUILDERS and not folder.exists()
    if not typed and not folder.is_dir():
        name = f"{path}/{data_dir}" if data_dir else path
        dataset = from_hub(path, config, split, data_dir=data_dir, data_files=data_files)
        return Source(name, dataset_rows(dataset, name))
    base = Path() if typed else folder
    if data_dir is not None:
        base = base / Path(data_dir).expanduser()
        if not base.is_dir():
            raise DataError(f"{path}: the data_dir {base} does not exist.")
    if data_files is None:
        if not typed:
            return open_source(str(base), split=split, config=config, dataset_dir=None)
        if data_dir is None:
            raise DataError(f"`path: {path}` reads files of that type: give their names as data_files, or a data_dir.")
        data_files = [f"*{suffix}{packed}" for suffix in BUILDERS[path] for packed in ("", *COMPRESSED)]
    if isinstance(data_files, Mapping):
        if split not in data_files:
            raise DataError(f"{path}: data_files has no split {split!r}; it has {', '.join(data_files)}.")
        data_files, split = data_files[split], "train"
    names = [data_files] if isinstance(data_files, str) else data_files
    files = [file for name in names for file in _expand(base, name)]
    if not files:
        raise DataError(f"{path}: no file in {base} matches {', '.join(names)}.")
    return Source(", ".join(map(str, files)), _read(files, split, BUILDERS[path] if typed else None))


def _expand(base: Path, name: str) -> list[Path]:
    pattern = base / Path(name).expanduser()
    if has_magic(name):
        return [Path(file) for file in sorted(glob(str(pattern), recursive=True))]
    if not pattern.is_file():
        raise DataError(f"{pattern} does not exist.")
    return [pattern]


def _read(files: list[Path], split: str, suffixes: tuple[str, ...] | None) -> Iterator[PlacedRow]:
    for file in files:
        if suffixes is not None and file_type(file) not in suffixes:
            raise DataError(f"{file} is not of the type that `path` names; wanted {' or '.join(suffixes)}.")
        yield from read_file(file, split)


def with_columns(rows: Iterable[PlacedRow], columns: list[str] | Mapping[str, str | list[str]]) -> Iterator[PlacedRow]:
    """Rows with these columns alone (a list), or with columns renamed (a mapping: our name to the row's).

    Where a mapping has several names for a column, the first that the row has is taken.
    """
    wanted = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    for place, row in rows:
        if not isinstance(row, Mapping):
            yield place, row
            continue
        names = {ours: [theirs] if isinstance(theirs, str) else theirs for ours, theirs in wanted.items()}
        taken = {ours: next((name for name in theirs if name in row), None) for ours, theirs in names.items()}
        missing = next((ours for ours, name in taken.items() if name is None), None)
        if missing is not None:
            there = ", ".join(f"`{name}`" for name in row)
            asked = " or ".join(f"`{name}`" for name in names[missing])
            yield place, RowError(f"has no column {asked}, which columns names; found {there}")
            continue
        rest = row.items() if isinstance(columns, Mapping) else ()
        rest = {name: value for name, value in rest if name not in taken.values()}
        yield place, {**rest, **{ours: row[name] for ours, name in taken.items() if name is not None}}
