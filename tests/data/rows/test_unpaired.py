"""Rows of one answer and a label, in every form: prompt, completion, label; or one sentence that says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset

from fastdpo.data.errors import DataError, RowError
from fastdpo.data.formats import load_preferences, normalize_dataset, stream_preferences
from fastdpo.data.rows.messages import for_template
from fastdpo.data.rows.preference import Unpaired, preference_from_row
from fastdpo.data.rows.unpaired import is_unpaired, read_label

ASK, THREE = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
CHAT = Unpaired([ASK], [THREE], True)
FORMS: dict[str, tuple[dict[str, Any], Unpaired]] = {
    "texts": ({"prompt": "1 + 2?", "completion": "3"}, Unpaired("1 + 2?", "3", True)),
    "an answer that repeats the question": (
        {"prompt": "Why?", "completion": "Why? So."},
        Unpaired("Why?", "Why? So.", True),
    ),
    "texts, the answer as response": ({"prompt": "1 + 2?", "response": "3"}, Unpaired("1 + 2?", "3", True)),
    "messages": ({"prompt": [ASK], "completion": [THREE]}, CHAT),
    "one message": ({"prompt": [ASK], "completion": THREE}, CHAT),
    "messages and a text answer": ({"prompt": [ASK], "completion": "3"}, CHAT),
    "text prompt, message answer": ({"prompt": "1 + 2?", "completion": [THREE]}, CHAT),
    "the answer holds the prompt": ({"prompt": [ASK], "completion": [ASK, THREE]}, CHAT),
    "no prompt, a whole dialogue": ({"completion": [ASK, THREE]}, CHAT),
    "text prompt beside a whole dialogue": ({"prompt": "1 + 2?", "completion": [ASK, THREE]}, CHAT),
    "sharegpt turns": ({"prompt": [HUMAN], "completion": [GPT]}, CHAT),
    "messages that end with the answer": ({"messages": [ASK, THREE]}, CHAT),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, CHAT),
    "sharegpt, a system column": (
        {"conversations": [HUMAN, GPT], "system": "Be brief."},
        Unpaired([SYSTEM, ASK], [THREE], True),
    ),
    "alpaca": ({"instruction": "1 + 2?", "input": "", "output": "3"}, CHAT),
    "alpaca with history": (
        {"instruction": "1 + 2?", "output": "3", "history": [["1 + 2?", "3"]], "system": "Be brief."},
        Unpaired([SYSTEM, ASK, THREE, ASK], [THREE], True),
    ),
    "query and response": ({"query": "1 + 2?", "response": "3"}, CHAT),
    "question and answer": ({"question": "1 + 2?", "answer": "3"}, CHAT),
    "messages as JSON text": ({"prompt": json.dumps([ASK]), "completion": json.dumps([THREE])}, CHAT),
    "a prompt that begins the answer": (
        {"prompt": [ASK, {"role": "assistant", "content": "It is "}], "completion": [THREE]},
        Unpaired([ASK, {"role": "assistant", "content": "It is "}], [THREE], True),
    ),
}


@pytest.mark.parametrize("tag", ["label", "kto_tag"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tag: str) -> None:
    row, wanted = FORMS[form]
    assert is_unpaired({**row, tag: True})
    assert preference_from_row({**row, tag: True}) == wanted
    assert preference_from_row({**row, tag: False}) == Unpaired(wanted.prompt, wanted.completion, False)


def test_messages_keep_every_key_and_tools_go_along() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    given = preference_from_row({"prompt": [ASK], "completion": [CALL], "label": 1, "tools": json.dumps([tool])})
    assert isinstance(given, Unpaired)
    assert given.tools == [tool]
    assert given.completion[0]["tool_calls"] == CALL["tool_calls"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(True, True), (0, False), (1.0, True), ("true", True), ("False", False), (" undesirable", False), ("1", True)],
)
def test_labels(value: Any, wanted: bool) -> None:
    assert read_label(value, "label") is wanted


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "?", "completion": "3", "label": None},
            "`label` is None; wanted true (a desirable answer) or false",
        ),
        ({"prompt": "?", "completion": "3", "label": "good"}, "`label` is 'good'; wanted true"),
        ({"prompt": "?", "completion": "3", "label": 2}, "`label` is 2; wanted true"),
        ({"prompt": "?", "completion": "3", "label": float("nan")}, "`label` is nan; wanted true"),
        ({"prompt": "?", "completion": " ", "label": True}, "`completion` is empty"),
        ({"completion": "3", "label": True}, "no `prompt`"),
        ({"completion": "3", "label": True, "context": "?"}, "no `prompt`, but `context` looks like one"),
        ({"completion": [THREE], "label": True}, "`completion` has one turn alone"),
        ({"prompt": "?", "kto_tag": True}, "has `kto_tag`, but no `completion`"),
        ({"messages": [ASK], "label": True}, "`messages` is not a list of two messages or more"),
        (
            {"messages": [ASK, ASK], "label": True},
            "`messages` does not end with an assistant turn, which `label` is about",
        ),
        ({"prompt": [ASK], "completion": [THREE, ASK], "label": True}, "`completion` ends with a user turn"),
        ({"prompt": "?", "completion": "3", "label": True, "images": ["a.png"]}, "`images` holds image data"),
        ({"prompt": "?", "completion": 3, "label": True}, "`completion` is int; wanted text or a list of messages"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError) as caught:
        preference_from_row(row)
    assert said in str(caught.value)


ROWS = [
    {"prompt": [ASK], "completion": [THREE], "label": True},
    {"prompt": [ASK], "completion": [CALL], "label": False},
]


def test_columns_of_a_data_set(tmp_path: Path) -> None:
    """A list in memory, a file, a stream and a csv file give the same rows; a normalized data set stays as it is."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    datasets = [
        load_preferences(str(file)),
        normalize_dataset(IterableDataset.from_generator(lambda: iter(ROWS))),
        stream_preferences(str(file)),
    ]
    for dataset in datasets:
        rows = list(dataset)
        assert [row["label"] for row in rows] == [True, False]
        assert for_template(rows[1]["completion"])[0]["tool_calls"] == CALL["tool_calls"]
        assert {"prompt", "completion", "label"} <= rows[0].keys()
        assert "chosen" not in rows[0]
    assert normalize_dataset(datasets[0]) is datasets[0]
    (tmp_path / "rows.csv").write_text("prompt,completion,label\n1 + 2?,3,True\n1 + 2?,4,False\n")
    table = load_preferences(str(tmp_path / "rows.csv"))
    assert table[:] == {"prompt": ["1 + 2?"] * 2, "completion": ["3", "4"], "label": [True, False]}


