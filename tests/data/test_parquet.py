"""Parquet files that unfold beyond reason or memory are refused before they do; compressible ones are read."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdpo.data import parquet
from fastdpo.data.errors import DataError
from fastdpo.data.files import read_file

MEGABYTE = "x" * 1_000_000


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False)
    return path


def once(text: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))


def turns(text: str, rows: int) -> pa.ListArray:
    """A list of one message in each row, all with the same text, stored once."""
    contents = pa.StructArray.from_arrays([once("user", rows), once(text, rows)], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), contents)


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(size)))


@pytest.fixture(autouse=True)
def a_gigabyte_of_rows_is_never_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    free(monkeypatch, 10**12)
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 5


def test_one_text_for_nine_thousand_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.parquet", prompt=once(MEGABYTE, 9000), chosen=["a"] * 9000, rejected=["b"] * 9000)
    assert path.stat().st_size < 1500
    with pytest.raises(DataError, match=r"parquet: \d+ bytes unfold to 9 GB or more in 9000 rows, more than 1000"):
        next(read_file(path))


def test_the_same_in_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.parquet", prompt=turns(MEGABYTE, 5000))
    with pytest.raises(DataError, match=r"unfold to 5 GB or more in 5000 rows, more than 1000 times as much; make"):
        next(read_file(path))


def test_rows_of_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.parquet", prompt=pa.nulls(20_000_000, pa.string()))
    with pytest.raises(DataError, match=r"unfold to 4\.32 GB or more in 20000000 rows"):
        next(read_file(path))


def test_more_than_the_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "pairs.parquet", prompt=once(MEGABYTE, 50), chosen=["a"] * 50)
    free(monkeypatch, 90e6)
    with pytest.raises(DataError, match=r"to 50 MB or more in 50 rows, and twice as much is needed, of which 90"):
        next(read_file(path))


def test_a_compressible_file_of_a_moderate_size_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.parquet", prompt=turns("y" * 10_000, 2000), chosen=once("a", 2000))
    assert path.stat().st_size * 1000 < 20_000_000
    rows = list(read_file(path))
    assert len(rows) == 2000
    assert rows[0] == (f"{path}: row 1", {"prompt": [{"role": "user", "content": "y" * 10_000}], "chosen": "a"})
    assert rows[-1][1] == rows[0][1]


@pytest.mark.parametrize("column", ["text", "turns", "large", "map", "number", "null", "empty"])
def test_what_is_counted_is_what_is_read(tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "text": pa.array(["abc", None, "de"]),
        "turns": turns("abc", 3),
        "large": pa.array([["abc"], None, []], pa.large_list(pa.large_string())),
        "map": pa.array([[("k", "abc")], [], None], pa.map_(pa.string(), pa.string())),
        "number": pa.array([1, 2, 3]),
        "null": pa.nulls(3),
        "empty": pa.array([], pa.string()),
    }
    path = write(tmp_path / "pairs.parquet", value=columns[column])
    sizes: list[int] = []
    monkeypatch.setattr(parquet, "_refuse", lambda path, rows, size, stored: sizes.append(size))
    rows = list(read_file(path))
    texts = {"text": 5, "turns": 3 * (4 + 3), "large": 3, "map": 4}
    if column in texts:
        assert sizes[-1] - parquet.ROW * 3 - parquet.VALUE * _values(path) == texts[column]
    assert len(rows) == len(columns[column])


def _values(path: Path) -> int:
    group = pq.read_metadata(path).row_group(0)
    return sum(group.column(index).num_values for index in range(group.num_columns))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv"])
def test_a_text_file_larger_than_the_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(2 * 10**12)  # sparse: it takes no room
    with pytest.raises(DataError, match=r"has 2,000 GB, and reading it takes 3 times as much memory, of which 1,000"):
        next(read_file(path))
