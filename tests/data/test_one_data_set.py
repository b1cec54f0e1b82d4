"""One data set, whatever wrote it and however it is read: the same rows at the template, and the same token ids."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from fastdpo.data.errors import DataError
from fastdpo.data.formats import load_preferences, normalize_dataset
from fastdpo.data.rows.messages import for_template, from_json

Rows = list[dict[str, Any]]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": f"call-{name}", "function": {"name": name, "arguments": arguments}}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


ASKED = {"role": "user", "content": "W\u00e9ather?", "name": "Ann"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"at": {"type": "string"}}}}]
ROWS: Rows = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, ASKED],
        "chosen": [
            answer("", tool_calls=[call("look", at="home", by=[1, 2])]),
            answer("Sunny.", reasoning_content="s\n"),
        ],
        "rejected": [answer("No idea.")],
        "tools": TOOLS,
    },
    {
        "prompt": [
            {"role": "user", "content": "Again?"},
            answer("", tool_calls=[call("count", to=3)]),
            {"role": "tool", "content": "3", "tool_call_id": "call-count"},
        ],
        "chosen": [answer('{"three": [3]}')],
        "rejected": [answer("[1]", mood={"kind": "bad", "of": [0.5]})],
        "tools": None,
    },
]
# what a struct of Arrow cannot tell from a key that another row has
WITH_NULLS: Rows = [
    {
        **ROWS[0],
        "chosen": [answer("", tool_calls=[call("look", at=None, by={"x": None, "y": [None]})])],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {"at": {"default": None}}}}],
    },
    *ROWS[1:],
]


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(folder: Path, rows: Rows) -> Any:
    (folder / "a.json").write_text(json.dumps(rows, indent=1))
    return load_preferences(str(folder / "a.json"))


def as_lines(folder: Path, rows: Rows) -> Any:
    (folder / "a.jsonl").write_bytes(lines(rows))
    return load_preferences(str(folder / "a.jsonl"))


def as_cells(folder: Path, rows: Rows) -> Any:
    """Every list as its JSON text."""
    (folder / "a.jsonl").write_bytes(lines([{name: json.dumps(value) for name, value in row.items()} for row in rows]))
    return load_preferences(str(folder / "a.jsonl"))


def as_csv(folder: Path, rows: Rows) -> Any:
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: json.dumps(value) if value else "" for name, value in row.items()} for row in rows)
    return load_preferences(str(folder / "a.csv"))


def compressed(suffix: str, compress: Callable[[bytes], bytes]) -> Callable[[Path, Rows], Any]:
    def write(folder: Path, rows: Rows) -> Any:
        (folder / f"a.jsonl{suffix}").write_bytes(compress(lines(rows)))
        return load_preferences(str(folder / f"a.jsonl{suffix}"))

    return write


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def as_files(folder: Path, rows: Rows) -> Any:
    for index, row in enumerate(rows):
        (folder / f"part-{index}.jsonl").write_bytes(lines([row]))
    return load_preferences(str(folder / "part-*.jsonl"))


def as_folder(folder: Path, rows: Rows) -> Any:
    as_files(folder, rows)
    return load_preferences(str(folder))


def with_json_columns(rows: Rows) -> Dataset:
    features = pytest.importorskip("datasets.features")
    json_column = getattr(features, "Json", None)
    if json_column is None:
        pytest.skip("this datasets has no Json()")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Dataset.from_dict(
        columns, features=features.Features({name: features.List(json_column()) for name in columns})
    )


def with_structs(rows: Rows) -> Dataset:
    return Dataset(pa.Table.from_pylist(rows))


def as_parquet(make: Callable[[Rows], Dataset]) -> Callable[[Path, Rows], Any]:
    def write(folder: Path, rows: Rows) -> Any:
        make(rows).to_parquet(str(folder / "a.parquet"))
        return load_preferences(str(folder / "a.parquet"))

    return write


def as_saved(make: Callable[[Rows], Dataset]) -> Callable[[Path, Rows], Any]:
    def write(folder: Path, rows: Rows) -> Any:
        make(rows).save_to_disk(str(folder / "saved"))
        return load_preferences(str(folder / "saved"))

    return write


def as_stream(folder: Path, rows: Rows) -> Any:
    (folder / "a.jsonl").write_bytes(lines(rows))
    return normalize_dataset(load_dataset("json", data_files=str(folder / "a.jsonl"), split="train", streaming=True))


def from_python(folder: Path, rows: Rows) -> Any:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return normalize_dataset(IterableDataset.from_generator(generate))


WAYS: dict[str, Callable[[Path, Rows], Any]] = {
    "json": as_json,
    "jsonl": as_lines,
    "JSON text in jsonl": as_cells,
    "csv": as_csv,
    "gz": compressed(".gz", gzip.compress),
    "bz2": compressed(".bz2", bz2.compress),
    "xz": compressed(".xz", lzma.compress),
    "zst": compressed(".zst", zstd),
    "glob": as_files,
    "folder": as_folder,
    "Json() parquet": as_parquet(with_json_columns),
    "Json() save_to_disk": as_saved(with_json_columns),
    "Json() in memory": lambda folder, rows: normalize_dataset(with_json_columns(rows)),
    "Json() streaming": lambda folder, rows: normalize_dataset(with_json_columns(rows).to_iterable_dataset()),
    "from a generator": from_python,
}
STRUCTS: dict[str, Callable[[Path, Rows], Any]] = {
    "parquet": as_parquet(with_structs),
    "save_to_disk": as_saved(with_structs),
    "in memory": lambda folder, rows: normalize_dataset(with_structs(rows)),
    "streaming": lambda folder, rows: normalize_dataset(with_structs(rows).to_iterable_dataset()),
    "load_dataset, streaming": as_stream,
}


def at_the_template(dataset: Any) -> Rows:
    return [
        {
            **{name: for_template(row[name]) for name in ("prompt", "chosen", "rejected")},
            "tools": from_json(row.get("tools")),
        }
        for row in dataset
    ]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_written_comes_to_the_template(tmp_path: Path, way: str) -> None:
    for folder, rows in ((tmp_path / "plain", ROWS), (tmp_path / "nulls", WITH_NULLS)):
        folder.mkdir()
        assert at_the_template(WAYS[way](folder, rows)) == rows


@pytest.mark.parametrize("way", STRUCTS)
def test_nulls_that_arrow_added_do_not(tmp_path: Path, way: str) -> None:
    assert at_the_template(STRUCTS[way](tmp_path, ROWS)) == ROWS


def test_the_comparison_sees_a_key_that_is_lost(tmp_path: Path) -> None:
    without: Rows = json.loads(json.dumps(ROWS).replace('"name": "Ann"', '"nam": "Ann"'))
    assert at_the_template(as_lines(tmp_path, without)) != ROWS
    assert at_the_template(STRUCTS["parquet"](tmp_path, WITH_NULLS)) != WITH_NULLS


def test_normalizing_again_changes_nothing(tmp_path: Path) -> None:
    changed = as_lines(tmp_path, WITH_NULLS).map(lambda row: row)
    assert at_the_template(normalize_dataset(changed)) == WITH_NULLS


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_messages_as_python_text_are_refused(tmp_path: Path, name: str) -> None:
    row = {"prompt": "Sky?", "chosen": str(ROWS[0]["rejected"]), "rejected": " Green."}
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_bytes(lines([row]))
    elif name == "a.csv":
        Dataset.from_list([row]).to_csv(str(path))
    else:
        Dataset.from_list([row]).to_parquet(str(path))
    with pytest.raises(DataError, match="`chosen` holds messages as Python text; wanted JSON text"):
        load_preferences(str(path))


def test_json_that_is_an_answer_stays_text(tmp_path: Path) -> None:
    row = {"prompt": "Call.", "chosen": '[{"name": "look", "role": 3}]', "rejected": '{"from": "here"}'}
    assert as_lines(tmp_path, [row]).to_list() == [row]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl.gz", b"no", r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], r"a\.jsonl\.gz is cut or no \.gz file"),
        ("a.jsonl.xz", b"no", r"a\.jsonl\.xz is cut or no \.xz file"),
        ("a.jsonl.bz2", b"no", r"a\.jsonl\.bz2 cannot be read"),
        ("a.jsonl.zst", b"no", r"a\.jsonl\.zst cannot be read"),
        ("a.parquet.gz", b"no", r"unknown file type '\.parquet\.gz'"),
    ],
)
def test_compressed_files_that_are_none(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        load_preferences(str(tmp_path / name))


def test_a_file_that_unfolds_beyond_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(1 << 26)))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1 << 26}))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz has .* and reading it takes 3 times as much memory"):
        load_preferences(str(path))


def test_places_in_a_compressed_file_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROWS) + b"{}\n"))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:3: missing column `chosen`"):
        load_preferences(str(path))
