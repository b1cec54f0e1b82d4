"""A message reaches the chat template as it was written, whatever other rows hold."""

import datetime
import json
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset, load_from_disk

from fastdpo.data.errors import RowError
from fastdpo.data.formats import load_preferences, normalize_dataset, preference_from_row
from fastdpo.data.rows.messages import MARK, clean_messages, for_template, pack_messages, parse_template_options
from fastdpo.data.tokenize_row import tokenize_row

USER = {"role": "user", "content": "Look it up."}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}], **more}


# keys of the same name and other types, nulls at every depth but the first, numbers that no column holds
MESSAGES: list[dict[str, Any]] = [
    call({"x": 1, "opt": None, "deep": [{"y": None}, None, []]}),
    call({"x": "one", "opt": {"z": None}}, reasoning_content="Hm.", thinking=["a", {"b": None}]),
    call({}, id=2**80, score=1.5, flag=True),
    call({"x": -(2**70)}, id="text", name="helper", flag={"a": None}),
    {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "look"},
    {"role": "assistant", "content": "[1]", "reasoning_content": "[1]", "note": '"3"', "extra": "null"},
    {"role": "assistant", "content": f"{MARK}[1]", "reasoning_content": f"{MARK}no JSON", "empty": ""},
]
ANSWERS = [message for message in MESSAGES if message["role"] == "assistant"]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"default": None, "enum": [None, 1]}}}]


def row(answer: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [USER], "chosen": [answer], "rejected": [{"role": "assistant", "content": "No."}]}


def rows_of_file(rows, path) -> Any:
    (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(str(path / "a.jsonl"))


def rows_of_stream(rows, path) -> Any:
    return normalize_dataset(IterableDataset.from_generator(lambda rows: iter(rows), gen_kwargs={"rows": rows}))


def rows_saved_and_looked_at_again(rows, path) -> Any:
    rows_of_file(rows, path).save_to_disk(str(path / "saved"))
    return normalize_dataset(load_from_disk(str(path / "saved")))


@pytest.mark.parametrize("way", [rows_of_file, rows_of_stream, rows_saved_and_looked_at_again])
def test_the_template_gets_what_was_written(way, tmp_path):
    options = {"style": None, "deep": {"a": [None]}}
    rows = [{**row(answer), "tools": TOOLS, "chat_template_kwargs": options} for answer in ANSWERS]
    normal = list(way(rows, tmp_path))
    assert [for_template(stored["chosen"]) for stored in normal] == [[answer] for answer in ANSWERS]
    assert all(json.loads(stored["tools"]) == TOOLS for stored in normal)
    assert all(json.loads(stored["chat_template_kwargs"]) == options for stored in normal)


def test_a_column_of_messages_holds_texts(tmp_path):
    table = rows_of_file([row(answer) for answer in ANSWERS], tmp_path).data
    fields = table.schema.field("chosen").type.value_type
    assert {field.type for field in fields} == {pa.string()}
    assert {"tool_calls", "id", "flag", "thinking"} <= {field.name for field in fields}


def test_packing_is_undone():
    assert for_template(pack_messages(MESSAGES, "prompt")) == MESSAGES
    assert clean_messages(pack_messages(MESSAGES, "prompt"), "prompt") == MESSAGES
    # negative control: without the mark, text that is JSON would not be told from a value
    assert for_template(json.loads(json.dumps(pack_messages(MESSAGES, "p")).replace(MARK, ""))) != MESSAGES


def test_null_keys_of_a_message_are_absent_ones():
    messages = clean_messages([{**USER, "name": None, "tool_calls": None}, {**call({"a": None}), "content": None}], "p")
    assert messages == [USER, call({"a": None})]


@pytest.mark.parametrize(
    ("arguments", "opened"),
    [('{"x": null}', {"x": None}), (None, {}), ("", {}), ({"x": None}, {"x": None}), ("[1]", [1])],
)
def test_arguments_are_objects_also_where_they_came_as_text(arguments, opened):
    assert clean_messages([call(arguments)], "p") == [call(opened)]


def test_calls_as_json_text():
    calls = call({"x": None})["tool_calls"]
    assert clean_messages([{**call({}), "tool_calls": json.dumps(calls)}], "p") == [call({"x": None})]


def test_values_that_json_lacks():
    dated = {**USER, "at": {"day": datetime.date(2024, 2, 3), "time": datetime.datetime(2024, 2, 3, 4)}}
    (packed,) = pack_messages([dated], "prompt")
    assert for_template([packed])[0]["at"] == {"day": "2024-02-03", "time": "2024-02-03T04:00:00"}
    with pytest.raises(RowError, match=r"`prompt\[0\]\.x` cannot be stored as JSON \(it holds bytes\)"):
        pack_messages([{**USER, "x": [b"a"]}], "prompt")
    with pytest.raises(RowError, match=r"`prompt\[0\]\.x` has half a surrogate pair"):
        pack_messages([{**USER, "x": ["\ud83d"]}], "prompt")
    with pytest.raises(RowError, match=r"`prompt\[0\]\.name` has half a surrogate pair"):
        pack_messages([{**USER, "name": "\ud83d"}], "prompt")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "A"}], "A"),
        ([{"type": "text", "text": "A "}, {"type": "text", "value": "B", "text": None}], "A B"),
        ([{"text": "A"}], "A"),
    ],
)
def test_text_parts_are_joined(content, text):
    assert clean_messages([{"role": "user", "content": content}], "p") == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            [{"type": "text", "text": "A"}, {"type": "image_url", "image_url": {}}],
            "`p[0].content[1]` is a part of type",
        ),
        ([{"type": "image"}], "only text is trained here (not models of AutoModelForImageTextToText)"),
        ([{"type": "text"}], "`p[0].content[0].text` is null"),
        ([{"type": "text", "text": 5}], "`p[0].content[0].text` is int; wanted text"),
        ([], "`p[0].content` is an empty list"),
        (["A"], "`p[0].content` is list; wanted text, or parts"),
        ({"type": "text"}, "`p[0].content` is dict; wanted text"),
    ],
)
def test_parts_that_are_no_text(content, said):
    with pytest.raises(RowError) as caught:
        clean_messages([{"role": "user", "content": content}], "p")
    assert said in str(caught.value)


