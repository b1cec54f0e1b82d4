"""Forms of rows that are pairs under other names: each becomes a row in TRL's form, with one line that says how."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastdpo.data.errors import RowError
from fastdpo.data.rows.messages import Message

Row = Mapping[str, Any]


class Form(NamedTuple):
    """has: whether a row is of the form. pair: the row in TRL's form; raises `RowError`. note: says so, once."""

    has: Callable[[Row], bool]
    pair: Callable[[Row], Row]
    note: str


def form_of(row: Row) -> Form | None:
    return next((form for form in FORMS if form.has(row)), None)


def _with(*names: str) -> Callable[[Row], bool]:
    """Rows that have something in all of these columns, and no pair under TRL's names."""
    return lambda row: not _is_pair(row) and all(row.get(name) is not None for name in names)


def _is_pair(row: Row) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _rest(row: Row, *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _answer(text: Any, place: str) -> list[Message]:
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"`{place}` is {'empty' if isinstance(text, str) else type(text).__name__}; wanted text")
    return [{"role": "assistant", "content": text}]


def _question(text: Any, place: str) -> list[Message]:
    if isinstance(text, list):
        return text
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"`{place}` is {'empty' if isinstance(text, str) else type(text).__name__}; wanted text")
    return dialogue(text) if is_dialogue(text) else [{"role": "user", "content": text}]


# ms-swift


def _swift(row: Row) -> Row:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        raise RowError("`messages` is not a list of messages")
    if messages[-1].get("role") != "assistant":
        raise RowError("`messages` does not end with the assistant's turn, which is the chosen answer")
    pair = _rest(row, "messages", "rejected_response", "rejected_messages")
    if row.get("rejected_messages") is not None:
        return {**pair, "chosen": messages, "rejected": row["rejected_messages"]}
    rejected = row["rejected_response"]
    rejected = rejected if isinstance(rejected, list) else _answer(rejected, "rejected_response")
    return {**pair, "prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}


def _old_swift(row: Row) -> Row:
    turns: list[Message] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise RowError("`history` is not a list of [user text, assistant text]")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return {
        **_rest(row, "query", "response", "rejected_response", "history"),
        "prompt": [*turns, *_question(row["query"], "query")],
        "chosen": _answer(row["response"], "response"),
        "rejected": _answer(row["rejected_response"], "rejected_response"),
    }


# whole dialogues as text: HH-RLHF, Nectar

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def is_dialogue(text: Any) -> bool:
    """Whether a text is turns of "Human: " and "Assistant: ", each after an empty line."""
    return isinstance(text, str) and re.match(r"\s*Human: ?", text) is not None and "\n\nAssistant:" in text


def dialogue(text: str) -> list[Message]:
    """Its turns as messages; a last turn of nobody's words is left out. Raises `RowError`."""
    parts = _TURN.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[speaker], "content": words.strip()}
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not turns[-1]["content"]:
        turns.pop()
    return turns


# several answers, ranked or scored


def _best_and_worst(answers: Sequence[Any], scores: Sequence[Any], place: str, lower_is_better: bool = False) -> Row:
    """The answers with the best and the worst score as `chosen` and `rejected`."""
    if len(answers) != len(scores):
        raise RowError(f"`{place}` has {len(answers)} answers and {len(scores)} scores")
    rated = [(float(score), answer) for score, answer in zip(scores, answers, strict=True) if _is_number(score)]
    if len(rated) < 2:
        raise RowError(f"`{place}` has {len(rated)} answers with a score; wanted two or more")
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        raise RowError(f"`{place}`: all answers have the score {best[0]:g}, so none is better")
    best, worst = (worst, best) if lower_is_better else (best, worst)
    return {"chosen": _answer(best[1], place), "rejected": _answer(worst[1], place)}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return False
    try:
        return float(value) == float(value)
    except (TypeError, ValueError):
        return False


_SCORES = ("overall_score", "fine-grained_score", "score", "rating", "rank")


def _completions(row: Row) -> Row:
    """UltraFeedback: `completions` with `response` and a score; Nectar: `answers` with `answer` and `rank`."""
    column, text = ("completions", "response") if row.get("completions") is not None else ("answers", "answer")
    answers = row[column]
    score = next(name for name in _SCORES if any(_is_number(answer.get(name)) for answer in answers))
    pair = _best_and_worst(
        [answer.get(text) for answer in answers], [answer.get(score) for answer in answers], column, score == "rank"
    )
    asked = "prompt" if row.get("prompt") is not None else "instruction"
    return {**_rest(row, column, asked), "prompt": _question(row[asked], asked), **pair}


