"""Rows of other tools become pairs, and one that lacks something says what."""

import logging
from typing import Any

import pytest

from fastdpo.data.errors import RowError
from fastdpo.data.formats import Preference, normalize_dataset, preference_from_row
from fastdpo.data.rows.forms import parse_dialogue
from fastdpo.data.rows.unpaired import is_unpaired

ASK = {"role": "user", "content": "1 + 2?"}
SYSTEM = {"role": "system", "content": "Add."}
THREE = {"role": "assistant", "content": "3"}
FOUR = {"role": "assistant", "content": "4"}
RECORD = Preference([ASK], [THREE], [FOUR])
TOLD = Preference([SYSTEM, ASK], [THREE], [FOUR])
EARLIER = Preference(
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, ASK], [THREE], [FOUR]
)


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


def weighed(message: dict[str, str], weight: float) -> dict[str, Any]:
    parts = [{"type": "text", "value": message["content"]}]
    return {"role": message["role"], "content": parts, "loss_weight": weight}


def called(*values: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "add", "arguments": {"to": value}}} for value in values]


GPT, WORSE = ("gpt", "3"), ("gpt", "4")
HUMAN = ("human", "1 + 2?")
PKU = {"prompt": "1 + 2?", "response_0": "4", "response_1": "3", "better_response_id": 1, "safer_response_id": 0}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # sharegpt turns wherever messages may stand
        ({"chosen": turns(HUMAN, GPT), "rejected": turns(HUMAN, WORSE)}, RECORD),
        ({"prompt": turns(HUMAN), "chosen": turns(GPT), "rejected": turns(WORSE)}, RECORD),
        ({"prompt": "1 + 2?", "chosen": turns(HUMAN, GPT), "rejected": turns(HUMAN, WORSE)}, RECORD),
        ({"prompt": "1 + 2?", "chosen": turns(GPT)[0], "rejected": turns(WORSE)[0]}, RECORD),
        (
            {"chosen": turns(("system", "Add."), HUMAN, GPT), "rejected": turns(("system", "Add."), HUMAN, WORSE)},
            TOLD,
        ),
        ({"conversations": turns(HUMAN), "chosen": turns(GPT), "rejected": turns(WORSE)}, RECORD),
        # ms-swift
        ({"messages": [ASK, THREE], "rejected_response": "4"}, RECORD),
        ({"messages": [ASK, THREE], "rejected_response": FOUR, "system": "Add."}, TOLD),
        ({"messages": [ASK, THREE], "rejected_response": [FOUR]}, RECORD),
        ({"messages": [SYSTEM, ASK, THREE], "rejected_messages": [SYSTEM, ASK, FOUR]}, TOLD),
        ({"conversations": turns(HUMAN, GPT), "rejected_response": "4"}, RECORD),
        ({"query": "1 + 2?", "response": "3", "rejected_response": "4", "history": [["Hi", "Hello"]]}, EARLIER),
        ({"query": "1 + 2?", "response": "3", "rejected_response": "4", "system": "Add.", "history": None}, TOLD),
        (
            {
                "conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "1 + 2?", "assistant": "3"}],
                "rejected_response": "4",
            },
            EARLIER,
        ),
        ({"instruction": "1 +", "input": "2?", "output": "3", "rejected_response": "4"}, "1 +\n2?"),
        # LLaMA-Factory's older and newer pairs
        ({"instruction": "1 +", "input": "2?", "output": ["3", "4"]}, "1 +\n2?"),
        ({"chosen_messages": [ASK, THREE], "rejected_messages": [ASK, FOUR]}, RECORD),
        # Argilla, Intel and others
        ({"instruction": "1 + 2?", "chosen_response": "3", "rejected_response": "4", "chosen_rating": 5}, RECORD),
        (
            {"prompt": "1 + 2?", "chosen_response": "3", "rejected_response": "4"},
            Preference("1 + 2?", "3", "4"),
        ),
        ({"system": "Add.", "question": "1 + 2?", "chosen": "3", "rejected": "4"}, TOLD),
        ({"system": "", "input": "1 + 2?", "chosen": "3", "rejected": "4", "generations": ["3", "4"]}, RECORD),
        # dialogues in text
        (
            {"chosen": "\n\nHuman: 1 + 2?\n\nAssistant: 3", "rejected": "\n\nHuman: 1 + 2?\n\nAssistant: 4"},
            RECORD,
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 1 + 2?\n\nAssistant: 3",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 1 + 2?\n\nAssistant: 4",
            },
            EARLIER,
        ),
    ],
)
def test_forms_of_other_tools(row, expected):
    if isinstance(expected, str):
        expected = Preference([{"role": "user", "content": expected}], [THREE], [FOUR])
    assert preference_from_row(row) == expected


def test_weights_of_messages_stay_and_odd_ones_are_named():
    row = {
        "chosen_messages": [weighed(ASK, 0.0), weighed(THREE, 1.0)],
        "rejected_messages": [weighed(ASK, 0.0), weighed(FOUR, 1.0)],
    }
    record = preference_from_row(row)
    assert record.prompt == [{**ASK, "loss_weight": 0.0}]
    assert record.chosen == [{**THREE, "loss_weight": 1.0}]
    assert record.notes == ()
    (note,) = preference_from_row({**row, "chosen_messages": [weighed(ASK, 0.0), weighed(THREE, 0.5)]}).notes
    assert note.text.startswith("`loss_weight` is not used")
    assert note.lost


