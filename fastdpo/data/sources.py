"""Where rows come from: files with line numbers, saved folders, dataset_info.json entries and the hub."""

import csv
import difflib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from fastdpo.data.errors import DataError, RowError, why_not_json
from fastdpo.data.llama_factory import Entry, Layout, parse_entry, read_entries

logger = logging.getLogger(__name__)

FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
# one row with its place ("pairs.jsonl:4"); a row that could not be read is the reason why
PlacedRow = tuple[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows with their places, and their layout where a dataset_info.json entry gives it."""

    name: str
    rows: Iterable[PlacedRow]
    layout: Layout | None = None


def open_source(source: str, *, split: str, config: str | None, dataset_dir: str | None) -> Source:
    """Find what `source` names: an entry of `dataset_dir`, a file, a folder, or a dataset on the hub."""
    path = Path(source).expanduser()
    if dataset_dir is not None:
        folder = Path(dataset_dir).expanduser()
        entries = read_entries(folder)
        if source in entries:
            return _open_entry(parse_entry(source, entries[source], folder), split, config)
        if not path.exists():
            raise DataError(f"{folder / 'dataset_info.json'} has no entry `{source}`{_closest(source, entries)}.")
    if path.is_file():
        return Source(source, read_file(path, split), _sibling_layout(path))
    if path.is_dir():
        return _open_folder(path, split, config)
    if path.suffix.lower() in FILE_TYPES or source.startswith((".", "/", "~")):
        raise DataError(f"{source} does not exist.")
    return Source(source, dataset_rows(_from_hub(source, config, split), source))


def dataset_rows(dataset: Iterable[Any], where: str) -> Iterator[PlacedRow]:
    """Rows of a `datasets` dataset; the place is the index that finds the row again, `where[3]`."""
    return ((f"{where}[{index}]", row) for index, row in enumerate(dataset))


def read_file(path: Path, split: str = "train") -> Iterator[PlacedRow]:
    """Rows of one json, jsonl, csv or parquet file, with line numbers (parquet: row numbers, from 1)."""
    if split != "train":
        raise DataError(f"{path} is one file and has only the split train; asked for {split!r}.")
    readers = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; wanted {', '.join(FILE_TYPES)}.")
    return reader(path)


def _read_json(path: Path) -> Iterator[PlacedRow]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    head = data.lstrip()[:1]
    if head == b"[":
        yield from _read_json_array(path, data)
        return
    if head == b"{" and _is_one_object(data):
        raise DataError(f"{path} holds one JSON object; wanted an array of rows, or one row per line.")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse_line(line)


def _is_one_object(data: bytes) -> bool:
    # a file of one row per line, even of one row, is not meant: only an object that spans lines
    first_line = data.lstrip().split(b"\n", 1)[0]
    try:
        json.loads(first_line)
    except (ValueError, RecursionError):
        try:
            return isinstance(json.loads(data), dict)
        except (ValueError, RecursionError):
            return False
    return False


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 text ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return RowError(why_not_json(error))


def _read_json_array(path: Path, data: bytes) -> Iterator[PlacedRow]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason}).") from None
    decoder = json.JSONDecoder()
    position, counted, line, row = text.index("[") + 1, 0, 1, 0
    while True:
        position = _skip(text, position, " \t\r\n")
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            after = _skip(text, position + 1, " \t\r\n")
            if after < len(text):
                raise DataError(
                    f"{path}:{line + text.count(chr(10), position, after)}: text after the end of the array; store "
                    "all rows in one array, or one row per line (jsonl)."
                )
            return
        row += 1
        try:
            value, position = decoder.raw_decode(text, position)
            after = _skip(text, position, " \t\r\n")
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
        except (ValueError, RecursionError) as error:
            # the array cannot be read on after this place, so skipping would lose the rest without a word
            place = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(
                f"{path}:{place}: row {row}: {why_not_json(error)}; the array cannot be read from there on. Fix "
                "that line, or store one row per line (jsonl)."
            ) from None
        yield f"{path}:{line} (row {row})", value
        position = after + 1 if text[after] == "," else after


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[PlacedRow]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    limit = csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is shorter than long chats
    try:
        header = next(reader, None) or []
        _refuse_twice(f"{path}:1", header)
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{path}:{line}", _csv_row(header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV: {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _refuse_twice(place: str, names: list[str]) -> None:
    twice = next((name for index, name in enumerate(names) if name and name in names[:index]), None)
    if twice is not None:
        raise DataError(f"{place}: more than one column is named `{twice}`; rename or remove the others.")


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return RowError(f"{len(cells)} cells, but the header has {len(header)}")
    try:
        return {name: _csv_cell(name, cell) for name, cell in zip(header, cells, strict=True)}
    except RowError as error:
        return error


def _csv_cell(name: str, cell: str) -> Any:
    """A csv has only text; messages are JSON text in a cell."""
    if not cell.startswith(("[{", '{"from"', '{"role"')):
        return cell
    try:
        return json.loads(cell)
    except RecursionError as error:
        raise RowError(f"`{name}` holds {why_not_json(error)}") from None
    except ValueError:
        if "'role'" in cell or "'from'" in cell:
            raise RowError(f"`{name}` holds messages as Python text; wanted JSON text (or a jsonl file)") from None
        return cell


def _read_parquet(path: Path) -> Iterator[PlacedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _refuse_twice(str(path), file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


def _sibling_layout(path: Path) -> Layout | None:
    """The layout of the dataset_info.json entry beside a data file that names it."""
    if not (path.parent / "dataset_info.json").is_file():
        return None
    for name, entry in read_entries(path.parent).items():
        if isinstance(entry, dict) and entry.get("file_name") == path.name and entry.get("ranking"):
            return parse_entry(name, entry, path.parent).layout
    return None


def _open_entry(entry: Entry, split: str, config: str | None) -> Source:
    if entry.file is None:
        name = str(entry.hub_name)
        dataset = _from_hub(name, config or entry.subset, entry.split or split)
        return Source(name, dataset_rows(dataset, name), entry.layout)
    if entry.file.is_dir():
        files = sorted(file for file in entry.file.iterdir() if file.suffix.lower() in FILE_TYPES)
        rows = (row for file in files for row in read_file(file, split))
        return Source(str(entry.file), rows, entry.layout)
    if not entry.file.is_file():
        raise DataError(f"dataset_info.json entry `{entry.name}` names {entry.file}, which does not exist.")
    return Source(str(entry.file), read_file(entry.file, split), entry.layout)


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
        ranking = [name for name, entry in entries.items() if isinstance(entry, dict) and entry.get("ranking")]
        if len(ranking) == 1:
            return _open_entry(parse_entry(ranking[0], entries[ranking[0]], path), split, config)
        raise DataError(
            f"{path / 'dataset_info.json'} has {len(ranking)} preference entries "
            f"({', '.join(ranking) or 'none'}); choose one with --dataset_name NAME --dataset_dir {path}."
        )
    files = _split_files(path, split, config)
    if files is not None:
        return Source(str(path), (row for file in files for row in read_file(file)))
    return Source(str(path), dataset_rows(_from_hub(str(path), config, split), str(path)))


def _from_disk(path: Path) -> Dataset | DatasetDict:
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:  # a missing, cut or foreign file
        what = f"{error.filename} is missing" if isinstance(error, FileNotFoundError) else _first_line(error)
        raise DataError(f"{path} is a save_to_disk folder that cannot be read ({what}); save it again.") from error


def _split_files(path: Path, split: str, config: str | None) -> list[Path] | None:
    """The data files that `datasets` finds for a split of a folder; None where only `datasets` can read them."""
    try:
        found = load_dataset_builder(str(path), config).config.data_files
    except (ValueError, OSError) as error:
        raise DataError(f"{path} could not be loaded ({_first_line(error)}).") from error
    # a name such as train[:10%] is for datasets
    if not isinstance(found, dict) or not split.isidentifier():
        return None
    if split not in found:
        raise DataError(f"{path} has no split {split!r}; it has {', '.join(map(str, found))}.")
    files = [Path(file) for file in found[split]]
    return files if all(file.is_file() and file.suffix.lower() in FILE_TYPES for file in files) else None


def _from_hub(name: str, config: str | None, split: str) -> Dataset:
    """`datasets.load_dataset`, for a hub name or a folder of data files, with one sentence where it fails."""
    try:
        dataset = load_dataset(name, config, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise DataError(
            f"{name} is neither a file nor a folder here, and the hub could not be reached or has no such "
            f"dataset ({_first_line(error)})."
        ) from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"{name}: a data file could not be read ({_first_line(cause)}).") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{name} could not be loaded ({_first_line(error)}).") from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"{name}: split {split!r} is a {type(dataset).__name__}; wanted one split, such as train.")
    return dataset


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _closest(name: str, entries: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(entries), n=1)
    return f"; did you mean `{close[0]}`?" if close else f" (it has {', '.join(entries) or 'none'})"
