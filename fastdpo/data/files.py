"""Rows of a json, jsonl, csv or parquet file, compressed or not, each with the line that it is on."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import psutil

from fastdpo.data.errors import DataError, RowError, refuse_twice
from fastdpo.wording import in_bytes, why_not_json

# a text file is in memory as bytes, as text and as rows
COPIES = 3
FILE_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 24
_BOM = b"\xef\xbb\xbf"
# one row with its place ("pairs.jsonl:4"); a row that could not be read is the reason why
PlacedRow = tuple[str, Any]


def read_file(path: Path, split: str = "train") -> Iterator[PlacedRow]:
    """Rows of one json, jsonl, csv or parquet file, with line numbers (parquet: row numbers, from 1)."""
    if split != "train":
        raise DataError(f"{path} is one file and has only the split train; asked for {split!r}.")
    kind = file_type(path)
    if kind is None:
        raise DataError(
            f"{path}: unknown file type {''.join(path.suffixes[-2:])!r}; wanted {', '.join(FILE_TYPES)}, or one of the "
            f"first four in {', '.join(COMPRESSED)}."
        )
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    return readers.get(kind, _read_json)(path)


def file_type(path: Path) -> str | None:
    """The one of `FILE_TYPES` that a file's name says, under a suffix of `COMPRESSED` too; None for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compressed = len(suffixes) == 2 and suffixes[1] in COMPRESSED
    kind = suffixes[0] if compressed else (suffixes[-1:] or [""])[0]
    return kind if kind in FILE_TYPES and not (compressed and kind == ".parquet") else None


def _read_json(path: Path) -> Iterator[PlacedRow]:
    first = next((line for line in _lines(path) if line.strip()), b"")
    if first.lstrip()[:1] == b"[":
        yield from _read_json_array(path, _read_bytes(path).removeprefix(_BOM))
        return
    # a file of one row per line, even of one row, is not meant: only an object that spans lines
    if first.lstrip()[:1] == b"{" and not _is_json(first) and _is_json(_read_bytes(path).removeprefix(_BOM)):
        raise DataError(f"{path} holds one JSON object; wanted an array of rows, or one row per line.")
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse_line(line.rstrip(b"\r\n"))


def _lines(path: Path) -> Iterator[bytes]:
    """One line at a time: a file that is streamed may be larger than the memory."""
    with _reading(path), _opened(path) as file:
        begin = _BOM
        while line := file.readline(_CHUNK):
            pieces = [line]
            while not pieces[-1].endswith(b"\n") and (piece := file.readline(_CHUNK)):
                if len(pieces) == 1:  # no line of a row: a sparse file, or one that unfolds without end
                    _refuse_large(path, path.stat().st_size)
                pieces.append(piece)
                _refuse_large(path, _CHUNK * len(pieces))
            yield b"".join(pieces).removeprefix(begin)
            begin = b""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is cut or no {path.suffix} file: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_bytes(path: Path) -> bytes:
    with _reading(path):
        # stat first: of a sparse file, or one on a larger machine's disk, nothing else would be said before the end
        _refuse_large(path, path.stat().st_size)
        chunks, size = [], 0
        with _opened(path) as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                _refuse_large(path, size)
                chunks.append(chunk)
    return b"".join(chunks)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_large(path: Path, size: int) -> None:
    free = psutil.virtual_memory().available
    if COPIES * size > free:
        raise DataError(
            f"{path} has {in_bytes(size)}, and reading it takes {COPIES} times as much memory, of which "
            f"{in_bytes(free)} are free; make several smaller files of it, or a parquet file."
        )


def _opened(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa  # which has the codec on every system

        return io.BufferedReader(cast(Any, pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(path, "rb")


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
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    limit = csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters is shorter than long chats
    try:
        header = next(reader, None) or []
        refuse_twice(f"{path}:1", header)
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{path}:{line}", _csv_row(header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV: {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return RowError(f"{len(cells)} cells, but the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[PlacedRow]:
    from fastdpo.data.parquet import read_parquet  # pyarrow, where there is such a file

    return read_parquet(path)