def test_calls_of_ms_swift():
    calls = [
        {"role": "tool_call", "content": '{"name": "add", "arguments": {"to": 1}}'},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {"to": 2}}'},
    ]
    answered = {"role": "tool_response", "content": "3", "id": "c"}
    record = preference_from_row({"messages": [ASK, *calls, answered, THREE], "rejected_response": "4"})
    assert record.prompt == [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": called(1, 2)},
        {"role": "tool", "content": "3", "id": "c"},
    ]
    whole = {"messages": [ASK, *calls, answered, THREE], "rejected_messages": [ASK, calls[0], answered, FOUR]}
    record = preference_from_row(whole)
    assert (record.prompt, record.rejected[0]["tool_calls"]) == ([ASK], called(1))  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK], "rejected_response": "4"}, "`messages` does not end with an assistant turn"),
        ({"messages": [ASK, FOUR, ASK], "rejected_messages": [ASK, FOUR]}, "`messages` does not end with an assistant"),
        ({"messages": "x", "rejected_response": "4"}, "`messages` is str; wanted a list of messages"),
        ({"messages": ["x"], "rejected_response": "4"}, "`messages` is not a list of messages"),
        ({"messages": [ASK, THREE], "rejected_response": ""}, "`rejected_response` is empty"),
        ({"messages": [ASK, THREE], "rejected_response": 4}, "`rejected_response` is int; wanted text"),
        ({"messages": [ASK, THREE], "rejected_messages": []}, "`rejected_messages` is empty; wanted a list"),
        ({"query": "1 + 2?", "rejected_response": "4"}, "has `rejected_response`, but neither `messages` nor"),
        (
            {"query": "?", "response": "3", "rejected_response": "4", "history": [["Hi"]]},
            "`history` is not a list of [user text, assistant text]",
        ),
        ({"instruction": "1 + 2?", "output": ["3"]}, "`output` is a list of 1; wanted [chosen, rejected]"),
        ({"instruction": "1 + 2?", "output": ["3", None]}, "`output[1]` is null"),
        ({"prompt": "1 + 2?", "chosen_response": "3"}, "has `chosen_response` but no `rejected_response`"),
        ({"chosen_messages": [ASK, THREE]}, "has `chosen_messages` but no `rejected_messages`"),
        ({"system": "Add.", "question": " ", "chosen": "3", "rejected": "4"}, "`question` is empty"),
        ({"question": "?", "chosen": [THREE], "rejected": [FOUR]}, "no `prompt`, but `question` looks like one"),
        (
            {"chosen": "\n\nHuman: A\n\nAssistant:", "rejected": "\n\nHuman: A\n\nAssistant: B"},
            "`chosen[0].content` is empty",
        ),
        ({"chosen": turns(HUMAN), "rejected": turns(HUMAN)}, "no `prompt`, and `chosen` and `rejected` have no common"),
        ({"chosen": turns(("bot", "3")), "rejected": turns(WORSE)}, "`chosen[0].from` is 'bot'; wanted one of human"),
    ],
)
def test_rows_that_lack_something(row, said):
    with pytest.raises(RowError) as caught:
        preference_from_row(row)
    assert said in str(caught.value)


def test_a_label_beside_a_pair_is_metadata():
    for row in ({"prompt": "?", "chosen": "3", "rejected": "4"}, {"messages": [ASK, THREE], "rejected_response": "4"}):
        assert not is_unpaired({**row, "label": 1})
        assert preference_from_row({**row, "label": 1}) == preference_from_row(row)


@pytest.mark.parametrize("text", ["Human: A", "Assistant: A", "A\n\nHuman: B\n\nAssistant: C", ""])
def test_other_texts_are_no_dialogues(text):
    assert parse_dialogue(text) is None
    row = {"prompt": "Human: A\n\nAssistant:", "chosen": " B", "rejected": " C"}
    assert preference_from_row(row) == Preference(**row)


def test_what_was_done_is_said_once(caplog):
    from datasets import Dataset, IterableDataset

    text = "\n\nHuman: 1 + 2?\n\nAssistant: "
    rows = [
        {"chosen": f"{text}3", "rejected": f"{text}4", "system_prompt": "Add." if index else None}
        for index in (0, 1, 1)
    ]
    done = "dialogues in text (Human: ..., Assistant: ...) became messages of user and assistant"
    unread = "`system_prompt` is not read; rename it to `system`"
    with caplog.at_level(logging.INFO):
        normalize_dataset(Dataset.from_list(rows))
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", f"train_dataset: {done} (in 3 of 3 rows; the first is train_dataset[0])."),
        ("WARNING", f"train_dataset: {unread} (in 2 of 3 rows; the first is train_dataset[1])."),
    ]
    caplog.clear()
    stream = normalize_dataset(IterableDataset.from_generator(lambda rows: iter(rows), gen_kwargs={"rows": rows}))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert len(list(stream)) == 3
    assert [record.message for record in caplog.records] == [
        f"train_dataset: {done} (the first row is train_dataset[0]).",
        f"train_dataset: {unread} (the first row is train_dataset[1]).",
    ]