def _has_completions(row: Row) -> bool:
    for column, text in (("completions", "response"), ("answers", "answer")):
        answers = row.get(column)
        if not _is_pair(row) and isinstance(answers, list) and answers:
            rated = all(isinstance(answer, Mapping) and text in answer for answer in answers)
            named = row.get("prompt") is not None or row.get("instruction") is not None
            return rated and named and any(_is_number(answer.get(name)) for answer in answers for name in _SCORES)
    return False


_ANSWERS = ("generations", "responses", "completions", "answers", "outputs")
_RATINGS = {"ratings": False, "scores": False, "rewards": False, "ranks": True, "rankings": True, "rank": True}


def _lists(row: Row) -> tuple[str, str, str] | None:
    """The columns of a question, of several answers as texts, and of their ratings or ranks."""
    asked = next((name for name in ("prompt", "instruction", "question") if row.get(name) is not None), None)
    answers = next((name for name in _ANSWERS if _is_list_of(row.get(name), str)), None)
    rated = next((name for name in _RATINGS if isinstance(row.get(name), list)), None)
    return None if asked is None or answers is None or rated is None else (asked, answers, rated)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, kind) for item in value)


def _rated_lists(row: Row) -> Row:
    columns = _lists(row)
    assert columns is not None
    asked, answers, rated = columns
    pair = _best_and_worst(row[answers], row[rated], answers, lower_is_better=_RATINGS[rated])
    return {**_rest(row, *columns), "prompt": _question(row[asked], asked), **pair}


def _safe_rlhf(row: Row) -> Row:
    verdicts = (row.get(name) for name in ("better_response_id", "safer_response_id"))
    better = next((verdict for verdict in verdicts if verdict is not None), None)
    if better not in (0, 1):
        raise RowError(f"`better_response_id` is {better!r}; wanted 0 or 1")
    names = ("response_0", "response_1")
    return {
        **_rest(row, *names),
        "prompt": _question(row["prompt"], "prompt"),
        "chosen": _answer(row[names[better]], names[better]),
        "rejected": _answer(row[names[1 - better]], names[1 - better]),
    }


# a pair under other names


def _renamed(chosen: str, rejected: str) -> Form:
    return Form(
        _with(chosen, rejected),
        lambda row: {**_rest(row, chosen, rejected), "chosen": row[chosen], "rejected": row[rejected]},
        f"`{chosen}` and `{rejected}` are the pair",
    )


def _asked_in_question(row: Row) -> bool:
    texts = all(isinstance(row.get(name), str) for name in ("question", "chosen", "rejected"))
    return texts and row.get("prompt") is None


def _question_and_answers(row: Row) -> Row:
    sides = {side: _answer(row[side], side) for side in ("chosen", "rejected")}
    return {**_rest(row, "question"), "prompt": _question(row["question"], "question"), **sides}


def _is_two_outputs(row: Row) -> bool:
    outputs = row.get("output")
    two = isinstance(outputs, list) and len(outputs) == 2 and _is_list_of(outputs, str)
    return two and not _is_pair(row) and row.get("instruction") is not None


def _is_two_dialogues(row: Row) -> bool:
    return row.get("prompt") is None and is_dialogue(row.get("chosen")) and is_dialogue(row.get("rejected"))


# the first that fits is taken
FORMS = (
    Form(
        lambda row: _with("messages", "rejected_response")(row) or _with("messages", "rejected_messages")(row),
        _swift,
        "the last turn of `messages` is the chosen answer (ms-swift's form)",
    ),
    Form(
        _with("query", "response", "rejected_response"), _old_swift, "`response` is the chosen answer (ms-swift's form)"
    ),
    _renamed("chosen_messages", "rejected_messages"),
    _renamed("chosen_response", "rejected_response"),
    Form(
        _with("prompt", "response_0", "response_1"),
        _safe_rlhf,
        "`better_response_id` says which response is chosen, or `safer_response_id` where there is no other",
    ),
    Form(_has_completions, _completions, "of several answers the best is chosen and the worst rejected"),
    Form(
        lambda row: not _is_pair(row) and _lists(row) is not None,
        _rated_lists,
        "of several answers the best is chosen and the worst rejected",
    ),
    Form(
        _is_two_outputs,
        lambda row: {**_rest(row, "output"), "chosen": row["output"][0], "rejected": row["output"][1]},
        "the first text in `output` is chosen, the second rejected",
    ),
    Form(
        _is_two_dialogues,
        lambda row: {**row, **{side: dialogue(row[side]) for side in ("chosen", "rejected")}},
        "turns of Human and Assistant are made messages",
    ),
    Form(_asked_in_question, _question_and_answers, "`question` is what the user asks"),
)
