"""Rows of a file, a dataset or a stream become pairs; bad ones are named, all of them, with the reason."""

import json
import logging
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from fastdpo.data.formats import DataError, _build, load_preferences, normalize_dataset
from fastdpo.data.rows.messages import for_template

USER = {"role": "user", "content": "Sky?"}


BLUE = {"role": "assistant", "content": "Blue."}


GREEN = {"role": "assistant", "content": "Green."}


TEXT = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}


CHAT = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}


TOOL = {"type": "function", "function": {"name": "look"}}


NO_OPTIONS = {"tools": None, "chat_template_kwargs": None}


def write_lines(path, rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]}


def test_every_bad_row_is_listed_with_its_line(tmp_path):
    path = write_lines(
        tmp_path / "pairs.jsonl",
        [TEXT, '{"prompt": "a", "chosen"', "", {**TEXT, "chosen": None}, TEXT, {"prompt": "a", "chosen": "b"}, TEXT],
    )
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    assert str(caught.value).split("\n") == [
        f"{path}: 3 bad rows of 6:",
        f"  {path}:2: broken JSON: Expecting ':' delimiter (column 25)",
        f"  {path}:4: `chosen` is null",
        f"  {path}:6: missing column `rejected`; found `prompt`, `chosen`",
        "Fix them, or go on without them with --skip_bad_rows.",
    ]


def test_bad_rows_are_skipped_when_told_and_counted(tmp_path, caplog):
    path = write_lines(
        tmp_path / "pairs.jsonl", [TEXT, "{", *[{**TEXT, "chosen": ""}] * 6, {**TEXT, "chosen": " Red."}]
    )
    with caplog.at_level(logging.WARNING):
        dataset = load_preferences(path, skip_bad_rows=True)
    assert dataset["chosen"][:] == [" Blue.", " Red."]
    assert f"{path}: skipped 7 bad rows of 9: {path}:2: broken JSON" in caplog.text
    assert f"{path}:6: `chosen` is empty; and 2 more" in caplog.text


def test_a_long_list_is_capped(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [TEXT, *[{**TEXT, "chosen": None}] * 62])
    with pytest.raises(DataError, match=r"62 bad rows of 63:") as caught:
        load_preferences(path)
    assert len(str(caught.value).split("\n")) == 1 + 50 + 2
    assert "\n  and 12 more\n" in str(caught.value)


def test_one_reason_for_all_rows_is_said_once(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b"}] * 3)
    for skip in (False, True):
        with pytest.raises(DataError) as caught:
            load_preferences(path, skip_bad_rows=skip)
        assert str(caught.value) == (
            f"{path}: none of the 3 rows can be used; each: missing column `rejected`; found `prompt`, `chosen`."
        )


def test_no_row_left_after_skipping(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", ["{", {**TEXT, "chosen": ""}])
    with pytest.raises(DataError, match=r"2 bad rows of 2:(.|\n)*No row is left\.$"):
        load_preferences(path, skip_bad_rows=True)


def test_an_empty_file(tmp_path):
    for name, text in (("a.jsonl", ""), ("b.json", "[]"), ("c.csv", "prompt,chosen,rejected\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"{name} is empty; wanted preference rows"):
            load_preferences(str(tmp_path / name))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [TEXT, TEXT, CHAT, CHAT, TEXT],
            "mixes 3 rows of plain text with 2 of messages; wanted one kind.*messages: .*:3",
        ),
        ([CHAT, TEXT, CHAT], "mixes 1 row of plain text with 2 of messages; wanted one kind.*plain text: .*:2"),
    ],
)
def test_mixed_kinds_name_the_first_of_the_few(tmp_path, rows, said):
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    for skip in (False, True):
        with pytest.raises(DataError, match=said):
            load_preferences(path, skip_bad_rows=skip)


def test_identical_pairs_are_kept_and_counted(tmp_path, caplog):
    path = write_lines(tmp_path / "pairs.jsonl", [TEXT, {**TEXT, "rejected": TEXT["chosen"]}, TEXT])
    with caplog.at_level(logging.WARNING):
        assert len(load_preferences(path)) == 3
    assert "chosen and rejected are identical in 1 of 3 rows; they are kept" in caplog.text
    caplog.clear()
    load_preferences(write_lines(tmp_path / "fine.jsonl", [TEXT]))
    assert caplog.text == ""


def test_columns_of_the_result(tmp_path):
    rows = [
        {**CHAT, "id": 1, "tools": [TOOL], "chat_template_kwargs": {"thinking": False}},
        {**CHAT, "id": 2},
    ]
    dataset = load_preferences(write_lines(tmp_path / "pairs.jsonl", rows))
    assert set(dataset.column_names) == {*CHAT, "tools", "chat_template_kwargs"}
    assert dataset["tools"][:] == [json.dumps([TOOL]), None]
    assert dataset["chat_template_kwargs"][:] == ['{"thinking": false}', None]
    plain = load_preferences(write_lines(tmp_path / "plain.jsonl", [CHAT]))
    assert plain.column_names == ["prompt", "chosen", "rejected"]
    assert plain[0] == CHAT


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("oops", "`chat_template_kwargs` holds broken JSON: Expecting value (column 1)"),
        ([1], "`chat_template_kwargs` is list; wanted an object (or its JSON text)"),
        ("[1]", "`chat_template_kwargs` is list; wanted an object (or its JSON text)"),
        (5, "`chat_template_kwargs` is int; wanted an object (or its JSON text)"),
        ({"tokenize": False}, "`chat_template_kwargs` has `tokenize`, which is set here and cannot be changed"),
    ],
)
def test_template_options_that_are_none(tmp_path, options, said):
    path = write_lines(tmp_path / "pairs.jsonl", [CHAT, {**CHAT, "chat_template_kwargs": options}])
    with pytest.raises(DataError) as caught:
        load_preferences(path)
    assert str(caught.value).split("\n")[:2] == [f"{path}: 1 bad row of 2:", f"  {path}:2: {said}"]
    assert load_preferences(path, skip_bad_rows=True).to_list() == [CHAT]


