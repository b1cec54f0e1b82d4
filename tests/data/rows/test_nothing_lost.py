"""Whatever a row of any form says is in its pair, or a note names it: checked with a marker word in each field."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from fastdpo.data.formats import Preference, preference_from_row
from fastdpo.data.rows import llama_factory, preference
from fastdpo.data.rows.messages import for_template, pack_messages

SEEDS = range(25)


class Markers:
    """Words that occur once, each with the name of its field; what a row may have beside them is drawn."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.fields: dict[str, str] = {}

    def __call__(self, field: str) -> str:
        word = f"marker{len(self.fields)}x{self.draw.randrange(10**6)}"
        self.fields[word] = field
        return word

    def maybe(self, **fields: Callable[[], Any]) -> dict[str, Any]:
        """Some of the fields."""
        return {name: make() for name, make in fields.items() if self.draw.random() < 0.7}

    def value(self, field: str) -> Any:
        """A marker in a value of any type."""
        word = self(field)
        return self.draw.choice([word, {"a": [word, None]}, [{word: None}], [[word]], {word: 2**70}])

    def call(self) -> dict[str, Any]:
        arguments = {self("argument's name"): self.value("argument")}
        return {"name": self("call"), "arguments": arguments}

    def extras(self) -> dict[str, Any]:
        return self.maybe(
            reasoning_content=lambda: self("reasoning_content"),
            name=lambda: self("name"),
            note=lambda: self.value("unknown key"),
        )

    def message(self, role: str) -> dict[str, Any]:
        text = self(f"{role} content")
        content = self.draw.choice([text, [{"type": "text", "text": text}]])
        if role == "assistant" and self.draw.random() < 0.3:
            calls = [{"type": "function", "function": self.call()} for _ in range(self.draw.randint(1, 2))]
            return {"role": role, "content": content, "tool_calls": calls, **self.extras()}
        return {"role": role, "content": content, **self.extras()}

    def prompt(self, system: bool = True) -> list[dict[str, Any]]:
        first = [self.message("system")] if system and self.draw.random() < 0.5 else []
        earlier = [self.message(role) for _ in range(self.draw.randint(0, 2)) for role in ("user", "assistant")]
        return [*first, *earlier, self.message("user")]

    def turn(self, speaker: str) -> dict[str, Any]:
        return {"from": speaker, "value": self(f"{speaker} value"), **self.extras()}

    def turns(self) -> list[dict[str, Any]]:
        if self.draw.random() < 0.4:
            call = {"from": "function_call", "value": json.dumps(self.call()), **self.extras()}
            return [self.turn("human"), call, self.turn("observation")]
        return [self.turn("human"), *(self.turn(speaker) for speaker in self.draw.choice([(), ("gpt", "human")]))]

    def history(self) -> list[list[str]]:
        return [[self("history, user"), self("history, assistant")] for _ in range(self.draw.randint(0, 2))]

    def system(self) -> Any:
        text = self("system column")
        return self.draw.choice([text, {"role": "system", "content": text}, [{"role": "system", "content": text}]])

    def tools(self) -> Any:
        properties = {self("tool's parameter"): {"default": None, "description": self("parameter's description")}}
        function = {"name": self("tool"), "description": self("tool's description"), "parameters": properties}
        tools = [{"type": "function", "function": function}]
        return self.draw.choice([tools, json.dumps(tools)])

    def beside(self, system: bool = True) -> dict[str, Any]:
        """Columns beside the pair, read or named."""
        read = self.maybe(tools=self.tools, **({"system": self.system} if system else {}))
        other = ("system_prompt", "functions", "documents", "rejected_tools", "thinking")
        return {**read, **self.maybe(**{name: lambda name=name: self.value(f"column {name}") for name in other})}


def pair(m: Markers) -> dict[str, Any]:
    return {side: [m.message("assistant")] for side in ("chosen", "rejected")}


def wholes(m: Markers) -> dict[str, Any]:
    prompt, answers = m.prompt(), pair(m)
    return {side: prompt + answer for side, answer in answers.items()}


def whole_turns(m: Markers) -> dict[str, Any]:
    turns = m.turns()
    return {side: [*turns, m.turn("gpt")] for side in ("chosen", "rejected")}


def two_dialogues(m: Markers) -> dict[str, Any]:
    text = f"\n\nHuman: {m('human text')}\n\nAssistant: {m('text')}\n\nHuman: {m('human text')}\n\nAssistant: "
    return {side: text + m(side) for side in ("chosen", "rejected")}


def texts(m: Markers, *names: str) -> dict[str, str]:
    return {name: m(name) for name in names}