def test_pairs_and_single_answers_do_not_mix(tmp_path: Path) -> None:
    pair = {"prompt": "?", "chosen": "3", "rejected": "4"}
    single = {"prompt": "?", "completion": "3", "label": True}
    (tmp_path / "mixed.json").write_text(json.dumps([pair, single, pair]))
    with pytest.raises(DataError, match=r"mixes 2 rows of pairs with 1 of single answers.*: .*mixed\.json:1 \(row 2\)"):
        load_preferences(str(tmp_path / "mixed.json"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (single, pair)))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: is a pair among unpaired rows"):
        list(stream_preferences(str(tmp_path / "rows.jsonl")))
    kept = list(stream_preferences(str(tmp_path / "rows.jsonl"), skip_bad_rows=True))
    assert [row["completion"] for row in kept] == ["3"]


ENTRIES = {
    "alpaca": (
        {"columns": {"prompt": "q", "response": "a", "kto_tag": "good"}},
        {"q": "1 + 2?", "a": "3", "good": True},
    ),
    "sharegpt": (
        {"formatting": "sharegpt", "columns": {"messages": "talk", "kto_tag": "good"}},
        {"talk": [HUMAN, GPT], "good": True},
    ),
    "openai": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        {"messages": [ASK, THREE], "label": True},
    ),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_entries_of_a_dataset_info(tmp_path: Path, kind: str) -> None:
    entry, row = ENTRIES[kind]
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}))
    for source, options in (
        ("mine", {"dataset_dir": str(tmp_path)}),
        (str(tmp_path), {}),
        (f"{tmp_path}/rows.json", {}),
    ):
        (given,) = list(load_preferences(source, **options))
        assert given["label"] is True
        assert for_template(given["prompt"]) == [ASK]
        assert for_template(given["completion"]) == [THREE]


def test_an_entry_names_its_faults(tmp_path: Path) -> None:
    entry, row = ENTRIES["alpaca"]
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "good": "x"}, {"q": "?", "good": True}]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}))
    with pytest.raises(DataError, match=r"(?s)`good` is 'x'; wanted true.*missing column `a`"):
        load_preferences(str(tmp_path))