def test_rows_nested_deeper_than_python_goes():
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    rows = [(f"rows[{index}]", row) for index, row in enumerate([CHAT, {**CHAT, "prompt": [{**USER, "x": deep}]}])]
    with pytest.raises(DataError, match=r"rows\[1\]: is nested too deeply"):
        _build(rows, "rows", None, False)


def test_reference_log_probs_are_left_out_and_told(tmp_path, caplog):
    rows = [TEXT, {**TEXT, "ref_chosen_logps": -1.5, "ref_rejected_logps": "no number"}]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        assert load_preferences(path).to_list() == [TEXT, TEXT]
    said = "ref_chosen_logps and ref_rejected_logps are ignored: the reference log-probs are computed in training."
    assert caplog.messages == [f"{path}: {said}"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(list(normalize_dataset(stream(rows[1:])))) == 1
    assert caplog.messages == [f"train_dataset: {said}"]


def test_calls_of_different_functions_share_a_column(tmp_path):
    other: dict[str, Any] = json.loads(json.dumps(CALL).replace('{"at": 1}', '{"at": "home", "by": [2]}'))
    dataset = load_preferences(
        write_lines(tmp_path / "a.jsonl", [{**CHAT, "chosen": [CALL]}, {**CHAT, "chosen": [other]}])
    )
    calls = [for_template(row)[0]["tool_calls"][0] for row in dataset["chosen"]]
    assert [call["function"]["arguments"] for call in calls] == [{"at": 1}, {"at": "home", "by": [2]}]


def test_a_dataset_in_hand():
    rows = [{"chosen": [USER, BLUE], "rejected": [USER, GREEN], "score": 1.0}] * 2
    normal = normalize_dataset(Dataset.from_list(rows))
    assert isinstance(normal, Dataset)
    assert normal.to_list() == [CHAT] * 2

    bad = Dataset.from_list([TEXT, {**TEXT, "chosen": None}, {**TEXT, "chosen": ""}])
    with pytest.raises(DataError, match=r"eval\[1\]: `chosen` is null\n  eval\[2\]: `chosen` is empty"):
        normalize_dataset(bad, where="eval")
    kept = normalize_dataset(bad, skip_bad_rows=True)
    assert isinstance(kept, Dataset)
    assert kept.to_list() == [TEXT]
    with pytest.raises(DataError, match="train_dataset is empty"):
        normalize_dataset(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}))


