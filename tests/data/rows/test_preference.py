"""A row in any accepted format becomes one record, or has one reason why not."""

import json

import pytest

from fastdpo.data.errors import RowError
from fastdpo.data.formats import Preference, preference_from_row

USER = {"role": "user", "content": "Sky?"}


BLUE = {"role": "assistant", "content": "Blue."}


GREEN = {"role": "assistant", "content": "Green."}


SYSTEM = {"role": "system", "content": "Be brief."}


RECORD = Preference([USER], [BLUE], [GREEN])


TEXT = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}


CHAT = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}


TOOL = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TEXT, Preference("Sky?", " Blue.", " Green.")),
        ({**TEXT, "prompt": ""}, Preference("", " Blue.", " Green.")),
        ({**TEXT, "id": 7, "score": 0.5, "source": "x"}, Preference("Sky?", " Blue.", " Green.")),
        (CHAT, RECORD),
        ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, RECORD),
        (
            {"chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]},
            Preference([SYSTEM, USER], [BLUE], [GREEN]),
        ),
        (
            {"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, GREEN]},
            Preference([USER], [BLUE, USER, BLUE], [GREEN]),
        ),
        ({"chosen": [USER, BLUE], "rejected": [USER, BLUE]}, Preference([USER], [BLUE], [BLUE])),
        ({"chosen": "Sky? Blue.", "rejected": "Sky? Green."}, Preference("Sky?", " Blue.", " Green.")),
        ({"chosen": "Sky?\nBlue.", "rejected": "Sky?\nGreen."}, Preference("Sky?\n", "Blue.", "Green.")),
        ({"chosen": "ab", "rejected": "abc"}, Preference("a", "b", "bc")),
        # text where messages are expected
        ({**CHAT, "prompt": "Sky?"}, RECORD),
        ({"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, RECORD),
        ({"prompt": [USER], "chosen": "Blue.", "rejected": "Green."}, RECORD),
        # a prompt that the answers repeat is asked once
        ({"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, RECORD),
        # a system column is part of what the model is told
        ({**CHAT, "system": "Be brief."}, Preference([SYSTEM, USER], [BLUE], [GREEN])),
        ({**CHAT, "prompt": [SYSTEM, USER], "system": "Other."}, Preference([SYSTEM, USER], [BLUE], [GREEN])),
        ({**CHAT, "tools": [TOOL]}, Preference([USER], [BLUE], [GREEN], [TOOL])),
        ({**CHAT, "tools": json.dumps([TOOL])}, Preference([USER], [BLUE], [GREEN], [TOOL])),
        ({**CHAT, "tools": []}, RECORD),
        # what Arrow adds to a message where others have more keys
        ({**CHAT, "chosen": [{**BLUE, "name": None, "tool_calls": None}]}, RECORD),
        # one message is a list of one
        ({**CHAT, "prompt": USER, "chosen": BLUE}, RECORD),
        # a text prompt that both answers repeat; one word may begin two answers by chance
        (
            {"prompt": "The sky?", "chosen": "The sky? Blue.", "rejected": "The sky? Red."},
            Preference("The sky?", " Blue.", " Red."),
        ),
        ({"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi!"}, Preference("Hi", "Hi you", "Hi!")),
        ({**TEXT, "chosen": "Sky? Blue."}, Preference("Sky?", "Sky? Blue.", " Green.")),
        # LLaMA-Factory's rows are known by their columns
        ({"instruction": "Sky?", "input": "", "chosen": "Blue.", "rejected": "Green."}, RECORD),
        (
            {
                "conversations": [{"from": "human", "value": "Sky?"}],
                "chosen": {"from": "gpt", "value": "Blue."},
                "rejected": {"from": "gpt", "value": "Green."},
            },
            RECORD,
        ),
    ],
)
def test_accepted_rows(row, expected):
    assert preference_from_row(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Sky? Blue.", "rejected": "Sky? Green."},
        {"chosen": "Sky?  Blue.", "rejected": "Sky?  Green."},
        {"chosen": "ab", "rejected": "abc"},
        {"chosen": "abc", "rejected": "abc"},
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"chosen": [USER, BLUE], "rejected": [USER, BLUE]},
        {"chosen": [USER, BLUE], "rejected": [USER, BLUE, USER, BLUE]},
    ],
)
def test_implicit_prompt_equals_trl(row):
    from trl.data_utils import extract_prompt

    ours = preference_from_row(row)
    assert {"prompt": ours.prompt, "chosen": ours.chosen, "rejected": ours.rejected} == extract_prompt(row)


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]}