FORMS: dict[str, Callable[[Markers], dict[str, Any]]] = {
    "text": lambda m: {**texts(m, "prompt", "chosen", "rejected"), **m.maybe(context=lambda: m("column context"))},
    "messages": lambda m: {"prompt": m.prompt(system=False), **pair(m), **m.beside()},
    "wholes": lambda m: {**wholes(m), **m.beside(system=False)},
    "wholes with the prompt": lambda m: {**(row := wholes(m)), "prompt": row["chosen"][:-1], **m.beside(system=False)},
    "text prompt": lambda m: {"prompt": m("prompt"), **pair(m), **m.beside()},
    "text answers": lambda m: {"prompt": m.prompt(False), **texts(m, "chosen", "rejected"), **m.beside()},
    "alpaca": lambda m: {
        **texts(m, "instruction", "input", "chosen", "rejected"),
        "history": m.history(),
        **m.beside(),
    },
    "alpaca, output": lambda m: {"instruction": m("instruction"), "output": [m("chosen"), m("rejected")], **m.beside()},
    "sharegpt": lambda m: {
        "conversations": m.turns(),
        "chosen": m.turn("gpt"),
        "rejected": m.turn("gpt"),
        **m.beside(),
    },
    "sharegpt wholes": lambda m: {**whole_turns(m), **m.beside()},
    "openai": lambda m: {
        "messages": m.prompt(False),
        "chosen": m.message("assistant"),
        "rejected": m.message("assistant"),
        **m.beside(),
    },
    "new llama-factory": lambda m: {
        **{f"{side}_messages": messages for side, messages in wholes(m).items()},
        **m.beside(system=False),
    },
    "swift": lambda m: {
        "messages": [*m.prompt(False), m.message("assistant")],
        "rejected_response": m("rejected"),
        **m.beside(),
    },
    "swift wholes": lambda m: {
        "messages": (row := wholes(m))["chosen"],
        "rejected_messages": row["rejected"],
        **m.beside(system=False),
    },
    "swift query": lambda m: {
        **texts(m, "query", "response", "rejected_response"),
        "history": m.history(),
        **m.beside(),
    },
    "argilla": lambda m: {**texts(m, "instruction", "chosen_response", "rejected_response"), **m.beside()},
    "orca": lambda m: {**texts(m, "question", "chosen", "rejected"), "system": m("system"), **m.beside(system=False)},
    "hh": lambda m: {**two_dialogues(m), **m.beside(system=False)},
    "ultrafeedback": lambda m: {
        "instruction": m("instruction"),
        "completions": [{"response": m("response"), "overall_score": score} for score in (3, 8)],
        **m.beside(),
    },
    "nectar": lambda m: {
        "prompt": f"\n\nHuman: {m('human text')}\n\nAssistant: ",
        "answers": [{"answer": m("answer"), "rank": rank} for rank in (2, 1)],
        **m.beside(),
    },
    "distilabel": lambda m: {
        "instruction": m("instruction"),
        "generations": [m("generation"), m("generation")],
        "ratings": [1, 4],
        "system_prompt": m("system_prompt"),
    },
    "pku": lambda m: {**texts(m, "prompt", "response_0", "response_1"), "better_response_id": 1, **m.beside()},
}


def lost_fields(record: Preference, fields: dict[str, str]) -> list[str]:
    """The fields whose marker is neither in what the template gets nor in a column that a note names."""
    parts: dict[str, Any] = {"tools": record.tools}
    for name in ("prompt", "chosen", "rejected"):
        part = getattr(record, name)
        parts[name] = part if isinstance(part, str) else for_template(pack_messages(part, name))
    shown = json.dumps(parts)
    said = " ".join(note.text for note in record.notes if note.lost)
    return [
        field
        for word, field in fields.items()
        if word not in shown and f"`{field.removeprefix('column ')}`" not in said
    ]


@pytest.mark.parametrize("form", FORMS)
def test_each_field_is_kept_or_named(form):
    for seed in SEEDS:
        markers = Markers(seed)
        row = FORMS[form](markers)
        assert lost_fields(preference_from_row(row), markers.fields) == [], row


def bare(message: Any, place: str, *more: Any) -> dict[str, Any]:
    cleaned = CLEAN(message, place, *more)
    return {name: cleaned[name] for name in ("role", "content")}


CLEAN = preference.clean_message


@pytest.mark.parametrize(
    ("form", "module", "name", "without"),
    [
        ("messages", preference, "clean_message", bare),
        ("sharegpt", llama_factory, "clean_message", bare),
        ("messages", preference, "with_system", lambda prompt, *_: (prompt, ())),
        ("alpaca", llama_factory, "with_system", lambda prompt, *_: (prompt, ())),
        ("alpaca", llama_factory, "earlier_turns", lambda *_: []),
        ("wholes", preference, "unread_columns", lambda *_: ()),
        ("openai", preference, "unread_columns", lambda *_: ()),
        ("messages", preference, "parse_tools", lambda _: None),
    ],
)
def test_a_form_that_drops_a_field_is_caught(monkeypatch, form, module, name, without):
    monkeypatch.setattr(module, name, without)
    lost = []
    for seed in SEEDS:
        markers = Markers(seed)
        row = FORMS[form](markers)
        lost += lost_fields(preference_from_row(row), markers.fields)
    assert lost
