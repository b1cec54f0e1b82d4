"""Columns beside the pair: used, named, or a reason to refuse the row."""

from typing import Any

import pytest

from fastdpo.data.errors import RowError
from fastdpo.data.formats import preference_from_row
from fastdpo.data.rows.llama_factory import Columns

ASK = {"role": "user", "content": "Sky?"}
KIND = {"role": "system", "content": "Be kind."}
BLUE = {"role": "assistant", "content": "Blue."}
GREEN = {"role": "assistant", "content": "Green."}
CHAT: dict[str, Any] = {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}
ALPACA = {"instruction": "Sky?", "input": "", "chosen": "Blue.", "rejected": "Green."}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Sky?"}],
    "chosen": {"from": "gpt", "value": "Blue."},
    "rejected": {"from": "gpt", "value": "Green."},
}
FORMS = [CHAT, {**CHAT, "prompt": "Sky?"}, {**CHAT, "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}, ALPACA, SHAREGPT]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "system",
    [
        "Be kind.",
        KIND,
        [KIND],
        {"content": "Be kind.", "role": "system"},
        [{"from": "system", "value": "Be kind."}],
        [{"type": "text", "text": "Be kind."}],
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
    ],
)
def test_a_system_column_is_used(form, system):
    record = preference_from_row({**form, "system": system})
    assert (record.prompt, record.chosen, record.notes) == ([KIND, ASK], [BLUE], ())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("system", [None, "", [], {}])
def test_an_empty_system_column(form, system):
    assert preference_from_row({**form, "system": system}).prompt == [ASK]


@pytest.mark.parametrize(
    ("system", "said"),
    [
        (5, "`system` is int; wanted text, or a list with one system message"),
        ([KIND, KIND], "`system` is list; wanted text, or a list with one system message"),
        ({"role": "user", "content": "x"}, "`system` is a message of the role 'user'; wanted system"),
        ([{"type": "image"}], "`system[0]` is a part of type 'image'"),
    ],
)
def test_system_columns_that_cannot_be_used(system, said):
    for form in FORMS:
        with pytest.raises(RowError) as caught:
            preference_from_row({**form, "system": system})
        assert said in str(caught.value)
    with pytest.raises(RowError, match="would be lost beside a text `prompt`"):
        preference_from_row({"prompt": "a", "chosen": "b", "rejected": "c", "system": [KIND]})


def test_another_system_turn_of_the_messages_goes_first():
    row = {**CHAT, "prompt": [{**KIND, "content": "Be brief."}, ASK]}
    (note,) = preference_from_row({**row, "system": [KIND]}).notes
    assert (note.text, note.lost) == ("`system` is not used where the messages begin with another system turn", True)
    assert preference_from_row({**row, "system": "Be brief."}).notes == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("system_prompt", "Be kind.", "rename it to `system`"),
        ("system_message", [KIND], "rename it to `system`"),
        ("functions", [{"name": "look"}], "rename it to `tools`"),
        ("available_tools", "[]", "rename it to `tools`"),
        ("documents", [{"text": "x"}], "put it into `prompt` if the model should see it"),
        ("context", "The sea.", "put it into `prompt` if the model should see it"),
        ("chosen_reasoning", "Hm.", "put it into the answer's message, as `reasoning_content`"),
        ("rejected_tools", [{"name": "look"}], "both answers are shown `tools`"),
    ],
)
def test_columns_that_nothing_reads_are_named(form, name, value, advice):
    (note,) = preference_from_row({**form, name: value}).notes
    assert (note.text, note.lost) == (f"`{name}` is not read; {advice}", True)
    for empty in (None, "", [], [None]):
        assert preference_from_row({**form, name: empty}).notes == ()


def test_what_the_prompt_holds_already_is_not_named():
    assert preference_from_row({**CHAT, "prompt": [KIND, ASK], "system_prompt": "Be kind."}).notes == ()
    assert preference_from_row({**CHAT, "question": "Sky?"}).notes == ()
    assert preference_from_row({**ALPACA, "history": [["a", "b"]], "input": "c"}).notes == ()
    # an entry that names columns leaves the others unused
    assert preference_from_row({**ALPACA, "context": "x"}, Columns("alpaca", {"prompt": "instruction"})).notes == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["image", "images", "videos", "audios", "rejected_images"])
def test_rows_with_pictures_are_refused(form, name):
    kind = name.removeprefix("rejected_").rstrip("s")
    with pytest.raises(RowError, match=f"`{name}` holds {kind} data, and only text .*AutoModelForImageTextToText"):
        preference_from_row({**form, name: ["a.png"]})
    for empty in (None, [], [None], ""):
        assert preference_from_row({**form, name: empty}) == preference_from_row(form)
