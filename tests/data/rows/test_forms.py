"""Pairs under other names: each form becomes the pair that its makers mean, and says in one line how."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdpo.data.errors import DataError, RowError
from fastdpo.data.formats import Preference, load_preferences, normalize_dataset, preference_from_row
from fastdpo.data.rows.messages import for_template, from_json

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Sky?"}
BLUE = {"role": "assistant", "content": "Blue."}
GREEN = {"role": "assistant", "content": "Green."}
RECORD = Preference([USER], [BLUE], [GREEN])
WITH_SYSTEM = Preference([SYSTEM, USER], [BLUE], [GREEN])
CHAT = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
RATED = {"model": "a", "response": "Blue.", "overall_score": 8.5}


def parts(text: str, key: str = "text") -> list[dict[str, str]]:
    return [{"type": "text", key: text}]


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


def dialogue(answer: str) -> str:
    return f"\n\nHuman: Sky?\n\nAssistant: Look up.\n\nHuman: And?\n\nAssistant: {answer}"


LONG = Preference(
    [USER, {"role": "assistant", "content": "Look up."}, {"role": "user", "content": "And?"}], [BLUE], [GREEN]
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # `system` in every shape
        *(
            ({**CHAT, "system": system}, WITH_SYSTEM)
            for system in ("Be kind.", [SYSTEM], SYSTEM, parts("Be kind."), [{**SYSTEM, "content": parts("Be kind.")}])
        ),
        ({**CHAT, "system": [], "images": [], "image": None}, RECORD),
        # content in parts
        ({**CHAT, "prompt": [{**USER, "content": [*parts("S"), *parts("ky?")]}]}, RECORD),
        ({**CHAT, "chosen": [{**BLUE, "content": {"type": "text", "text": "Blue."}}]}, RECORD),
        # single messages, sharegpt's turns
        ({**CHAT, "chosen": BLUE, "rejected": GREEN}, RECORD),
        (
            {"prompt": [turn("human", "Sky?")], "chosen": [turn("gpt", "Blue.")], "rejected": turn("gpt", "Green.")},
            RECORD,
        ),
        (
            {
                side: [turn("system", "Be kind."), turn("human", "Sky?"), turn("gpt", text)]
                for side, text in (("chosen", "Blue."), ("rejected", "Green."))
            },
            WITH_SYSTEM,
        ),
        ({"conversations": [turn("user", "Sky?")], "chosen": [turn("model", "Blue.")], "rejected": "Green."}, RECORD),
        # ms-swift
        ({"messages": [USER, BLUE], "rejected_response": "Green."}, RECORD),
        ({"messages": [USER, BLUE], "rejected_response": [GREEN]}, RECORD),
        ({"messages": [SYSTEM, USER, BLUE], "rejected_messages": [SYSTEM, USER, GREEN]}, WITH_SYSTEM),
        ({"messages": [USER, BLUE], "rejected_response": "Green.", "system": "Be kind."}, WITH_SYSTEM),
        (
            {"query": "And?", "response": "Blue.", "rejected_response": "Green.", "history": [["Sky?", "Look up."]]},
            LONG,
        ),
        # LLaMA-Factory's newer and older forms
        *(
            (
                {
                    "chosen_messages": [
                        {"role": "user", "content": parts("Sky?", key)},
                        {**BLUE, "content": parts("Blue.", key)},
                    ],
                    "rejected_messages": [
                        {"role": "user", "content": parts("Sky?", key)},
                        {**GREEN, "content": parts("Green.", key)},
                    ],
                },
                RECORD,
            )
            for key in ("text", "value")
        ),
        ({"instruction": "Sky?", "input": "", "output": ["Blue.", "Green."]}, RECORD),
        # answers that repeat the question
        (
            {"prompt": "Sky?", "chosen": "Sky? Blue.", "rejected": "Sky? Green."},
            Preference("Sky?", " Blue.", " Green."),
        ),
        # several answers with scores
        (
            {
                "instruction": "Sky?",
                "completions": [
                    {**RATED, "response": "Grey.", "overall_score": 7},
                    RATED,
                    {**RATED, "response": "Green.", "overall_score": 1.0},
                ],
            },
            RECORD,
        ),
        (
            {
                "instruction": "Sky?",
                "completions": [
                    {"response": "Green.", "fine-grained_score": 2.0},
                    {"response": "Blue.", "fine-grained_score": 3.0},
                ],
            },
            RECORD,
        ),
        (
            {
                "prompt": "\n\nHuman: Sky?\n\nAssistant: ",
                "answers": [
                    {"answer": "Grey.", "rank": 2.0},
                    {"answer": "Blue.", "rank": 1.0},
                    {"answer": "Green.", "rank": 3.0},
                ],
            },
            RECORD,
        ),
        ({"instruction": "Sky?", "generations": ["Green.", "Blue."], "ratings": [3, 5]}, RECORD),
        ({"prompt": "Sky?", "responses": ["Blue.", "Grey.", "Green."], "ranks": [1, 2, 3]}, RECORD),
        ({"prompt": [USER], "responses": ["Green.", "Blue.", "Grey."], "scores": [-1.5, 2, None]}, RECORD),
        # PKU-SafeRLHF
        ({"prompt": "Sky?", "response_0": "Green.", "response_1": "Blue.", "better_response_id": 1}, RECORD),
        ({"prompt": "Sky?", "response_0": "Blue.", "response_1": "Green.", "safer_response_id": 0}, RECORD),
        # dialogues as text
        ({"chosen": dialogue("Blue."), "rejected": dialogue("Green.")}, LONG),
        # other names
        (
            {"prompt": "Sky?", "chosen_response": "Blue.", "rejected_response": "Green."},
            Preference("Sky?", "Blue.", "Green."),
        ),
        ({"system": "Be kind.", "question": "Sky?", "chosen": "Blue.", "rejected": "Green."}, WITH_SYSTEM),
        ({"system": "", "question": "Sky?", "chosen": "Blue.", "rejected": "Green."}, RECORD),
    ],
)
def test_forms(row: dict[str, Any], expected: Preference) -> None:
    assert preference_from_row(row) == expected
    as_cells = {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in row.items()}
    lists = ("answers", "completions", "generations", "responses", "ratings", "ranks", "scores", "output", "system")
    if not set(lists) & row.keys() and "images" not in row and "text" not in json.dumps(row.get("chosen", "")):
        assert preference_from_row(as_cells) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**CHAT, "images": ["a.png"]}, "`images` holds something, and only text is trained here"),
        ({**CHAT, "videos": [b"x"]}, "`videos` holds something, and only text"),
        (
            {**CHAT, "prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, *parts("What?")]}]},
            "`prompt[0].content[0]` is a part of type 'image'; only text is trained here, and images, videos and "
            "sounds take a model of AutoModelForImageTextToText",
        ),
        (
            {**CHAT, "chosen": [{**BLUE, "content": [{"type": "text"}]}]},
            "`chosen[0].content[0]` is a part without text",
        ),
        ({**CHAT, "chosen": [{**BLUE, "content": [{"type": "tool"}]}]}, "is a part of type 'tool'; wanted text"),
        ({**CHAT, "system": USER}, "`system` is a user turn; wanted a system turn"),
        ({**CHAT, "system": 5}, "`system` is int; wanted text"),
        ({"messages": [USER], "rejected_response": "Green."}, "`messages` does not end with the assistant's turn"),
        ({"messages": [USER, BLUE], "rejected_response": 3}, "`rejected_response` is int; wanted text"),
        (
            {"instruction": "Sky?", "completions": [RATED, {**RATED, "response": "Green."}]},
            "`completions`: all answers have the score 8.5, so none is better",
        ),
        (
            {"instruction": "Sky?", "completions": [RATED]},
            "`completions` has 1 answers with a score; wanted two or more",
        ),
        (
            {"instruction": "Sky?", "generations": ["a", "b"], "ratings": [1]},
            "`generations` has 2 answers and 1 scores",
        ),
        (
            {"prompt": "Sky?", "response_0": "a", "response_1": "b", "better_response_id": 2},
            "`better_response_id` is 2; wanted 0 or 1",
        ),
        ({"prompt": "Sky?", "completion": "Blue.", "label": True}, 'unpaired rows take loss_type="kto"'),
        ({"instruction": "Sky?", "input": "", "output": "Blue.", "kto_tag": False}, 'take loss_type="kto"'),
        ({"messages": [USER, BLUE], "label": True}, 'take loss_type="kto"'),
    ],
)
def test_rows_that_lack_something(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as raised:
        preference_from_row(row)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({**CHAT, "system_prompt": "Be kind."}, "`system_prompt` is not used; name it `system` if"),
        ({**CHAT, "functions": [{"name": "look"}]}, "`functions` is not used; name it `tools` if"),
        ({**CHAT, "prompt": [SYSTEM, USER], "system": "Other."}, "`system` is not used, since the messages begin with"),
        (
            {"prompt": "Sky?", "chosen": "Sky? A", "rejected": "Sky? B"},
            "repeat the whole `prompt`, which is taken once",
        ),
        ({"instruction": "Sky?", "generations": ["a", "b"], "ratings": [1, 2]}, "the best is chosen and the worst"),
        (
            {"chosen": dialogue("Blue."), "rejected": dialogue("Green.")},
            "turns of Human and Assistant are made messages",
        ),
    ],
)
def test_what_was_done_or_left_out_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, Any], note: str
) -> None:
    (tmp_path / "a.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    with caplog.at_level(logging.WARNING):
        load_preferences(str(tmp_path / "a.jsonl"))
    (line,) = [line for line in caplog.messages if note in line]
    assert line.startswith(f"{tmp_path / 'a.jsonl'}: ")
    assert line.endswith("(3 of 3 rows).")
    assert not [one for one in preference_from_row(CHAT).notes if one]


def test_a_stream_says_it_once_too(caplog: pytest.LogCaptureFixture) -> None:
    from datasets import Dataset

    stream = Dataset.from_list([{**CHAT, "system_prompt": "Be kind."}] * 3).to_iterable_dataset()
    with caplog.at_level(logging.WARNING):
        assert len(list(normalize_dataset(stream))) == 3
    assert len([line for line in caplog.messages if "`system_prompt` is not used" in line]) == 1


# nothing of a row is lost: rows of every form, with a word of its own in every place

Words = Callable[[], str]


def tool_call(word: Words) -> dict[str, Any]:
    arguments = {word(): word(), "deep": [{"at": word(), "none": None}]}
    return {"id": word(), "type": "function", "function": {"name": word(), "arguments": arguments}}


def conversation(word: Words) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": word()},
        {"role": "user", "content": word(), "name": word()},
        {"role": "assistant", "content": "", "tool_calls": [tool_call(word)], "reasoning_content": word()},
        {"role": "tool", "content": word(), "tool_call_id": word()},
    ]


def answer(word: Words) -> dict[str, Any]:
    return {"role": "assistant", "content": word(), "thinking": word(), "extra": {"of": [word(), None]}}


def tools(word: Words) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": word(), "description": word(), "parameters": {"p": word()}}}]


def whole(word: Words) -> dict[str, Any]:
    shared = conversation(word)
    return {"chosen": [*shared, answer(word)], "rejected": [*shared, answer(word)], "tools": tools(word)}


def swift(word: Words) -> dict[str, Any]:
    return {"messages": [*conversation(word), answer(word)], "rejected_response": word(), "tools": tools(word)}


def sharegpt(word: Words) -> dict[str, Any]:
    call = json.dumps({"name": word(), "arguments": {word(): word()}})
    turns = [
        {**turn("human", word()), "name": word()},
        {**turn("function_call", call), "why": word()},
        turn("observation", word()),
    ]
    sides = {side: {**turn("gpt", word()), "reasoning_content": word()} for side in ("chosen", "rejected")}
    return {"conversations": turns, **sides, "system": word(), "tools": json.dumps(tools(word))}


FORMS: dict[str, Callable[[Words], dict[str, Any]]] = {
    "messages": lambda word: {
        "prompt": conversation(word),
        "chosen": [answer(word)],
        "rejected": [answer(word)],
        "tools": tools(word),
    },
    "wholes": whole,
    "new LLaMA-Factory": lambda word: {
        f"{side}_messages" if side != "tools" else side: value for side, value in whole(word).items()
    },
    "openai": lambda word: {"messages": conversation(word), "chosen": answer(word), "rejected": answer(word)},
    "sharegpt": sharegpt,
    "swift": swift,
    "swift, wholes": lambda word: {
        {"chosen": "messages", "rejected": "rejected_messages"}.get(name, name): value
        for name, value in whole(word).items()
    },
    "alpaca": lambda word: {
        "instruction": word(),
        "input": word(),
        "history": [[word(), word()]],
        "system": word(),
        "chosen": word(),
        "rejected": word(),
    },
    "text": lambda word: {"prompt": word(), "chosen": word(), "rejected": word()},
    "text beside messages": lambda word: {"prompt": word(), "chosen": [answer(word)], "rejected": [answer(word)]},
    "question": lambda word: {"system": word(), "question": word(), "chosen": word(), "rejected": word()},
    "parts": lambda word: {
        "prompt": [{"role": "user", "content": [*parts(word()), *parts(word())]}],
        "chosen": [answer(word)],
        "rejected": [answer(word)],
        "system": parts(word()),
    },
}


def words_of(row: dict[str, Any], folder: Path) -> str:
    """All that the row's pair has, as it comes to the template."""
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    (pair,) = load_preferences(str(folder / "a.jsonl"))
    sides = [pair[name] for name in ("prompt", "chosen", "rejected")]
    texts = sides if isinstance(pair["prompt"], str) else [for_template(side) for side in sides]
    return json.dumps([texts, from_json(pair.get("tools"))])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_every_word_of_a_row_comes_to_the_template(tmp_path: Path, form: str, seed: int) -> None:
    draw = random.Random(seed)
    words: list[str] = []

    def word() -> str:
        words.append(f"word{draw.randrange(10**9)}")
        return words[-1]

    row = FORMS[form](word)
    text = words_of(row, tmp_path)
    assert [one for one in words if one not in text] == []


def test_the_check_sees_a_column_that_is_left_out(tmp_path: Path) -> None:
    assert "lost" not in words_of({**CHAT, "remarks": "lost"}, tmp_path)


def test_bad_rows_of_a_form_are_named_by_their_line(tmp_path: Path) -> None:
    rows = [{"instruction": "Sky?", "completions": [RATED, {**RATED, "response": "b", "overall_score": 1}]}]
    rows.append({"instruction": "Sky?", "completions": [RATED, RATED]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:2: `completions`: all answers have the score 8\.5"):
        load_preferences(str(tmp_path / "a.jsonl"))
