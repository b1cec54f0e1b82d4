"""Rows of other tools -> TRL's columns (`prompt`, `chosen`, `rejected`), one function for each form.

Each function takes a row and gives it back under TRL's columns, with what was done, or None where the row has another
form. What it does not need stays in the row: `system`, `tools` and the rest are read afterwards. A row of the form that
lacks something raises `RowError`. LLaMA-Factory's alpaca, sharegpt and openai rows, which a dataset_info.json may
describe, are in `llama_factory.py`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.data.rows.llama_factory import is_turn, message_of_turn
from fastdpo.data.rows.messages import Message, check_text, is_message, parse_calls
from fastdpo.data.rows.notes import Note
from fastdpo.data.rows.ranked import best_against_worst, better_of_two
from fastdpo.data.rows.row_parts import Row, Taken, answer, earlier_turns, user, without

_QUESTIONS = ("question", "input", "query")


def known_form(row: Row) -> tuple[Row, tuple[Note, ...]]:
    """The row under TRL's columns (or LLaMA-Factory's) and notes on what was done; raises `RowError`."""
    notes: tuple[Note, ...] = ()
    for column, forms in _FORMS.items():
        if row.get(column) is not None:
            continue
        for form in forms:
            taken = form(row)
            if taken is not None:
                row, note = taken
                notes = (*notes, note) if note else notes
    return row, notes


def _other_names(row: Row) -> Taken | None:
    """`chosen_response`, `rejected_response` (Argilla), and LLaMA-Factory's `chosen_messages`, `rejected_messages`."""
    for ending in ("_response", "_messages"):
        chosen, rejected = f"chosen{ending}", f"rejected{ending}"
        if row.get(chosen) is not None and row.get("chosen") is None:
            if row.get(rejected) is None:
                raise RowError(f"has `{chosen}` but no `{rejected}`")
            pair = {"chosen": row[chosen], "rejected": row[rejected]}
            return {**without(row, chosen, rejected), **pair}, _weight_note(pair)
    return None


def _weight_note(pair: Row) -> Note | None:
    """LLaMA-Factory's `loss_weight` of a message, where it is not what is scored here: answers whole, prompts not."""
    for messages in pair.values():
        if not isinstance(messages, list):
            continue
        for index, message in enumerate(messages):
            weight = message.get("loss_weight") if isinstance(message, Mapping) else None
            last = index == len(messages) - 1
            if weight is not None and weight != (1 if last else 0):
                return Note(
                    '`loss_weight` is not used: the answer is scored, and turns before it with scored_turns="all" only',
                    lost=True,
                )
    return None


def _ms_swift(row: Row) -> Taken | None:
    """ms-swift: `messages` (or `query`, `response`, `history`) with `rejected_response` or `rejected_messages`.

    The last turn of `messages` is chosen; the rejected whole, or the rejected answer in its place, is beside it.
    """
    rejected = next((name for name in ("rejected_messages", "rejected_response") if row.get(name) is not None), None)
    if rejected is None or row.get("chosen") is not None:
        return None
    column = next((name for name in ("messages", "conversations", "conversation") if row.get(name) is not None), None)
    if column is not None:
        messages = as_dialogue(row[column], column)
        if all("human" in turn and "assistant" in turn for turn in messages):
            messages = earlier_turns([[turn["human"], turn["assistant"]] for turn in messages], column)
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise RowError(f"`{column}` does not end with an assistant turn, which `{rejected}` is compared with")
        rest = without(row, column, rejected)
        worse = row[rejected]
        if rejected == "rejected_messages" or (isinstance(worse, list) and len(worse) > 1):
            pair = {"chosen": messages, "rejected": as_dialogue(worse, rejected)}
        else:
            rest["prompt"] = _with_calls(messages[:-1])
            pair = {"chosen": messages[-1:], "rejected": _one_answer(worse, rejected)}
        return {**rest, **{side: _with_calls(turns) for side, turns in pair.items()}}, None
    better = next((name for name in ("response", "output") if row.get(name) is not None), None)
    question = next((name for name in ("query", "instruction", "prompt") if row.get(name) is not None), None)
    if better is None or question is None:
        raise RowError(f"has `{rejected}`, but neither `messages` nor a question with its `response`")
    rest = without(row, better, rejected)
    if question == "instruction":  # alpaca: LLaMA-Factory's columns
        check_text(row[rejected], rejected)
        return {**rest, "chosen": row[better], "rejected": row[rejected]}, None
    asked = row[question] if isinstance(row[question], list) else [user(row[question], question)]
    prompt = [*earlier_turns(row.get("history"), "history"), *asked]
    pair = {"chosen": _one_answer(row[better], better), "rejected": _one_answer(row[rejected], rejected)}
    return {**without(rest, question, "history"), "prompt": prompt, **pair}, None