def test_tool_calls_are_answers():
    record = preference_from_row({**CHAT, "chosen": [CALL]})
    assert record.chosen == [{**CALL, "content": ""}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (5, "is int; wanted an object with `chosen` and `rejected`"),
        ({"prompt": "a", "chosen": "b"}, "missing column `rejected`; found `prompt`, `chosen`"),
        ({}, "missing column `chosen`; found nothing"),
        ({**TEXT, "chosen": None}, "`chosen` is null"),
        ({**TEXT, "prompt": None}, "`prompt` is null"),
        ({**TEXT, "rejected": 3}, "`rejected` is int; wanted text or a list of messages"),
        ({**TEXT, "prompt": {"role": "user"}}, "`prompt` is dict; wanted text or a list of messages"),
        ({**TEXT, "chosen": ""}, "`chosen` is empty"),
        ({**TEXT, "rejected": " \n"}, "`rejected` is empty"),
        ({**TEXT, "chosen": "\ud83d"}, "`chosen` has half a surrogate pair at character 0"),
        ({**CHAT, "prompt": []}, "`prompt` is empty"),
        ({**CHAT, "chosen": []}, "`chosen` is empty"),
        ({**CHAT, "chosen": [{**BLUE, "content": ""}]}, "`chosen[0].content` is empty"),
        ({**CHAT, "rejected": [{**BLUE, "content": None}]}, "`rejected[0].content` is null"),
        ({**CHAT, "prompt": [{**USER, "content": ["x"]}]}, "`prompt[0].content` is list; wanted text"),
        ({**CHAT, "prompt": ["Sky?"]}, "`prompt[0]` is not a message with `role` and `content`"),
        ({**CHAT, "chosen": [{"from": "gpt"}]}, "`chosen[0]` is not a message with `role` and `content`"),
        ({**CHAT, "chosen": [{"from": "bot", "value": "x"}]}, "`chosen[0].from` is 'bot'; wanted one of human, gpt"),
        ({**CHAT, "chosen": [BLUE, USER]}, "`chosen` ends with a user turn; wanted an assistant turn"),
        ({**CHAT, "chosen": [{**CALL, "tool_calls": ["x"]}]}, "`chosen[0].tool_calls` is not a list of calls"),
        ({**CHAT, "chosen": "Blue."}, "one of `chosen` and `rejected` is text and the other a list of messages"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "no `prompt`, and `chosen` and `rejected` have no common beginning"),
        (
            {"chosen": "Blue.", "rejected": "Green."},
            "no `prompt`, and `chosen` and `rejected` have no common beginning",
        ),
        ({"chosen": "", "rejected": "Green."}, "`chosen` is empty"),
        ({"question": "Sky?", "chosen": "It is", "rejected": "It was"}, "no `prompt`, but `question` looks like one"),
        ({**TEXT, "system": "Be brief."}, "`system` would be lost beside a text `prompt`"),
        (
            {"prompt": "Sea?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            "the text `prompt` is not in the messages",
        ),
        ({**CHAT, "tools": "{"}, "`tools` holds broken JSON: Expecting property name"),
        ({**CHAT, "tools": "[" * 100_000}, "`tools` holds JSON nested too deeply"),
        ({**CHAT, "tools": "5"}, "`tools` is not a list of function descriptions"),
    ],
)
def test_bad_rows(row, reason):
    with pytest.raises(RowError) as caught:
        preference_from_row(row)
    assert reason in str(caught.value)
