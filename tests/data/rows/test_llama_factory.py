"""LLaMA-Factory's ranking rows, with and without the dataset_info.json that describes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdpo.data.errors import RowError
from fastdpo.data.formats import DataError, Preference, load_preferences, preference_from_row
from fastdpo.data.rows.llama_factory import Columns

ALPACA = {"instruction": "Add", "input": "1 and 2", "chosen": "3", "rejected": "4"}
SHAREGPT: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "1 + 2?"}],
    "chosen": {"from": "gpt", "value": "3"},
    "rejected": {"from": "gpt", "value": "4"},
}
THREE = [{"role": "assistant", "content": "3"}]
FOUR = [{"role": "assistant", "content": "4"}]
BARE_TOOL = {"name": "add", "parameters": {}}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (ALPACA, [user("Add\n1 and 2")]),
        ({**ALPACA, "input": ""}, [user("Add")]),
        ({**ALPACA, "input": None}, [user("Add")]),
        ({**ALPACA, "instruction": ""}, [user("1 and 2")]),
        ({**ALPACA, "system": "Be exact.", "id": 4}, [system("Be exact."), user("Add\n1 and 2")]),
        (
            {**ALPACA, "system": "", "history": [["Hi", "Hello"]]},
            [user("Hi"), {"role": "assistant", "content": "Hello"}, user("Add\n1 and 2")],
        ),
        (SHAREGPT, [user("1 + 2?")]),
        ({**SHAREGPT, "system": "Be exact."}, [system("Be exact."), user("1 + 2?")]),
        (
            {**SHAREGPT, "conversations": turns(("system", "A"), ("human", "B")), "system": "lost to the turn"},
            [system("A"), user("B")],
        ),
        (
            {**SHAREGPT, "conversations": turns(("human", "A"), ("gpt", "B"), ("human", "C"))},
            [user("A"), {"role": "assistant", "content": "B"}, user("C")],
        ),
        (
            {"conversations": [user("A")], "chosen": THREE[0], "rejected": FOUR[0]},
            [user("A")],
        ),
        ({"messages": [user("A")], "chosen": THREE[0], "rejected": FOUR[0]}, [user("A")]),
        ({**SHAREGPT, "chosen": "3", "rejected": "4"}, [user("1 + 2?")]),
        ({**SHAREGPT, "chosen": [SHAREGPT["chosen"]]}, [user("1 + 2?")]),
        ({"messages": [user("A")], "chosen": "3", "rejected": "4"}, [user("A")]),
        ({"messages": [user("A")], "chosen": THREE, "rejected": FOUR}, [user("A")]),
    ],
)
def test_rows_known_by_their_columns(row, prompt):
    assert preference_from_row(row) == Preference(prompt, THREE, FOUR)


def test_calls_observations_and_tools():
    called = turns(
        ("human", "1 + 2?"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", "3")
    )
    record = preference_from_row({**SHAREGPT, "conversations": called, "tools": json.dumps([BARE_TOOL])})
    assert record.prompt == [
        user("1 + 2?"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3"},
    ]
    assert record.tools == [{"type": "function", "function": BARE_TOOL}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ALPACA, "chosen": None}, "`chosen` is null"),
        ({**ALPACA, "rejected": ""}, "`rejected` is empty"),
        ({**ALPACA, "rejected": {"value": "4"}}, "`rejected` is dict; wanted text beside an instruction"),
        ({**ALPACA, "instruction": None}, "`instruction` is null"),
        ({**ALPACA, "instruction": "", "input": ""}, "`instruction` is empty"),
        ({**ALPACA, "input": 3}, "`input` is int; wanted text"),
        ({**ALPACA, "history": [["only one"]]}, "`history` is not a list of [user text, assistant text]"),
        ({"instruction": "a", "chosen": "b"}, "missing column `rejected`; found `instruction`, `chosen`"),
        ({**SHAREGPT, "conversations": []}, "`conversations` is empty; wanted a list of turns"),
        ({**SHAREGPT, "conversations": "a"}, "`conversations` is str; wanted a list of turns"),
        ({**SHAREGPT, "conversations": turns(("human", "A"), ("gpt", "B"))}, "does not end with a user turn"),
        ({**SHAREGPT, "conversations": turns(("system", "A"))}, "does not end with a user turn"),
        (
            {**SHAREGPT, "conversations": turns(("system", "S"), ("human", "A"), ("human", "B"))},
            "`conversations[2]` is out of turn",
        ),
        ({**SHAREGPT, "conversations": turns(("gpt", "A"), ("human", "B"))}, "`conversations[0]` is out of turn"),
        (
            {**SHAREGPT, "conversations": turns(("narrator", "A"))},
            "`conversations[0].from` is 'narrator'; wanted one of human, gpt",
        ),
        ({**SHAREGPT, "conversations": ["A"]}, "`conversations[0]` is not a turn with `from` and `value`"),
        ({**SHAREGPT, "conversations": [{"from": "human"}]}, "`conversations[0].value` is null"),
        ({**SHAREGPT, "chosen": {"from": "human", "value": "3"}}, "`chosen` is a user turn; wanted an assistant turn"),
        ({**SHAREGPT, "chosen": {"from": "gpt", "value": ""}}, "`chosen.value` is empty"),
        (
            {**SHAREGPT, "chosen": {"from": "function_call", "value": "add"}},
            "`chosen.value` is not JSON text of a call",
        ),
        ({**SHAREGPT, "tools": "[add"}, "`tools` holds broken JSON"),
    ],
)
def test_bad_rows(row, reason):
    with pytest.raises(RowError) as caught:
        preference_from_row(row)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (
            Columns("alpaca", {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad", "system": "sys"}),
            {"q": "A", "more": "B", "good": "3", "bad": "4", "sys": "S", "input": "x", "prompt": "x", "chosen": 0},
        ),
        (
            Columns("sharegpt", {"messages": "talk", "chosen": "good", "rejected": "bad", "system": "sys"}),
            {"talk": turns(("human", "A\nB")), "good": SHAREGPT["chosen"], "bad": SHAREGPT["rejected"], "sys": "S"},
        ),
        (
            Columns(
                "sharegpt",
                {},
                {
                    "role_tag": "who",
                    "content_tag": "says",
                    "user_tag": "U",
                    "assistant_tag": "A",
                    "system_tag": "S",
                },
            ),
            {
                "conversations": [{"who": "S", "says": "S"}, {"who": "U", "says": "A\nB"}],
                "chosen": {"who": "A", "says": "3"},
                "rejected": {"who": "A", "says": "4"},
            },
        ),
        (
            Columns("openai", {"messages": "messages"}),
            {"messages": [system("S"), user("A\nB")], "chosen": THREE[0], "rejected": FOUR[0], "prompt": "metadata"},
        ),
    ],
    ids=["alpaca", "sharegpt", "tags", "openai"],
)
def test_an_entry_names_columns_and_tags(columns, row):
    assert preference_from_row(row, columns) == Preference([system("S"), user("A\nB")], THREE, FOUR)


def test_columns_that_an_entry_leaves_out_are_unused():
    row = {**ALPACA, "system": "S"}
    record = preference_from_row(row, Columns("alpaca", {"prompt": "instruction"}))
    assert record.prompt == [user("Add")]


@pytest.fixture
def folder(tmp_path) -> Path:
    entries = {
        "math": {
            "file_name": "math.json",
            "ranking": True,
            "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        },
        "kto": {"file_name": "kto.json"},
        "pictures": {"file_name": "p.json", "ranking": True, "columns": {"images": "images"}},
        "odd": {"file_name": "p.json", "ranking": True, "formatting": "csv"},
        "script": {"script_url": "x", "ranking": True},
        "gone": {"file_name": "gone.json", "ranking": True},
        "parts": {"file_name": "parts", "ranking": True},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    (tmp_path / "math.json").write_text(json.dumps([{"q": "Add", "good": "3", "bad": "4"}]))
    (tmp_path / "parts").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "parts" / name).write_text(json.dumps({**ALPACA, "instruction": name}))
    return tmp_path


def test_entries(folder):
    expected = [{"prompt": [user("Add")], "chosen": THREE, "rejected": FOUR}]
    assert load_preferences("math", dataset_dir=str(folder)).to_list() == expected
    # the entry beside a file describes it too
    assert load_preferences(str(folder / "math.json")).to_list() == expected
    assert load_preferences(str(folder / "math.json"), dataset_dir=str(folder)).to_list() == expected
    parts = load_preferences("parts", dataset_dir=str(folder))["prompt"][:]
    assert [prompt[0]["content"] for prompt in parts] == ["a.jsonl\n1 and 2", "b.jsonl\n1 and 2"]


def test_a_folder_with_one_entry_needs_no_name(folder):
    with pytest.raises(DataError, match=r"has 6 preference entries \(math, .*; choose one with --dataset_name NAME"):
        load_preferences(str(folder))
    entries = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({name: entries[name] for name in ("math", "kto")}))
    assert len(load_preferences(str(folder))) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("maths", "has no entry `maths`; did you mean `math`"),
        ("zzz", r"has no entry `zzz` \(it has math, kto"),
        ("kto", 'entry `kto` is not a preference dataset: it has no "ranking": true'),
        ("pictures", "entry `pictures` has images; only text is supported"),
        ("odd", "formatting is 'csv'; wanted alpaca, sharegpt or openai"),
        ("script", "has neither file_name nor hf_hub_url"),
        ("gone", "entry `gone` names .*gone.json, which does not exist"),
    ],
)
def test_entries_that_cannot_be_used(folder, name, said):
    with pytest.raises(DataError, match=said):
        load_preferences(name, dataset_dir=str(folder))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"file_name": 5}, r"entry `math`: file_name is int; wanted text\.$"),
        ({"hf_hub_url": ["x"]}, "entry `math`: hf_hub_url is list; wanted text"),
        ({"file_name": "math.json", "split": 1}, "entry `math`: split is int; wanted text"),
        ({"file_name": "math.json", "columns": ["a"]}, "entry `math`: columns is not an object"),
        ({"file_name": "math.json", "columns": {"prompt": 1}}, "entry `math`: columns is not an object"),
        ({"file_name": "math.json", "tags": "role"}, "entry `math`: tags is not an object"),
    ],
)
def test_entries_of_wrong_types(folder, entry, said):
    (folder / "dataset_info.json").write_text(json.dumps({"math": {**entry, "ranking": True}}))
    with pytest.raises(DataError, match=said):
        load_preferences("math", dataset_dir=str(folder))
    if entry.get("file_name") == "math.json" and "split" not in entry:  # what the file beside it reads by, too
        with pytest.raises(DataError, match=said):
            load_preferences(str(folder / "math.json"))


def test_a_null_in_columns_is_a_part_left_out(folder):
    entry = {"file_name": "math.json", "ranking": True}
    entry["columns"] = {"prompt": "q", "query": None, "chosen": "good", "rejected": "bad"}
    (folder / "dataset_info.json").write_text(json.dumps({"math": entry}))
    assert load_preferences("math", dataset_dir=str(folder))[0]["prompt"] == [user("Add")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n"a"', r"dataset_info\.json:2: broken JSON: Expecting ':' delimiter \(column 4\)"),
        ("[]", "holds list; wanted one object"),
        ("[" * 100_000, "JSON nested too deeply"),
        (b"\xff", r"not UTF-8 text \(invalid start byte at byte 0\)"),
    ],
    ids=["broken", "list", "nested", "bytes"],
)
def test_a_broken_dataset_info(folder, text, said):
    (folder / "dataset_info.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said):
        load_preferences("math", dataset_dir=str(folder))