def test_reasoning_beside_messages_is_trained(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}</s>{% endfor %}"
    )
    chosen = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    rejected = {"role": "assistant", "content": "5"}
    answers = {"chosen": chosen, "rejected": rejected}
    forms = [
        {"prompt": [USER], "chosen": [chosen], "rejected": [rejected]},
        {"messages": [USER], **answers},
        {
            "conversations": [{"from": "human", "value": USER["content"]}],
            "chosen": {"from": "gpt", "value": "4", "reasoning_content": "two and two"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"messages": [USER, chosen], "rejected_response": "5"},
    ]
    ids = []
    for form in forms:
        (stored,) = normalize_dataset(IterableDataset.from_generator(lambda form=form: iter([form])))
        ids.append(tokenize_row(stored, tokenizer))
    assert "two and two4" in tokenizer.decode(ids[0]["chosen_ids"])
    assert ids == [ids[0]] * len(forms)


def test_tools_as_texts_in_a_list():
    pair = row({"role": "assistant", "content": "4"})
    assert preference_from_row({**pair, "tools": [json.dumps(tool) for tool in TOOLS]}).tools == TOOLS


def test_nulls_in_template_options_stay():
    assert parse_template_options('{"documents": null}') == {"documents": None}


def test_a_dataset_of_structs_keeps_what_arrow_has():
    dataset = Dataset.from_list([row(call({"x": 1})), row({"role": "assistant", "content": "3", "name": "n"})])
    normal = normalize_dataset(dataset)
    assert for_template(normal[0]["chosen"]) == [call({"x": 1})]
    assert for_template(normal[1]["chosen"]) == [{"role": "assistant", "content": "3", "name": "n"}]
