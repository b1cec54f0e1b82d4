"""Where rows come from, the places by which they are named, and one sentence where a source cannot be read."""

import csv
import json
import re
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from fastdpo.data.errors import RowError
from fastdpo.data.files import read_file
from fastdpo.data.formats import DataError, load_preferences

TEXT = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}
MORE = {"prompt": "a\nb", "chosen": ' "quoted"', "rejected": " \u2028, NA"}
CHAT = {
    "prompt": [{"role": "user", "content": "Sky?"}],
    "chosen": [{"role": "assistant", "content": "Blue."}],
    "rejected": [{"role": "assistant", "content": "Green."}],
}


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            cells = [{key: v if isinstance(v, str) else json.dumps(v) for key, v in row.items()} for row in rows]
            writer.writerows(cells)
    return str(path)


def places(path: Path) -> list[str]:
    return [place.removeprefix(str(path)) for place, _ in read_file(path)]


@pytest.mark.parametrize("rows", [[TEXT, MORE], [CHAT, CHAT]], ids=["text", "chat"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_file_type(tmp_path, suffix, rows):
    assert load_preferences(write(tmp_path / f"pairs{suffix}", rows)).to_list() == rows


def test_a_json_file_may_hold_lines_and_start_with_a_bom(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(TEXT) + "\r\n\r\n" + json.dumps(MORE) + "\r\n", encoding="utf-8-sig")
    assert load_preferences(str(path)).to_list() == [TEXT, MORE]
    assert places(path) == [":1", ":3"]


def test_places(tmp_path):
    array = tmp_path / "pairs.json"
    array.write_text('\n[{"a": 1},\n\n {"a":\n 2}, 5\n]\n')
    assert places(array) == [":2 (row 1)", ":4 (row 2)", ":5 (row 3)"]
    table = tmp_path / "pairs.csv"
    write(table, [TEXT, MORE, TEXT])
    assert places(table) == [":2", ":3", ":5"]  # the second row has a line break in a cell
    write(tmp_path / "pairs.parquet", [TEXT, TEXT])
    assert places(tmp_path / "pairs.parquet") == [": row 1", ": row 2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', r":3: row 2: broken JSON: Expecting value \(column 7\)"),
        ('[\n{"a": 1}\n{"a": 2}\n]', r":3: row 1: broken JSON: Expecting ',' or '\]'"),
        ('[{"a": 1}', r":1: row 1: broken JSON: Expecting ',' or '\]'"),
        ('[{"a": 1},\n', r":2: row 2: broken JSON: Expecting value"),
        ("[\n\n", r":3: row 1: broken JSON: Expecting value"),
        ('{\n"data": [1]\n}', " holds one JSON object; wanted an array of rows, or one row per line"),
        (b"[\n\xff]", r":2: not UTF-8 text \(invalid start byte\)"),
        ('[{"a": 1}]\n\n[{"a": 2}]\n', r":3: text after the end of the array"),
        ('\n[{"a": 1}\n] trailing {"x', r":3: text after the end of the array"),
        ("[]x", r":1: text after the end of the array"),
        ('[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", r":2: row 2: JSON with an integer of too many digits"),
        ("[\n" + "[" * 100_000, r":2: row 1: JSON nested too deeply"),
    ],
    ids=range(12),
)
def test_broken_json_stops_also_when_skipping(tmp_path, text, said):
    path = tmp_path / "pairs.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for skip in (False, True):
        with pytest.raises(DataError, match=re.escape(str(path)) + said):
            load_preferences(str(path), skip_bad_rows=skip)


@pytest.mark.parametrize(
    ("value", "said"),
    [("1" * 5000, "JSON with an integer of too many digits"), ("[" * 100_000, "JSON nested too deeply")],
    ids=["digits", "nested"],
)
def test_lines_that_python_cannot_parse_are_bad_rows(tmp_path, value, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": ' + value + "}\n" + json.dumps(TEXT))
    with pytest.raises(DataError) as caught:
        load_preferences(str(path))
    assert str(caught.value).split("\n")[:2] == [f"{path}: 1 bad row of 2:", f"  {path}:1: {said}"]
    assert load_preferences(str(path), skip_bad_rows=True).to_list() == [TEXT]


def test_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen\na,b,c,d\n")
    with pytest.raises(DataError, match=r"a\.csv:1: more than one column is named `chosen`; rename"):
        load_preferences(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected,,\na,b,c,,\n")  # columns without a name lose nothing
    assert len(load_preferences(str(tmp_path / "b.csv"))) == 1
    text = pa.array(["a"])
    table = pa.Table.from_arrays([text] * 4, names=["prompt", "chosen", "rejected", "rejected"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: more than one column is named `rejected`"):
        load_preferences(str(tmp_path / "c.parquet"))


def test_lines_that_are_not_utf8_are_bad_rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(TEXT).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"pairs.jsonl:2: not UTF-8 text \(invalid start byte at byte 12\)"):
        load_preferences(str(path))
    assert load_preferences(str(path), skip_bad_rows=True).to_list() == [TEXT]


def test_csv_cells(tmp_path):
    path = tmp_path / "pairs.csv"
    long = "x" * 200_000  # longer than the csv module's own limit, which is as it was afterwards
    limit = csv.field_size_limit()
    path.write_text(f"prompt,chosen,rejected\n{long},[1],NA\na,b\na,[{{not json,c\n")
    rows = [row for _, row in read_file(path)]
    assert rows[0] == {"prompt": long, "chosen": "[1]", "rejected": "NA"}
    assert isinstance(rows[1], RowError)
    assert str(rows[1]) == "2 cells, but the header has 3"
    assert rows[2]["chosen"] == "[{not json"
    assert csv.field_size_limit() == limit


def test_broken_csv_and_parquet(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\na,b,c\na,"b"x,c\n')
    with pytest.raises(DataError, match=r"a\.csv:3: broken CSV"):
        load_preferences(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(DataError, match=r"b\.csv: not UTF-8 text"):
        load_preferences(str(tmp_path / "b.csv"))
    (tmp_path / "c.parquet").write_text("no")
    with pytest.raises(DataError, match=r"c\.parquet is not a readable parquet file"):
        load_preferences(str(tmp_path / "c.parquet"))


def test_saved_folders(tmp_path):
    Dataset.from_list([TEXT]).save_to_disk(str(tmp_path / "one"))
    DatasetDict(
        {"train": Dataset.from_list([TEXT]), "test": Dataset.from_list([MORE, {**TEXT, "chosen": ""}])}
    ).save_to_disk(str(tmp_path / "two"))
    assert load_preferences(str(tmp_path / "one")).to_list() == [TEXT]
    assert load_preferences(str(tmp_path / "two")).to_list() == [TEXT]
    with pytest.raises(DataError, match=r"two\[1\]: `chosen` is empty"):
        load_preferences(str(tmp_path / "two"), split="test")
    with pytest.raises(DataError, match="two has no split 'dev'; it has train, test"):
        load_preferences(str(tmp_path / "two"), split="dev")
    with pytest.raises(DataError, match="one is one saved dataset and has only the split train; asked for 'test'"):
        load_preferences(str(tmp_path / "one"), split="test")


def test_a_folder_of_data_files(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    write(tmp_path / "train.jsonl", [TEXT])
    write(tmp_path / "test.jsonl", [MORE])
    assert load_preferences(str(tmp_path), split="test").to_list() == [MORE]
    assert load_preferences(str(tmp_path), split="train[:1]").to_list() == [TEXT]
    with pytest.raises(DataError, match=r"has no split 'dev'; it has train, test\.$"):
        load_preferences(str(tmp_path), split="dev")
    (tmp_path / "test.jsonl").write_text(json.dumps(MORE) + '\n{"prompt"\n')
    with pytest.raises(DataError, match=r"test\.jsonl:2: broken JSON: Expecting ':' delimiter"):
        load_preferences(str(tmp_path), split="test")
    assert load_preferences(str(tmp_path), split="test", skip_bad_rows=True).to_list() == [MORE]


def test_a_folder_of_files_that_only_datasets_reads(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    with pytest.raises(DataError, match=r"holds no data files \(.*no dataset_info\.json"):
        load_preferences(str(tmp_path))
    packed = tmp_path / "train.zip"
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("train.jsonl", json.dumps(TEXT))
    assert load_preferences(str(tmp_path)).to_list() == [TEXT]
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("train.jsonl", "{")
    with pytest.raises(DataError, match=r"a data file could not be read \(JSON parse error"):
        load_preferences(str(tmp_path))


def test_a_saved_folder_that_is_broken(tmp_path):
    Dataset.from_list([TEXT]).save_to_disk(str(tmp_path / "one"))
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:40])
    with pytest.raises(DataError, match=r"one is a save_to_disk folder that cannot be read \(.*\); save it again\.$"):
        load_preferences(str(tmp_path / "one"))
    arrow.unlink()
    with pytest.raises(DataError, match=r"cannot be read \(.*data-00000-of-00001\.arrow is missing\); save it again"):
        load_preferences(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("missing.jsonl", {}, "missing.jsonl does not exist"),
        ("./missing", {}, r"\./missing does not exist"),
        ("pairs.jsonl", {"split": "test"}, "is one file and has only the split train; asked for 'test'"),
        ("notes.txt", {}, "unknown file type '.txt'; wanted .json, .jsonl, .ndjson, .csv, .parquet"),
        ("someone/pairs", {}, "someone/pairs is neither a file nor a folder here, and the hub could not be reached"),
        ("pairs", {"dataset_dir": "."}, "dataset_info.json does not exist; dataset_dir is the folder"),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, source, options, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", [TEXT])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=said):
        load_preferences(source, **options)