def test_a_tokenized_dataset_comes_back_as_it_is():
    tokenized = Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]})
    assert normalize_dataset(tokenized) is tokenized


def stream(rows: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda rows: iter(rows), gen_kwargs={"rows": rows})


def test_an_iterable_dataset_is_mapped_lazily(caplog):
    rows = [{"chosen": [USER, BLUE], "rejected": [USER, GREEN], "score": 1.0}]
    assert list(normalize_dataset(stream(rows))) == [{**CHAT, **NO_OPTIONS}]
    # a null row as Arrow has it, and a column that the first row lacks
    bad = [TEXT, {**TEXT, "chosen": ""}, dict.fromkeys([*TEXT, "score"]), {**TEXT, "prompt": "Sea?", "score": 1}]
    lazy = iter(normalize_dataset(stream(bad)))
    assert next(lazy) == {**TEXT, **NO_OPTIONS}
    with pytest.raises(DataError, match=r"^train_dataset\[1\]: `chosen` is empty\.$"):
        next(lazy)
    with caplog.at_level(logging.WARNING):
        kept = normalize_dataset(stream(bad), skip_bad_rows=True)
        for _ in range(2):
            assert list(kept) == [{**TEXT, **NO_OPTIONS}, {**TEXT, **NO_OPTIONS, "prompt": "Sea?"}]
    assert caplog.messages == [  # said once, also when the stream is read again
        "train_dataset[1]: skipped: `chosen` is empty (1 bad row so far)",
        "train_dataset[2]: skipped: `chosen` is null (2 bad rows so far)",
    ]


@pytest.mark.parametrize("bad", [dict.fromkeys(TEXT), {"chosen": None}])
def test_a_stream_that_starts_with_a_null_row(bad):
    with pytest.raises(DataError, match=r"train_dataset\[0\]: `chosen` is null"):
        list(normalize_dataset(stream([bad, TEXT])))
    assert list(normalize_dataset(stream([bad, TEXT]), skip_bad_rows=True)) == [{**TEXT, **NO_OPTIONS}]


@pytest.mark.parametrize(("rows", "said"), [([], "eval is empty"), ([None, TEXT], r"eval\[0\] is NoneType; wanted an")])
def test_a_stream_without_a_first_row(rows, said):
    with pytest.raises(DataError, match=said):
        normalize_dataset(stream(rows), where="eval")


def test_a_stream_is_read_as_it_is_asked_for():
    read: list[int] = []

    def rows():
        for number in range(5):
            read.append(number)
            yield {"chosen": f"Sky {number}? Blue.", "rejected": f"Sky {number}? Green."}

    normal = normalize_dataset(IterableDataset.from_generator(rows))
    assert read == [0]  # to see what the columns are
    assert next(iter(normal)) == {"prompt": "Sky 0?", "chosen": " Blue.", "rejected": " Green.", **NO_OPTIONS}
    assert read == [0, 0]


def test_a_stream_of_llama_factory_rows():
    alpaca = {"instruction": "Sky?", "input": "", "chosen": "Blue.", "rejected": "Green.", "tools": [TOOL]}
    sharegpt = {
        "conversations": [{"from": "human", "value": "Sky?"}],
        "chosen": {"from": "gpt", "value": "Blue."},
        "rejected": {"from": "gpt", "value": "Green."},
        "chat_template_kwargs": {"thinking": False},
    }
    assert list(normalize_dataset(stream([alpaca, sharegpt]))) == [
        {**CHAT, "tools": json.dumps([TOOL]), "chat_template_kwargs": None},
        {**CHAT, "tools": None, "chat_template_kwargs": '{"thinking": false}'},
    ]


def test_real_pairs(shared_data):
    source = shared_data / "dpo_en_demo.json"
    dataset = load_preferences(str(source))
    raw = json.loads(source.read_text(encoding="utf-8"))
    assert len(dataset) == len(raw) == 300
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for record, row in zip(dataset, raw, strict=True):
        assert isinstance(record, dict)
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        assert record["prompt"] == turns
        assert record["chosen"] == [{"role": "assistant", "content": row["chosen"]["value"]}]
        assert record["rejected"] == [{"role": "assistant", "content": row["rejected"]["value"]}]
    by_name = load_preferences("dpo_en_demo", dataset_dir=str(shared_data))
    assert by_name[:] == dataset[:]