def as_dialogue(value: Any, place: str) -> list[Any]:
    """A list of messages, sharegpt turns as messages, others as they are; raises `RowError`."""
    if not isinstance(value, list) or not value:
        raise RowError(f"`{place}` is {'empty' if value == [] else type(value).__name__}; wanted a list of messages")
    if not all(isinstance(message, Mapping) for message in value):
        raise RowError(f"`{place}` is not a list of messages")
    return [
        message_of_turn(message, f"{place}[{index}]") if is_turn(message) else message
        for index, message in enumerate(value)
    ]


def _one_answer(value: Any, place: str) -> list[Any]:
    if isinstance(value, list):
        return value
    return [value] if is_message(value) else [answer(value, place)]


def _with_calls(messages: list[Any]) -> list[Any]:
    """ms-swift's roles `tool_call` (JSON text of a call; several in a row are one turn) and `tool_response`."""
    turns: list[Any] = []
    calling = False
    for index, message in enumerate(messages):
        role = message["role"] if is_message(message) else None
        if role == "tool_call":
            calls = parse_calls(message.get("content"), f"messages[{index}].content")
            if calling:
                turns[-1]["tool_calls"] += calls
            else:
                turns.append({**message, "role": "assistant", "content": "", "tool_calls": calls})
        else:
            turns.append({**message, "role": "tool"} if role == "tool_response" else message)
        calling = role == "tool_call"
    return turns


def _two_outputs(row: Row) -> Taken | None:
    """LLaMA-Factory's older alpaca: `output` is [chosen, rejected]."""
    pair = row.get("output")
    if "instruction" not in row or not isinstance(pair, list) or row.get("chosen") is not None:
        return None
    if len(pair) != 2:
        raise RowError(f"`output` is a list of {len(pair)}; wanted [chosen, rejected]")
    for index, text in enumerate(pair):
        check_text(text, f"output[{index}]")
    return {**without(row, "output"), "chosen": pair[0], "rejected": pair[1]}, None


def _question_and_system(row: Row) -> Taken | None:
    """Intel's orca_dpo_pairs and its like: `system` beside `question` (or `input`, `query`) and two texts."""
    if "system" not in row or row.get("prompt") is not None or "instruction" in row:
        return None
    name = next((name for name in _QUESTIONS if isinstance(row.get(name), str)), None)
    if name is None or not all(isinstance(row.get(side), str) for side in ("chosen", "rejected")):
        return None
    pair = {side: [answer(row[side], side)] for side in ("chosen", "rejected")}
    note = Note(f"`{name}` and the answers beside `system` became messages")
    return {**without(row, name), "prompt": [user(row[name], name)], **pair}, note


_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _two_dialogues(row: Row) -> Taken | None:
    """HH-RLHF: both whole dialogues as text, `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is not None or not isinstance(chosen, str) or not isinstance(rejected, str):
        return None
    dialogues = {"chosen": parse_dialogue(chosen), "rejected": parse_dialogue(rejected)}
    if None in dialogues.values():
        return None
    return {**row, **dialogues}, Note(
        "dialogues in text (Human: ..., Assistant: ...) became messages of user and assistant"
    )


def parse_dialogue(text: str) -> list[Message] | None:
    """`Human: ...\\n\\nAssistant: ...` as messages; None for other text."""
    text = text.strip()
    if not text.startswith("Human:") or "\n\nAssistant:" not in text:
        return None
    pieces = _SPEAKER.split(text)[1:]
    return [
        {"role": _ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _ranked_answers(row: Row) -> Taken | None:
    """Rows with several scored answers; see `ranked.py`."""
    taken = best_against_worst(row) or better_of_two(row)
    if taken is None:
        return None
    row, note = taken
    prompt = row["prompt"]
    if isinstance(prompt, str):
        dialogue = parse_dialogue(prompt) or [user(prompt, "prompt")]
        if dialogue[-1] == {"role": "assistant", "content": ""}:
            dialogue = dialogue[:-1]
        row = {**row, "prompt": dialogue}
    return row, note


# the column that rows of these forms lack -> the forms, in this order: what one gives, the next may take
_FORMS: dict[str, tuple[Callable[[Row], Taken | None], ...]] = {
    "chosen": (_other_names, _ms_swift, _two_outputs, _ranked_answers),
    "prompt": (_question_and_system, _two_dialogues),
}
