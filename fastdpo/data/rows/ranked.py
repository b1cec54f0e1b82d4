"""Rows with more than two answers, or with two and a judgement: the best is chosen, the worst is rejected."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from fastdpo.data.errors import RowError
from fastdpo.data.rows.messages import Message
from fastdpo.data.rows.notes import Note
from fastdpo.data.rows.row_parts import Row, Taken, answer, without

_RATINGS = ("ratings", "rating", "scores")


def best_against_worst(row: Row) -> Taken | None:
    """Ranked answers -> the best and the worst; None for a row without.

    - UltraFeedback: `instruction`, and `completions` with `response` and scores.
    - distilabel: `instruction` (or `prompt`, `input`, `messages`), `generations`, and as many `ratings`.
    - Nectar: `prompt`, and `answers` with `answer` and `rank` (1 is the best).

    Raises `RowError` for a row whose answers are all equally good.
    """
    if row.get("chosen") is not None:
        return None
    if isinstance(row.get("completions"), list):
        return _ranked(row, "completions", _completion)
    if isinstance(row.get("answers"), list) and all(isinstance(item, Mapping) for item in row["answers"]):
        return _ranked(row, "answers", _ranked_answer)
    if isinstance(row.get("generations"), list):
        return _rated(row)
    return None


def better_of_two(row: Row) -> Taken | None:
    """PKU-SafeRLHF: `response_0`, `response_1`, and `better_response_id` (else `safer_response_id`)."""
    judged = [name for name in ("better_response_id", "safer_response_id") if row.get(name) is not None]
    if not judged or row.get("chosen") is not None:
        return None
    responses = [answer(row.get(name), name) for name in ("response_0", "response_1")]
    better = row[judged[0]]
    if better not in (0, 1):
        raise RowError(f"`{judged[0]}` is {better!r}; wanted 0 or 1")
    text = f"chosen is the response that `{judged[0]}` names, and question and responses became messages"
    pair = {"chosen": [responses[int(better)]], "rejected": [responses[1 - int(better)]]}
    question = _question(row)
    return {**without(row, question, "response_0", "response_1"), "prompt": row[question], **pair}, Note(text)


def _question(row: Row) -> str:
    """The column that was answered."""
    for name in ("prompt", "instruction", "messages", "input", "question"):
        if row.get(name) is not None:
            return name
    raise RowError("has answers but no question; wanted `prompt` or `instruction`")


def _ranked(row: Row, column: str, read: Callable[[Any, str], tuple[Message, float, str]]) -> Taken:
    answers = [read(item, f"{column}[{index}]") for index, item in enumerate(row[column])]
    kinds = {kind for _, _, kind in answers}
    if len(kinds) > 1:
        raise RowError(f"`{column}` are scored in different ways ({', '.join(sorted(kinds))})")
    text = f"chosen is the answer in `{column}` with the best {''.join(kinds)}, rejected the one with the worst"
    if any(item.get("custom_system_prompt") for item in row[column]):  # another one for each answer
        text = f"{text} (the system prompts that the answers were sampled with are not used)"
    return _pair(row, column, [(message, score) for message, score, _ in answers], text)


def _rated(row: Row) -> Taken:
    name = next((name for name in _RATINGS if isinstance(row.get(name), list)), None)
    if name is None:
        raise RowError("has `generations` but no `ratings`, which say which is better")
    generations, ratings = row["generations"], row[name]
    if len(generations) != len(ratings):
        raise RowError(f"`generations` has {len(generations)} texts and `{name}` {len(ratings)} numbers")
    scored = [
        (answer(text, f"generations[{index}]"), _number(rating, f"{name}[{index}]"))
        for index, (text, rating) in enumerate(zip(generations, ratings, strict=True))
        if rating is not None  # an answer that the judge gave none
    ]
    if row.get("system") is None and row.get("system_prompt") is not None:  # its name in distilabel
        row = {**without(row, "system_prompt"), "system": row["system_prompt"]}
    text = f"chosen is the text in `generations` with the best of `{name}`, rejected the one with the worst"
    return _pair(row, "generations", scored, text)


def _pair(row: Row, column: str, scored: list[tuple[Message, float]], text: str) -> Taken:
    if len(scored) < 2:
        raise RowError(f"`{column}` has {len(scored)} scored answers; wanted at least 2")
    best = max(scored, key=lambda item: item[1])
    worst = min(scored, key=lambda item: item[1])
    if best[1] == worst[1]:
        raise RowError(f"`{column}` are all equally good, so that none is chosen over another")
    question = _question(row)
    pair = {"chosen": [best[0]], "rejected": [worst[0]]}
    return {**without(row, question, column), "prompt": row[question], **pair}, Note(f"{text}; they became messages")


def _completion(item: Any, place: str) -> tuple[Message, float, str]:
    """UltraFeedback's completion. Its `fine-grained_score` is the mean of the four ratings."""
    if not isinstance(item, Mapping) or "response" not in item:
        raise RowError(f"`{place}` is not an object with `response`")
    message = answer(item["response"], f"{place}.response")
    # the mean of the ratings first: the overall score is known to be wrong in part of the data
    for name in ("fine-grained_score", "overall_score", "score"):
        if item.get(name) is not None:
            return message, _number(item[name], f"{place}.{name}"), f"`{name}`"
    annotations = item.get("annotations")
    aspects = annotations.items() if isinstance(annotations, Mapping) else ()
    ratings = [
        _number(aspect["Rating"], f"{place}.annotations.{name}.Rating")
        for name, aspect in aspects
        if isinstance(aspect, Mapping) and aspect.get("Rating") not in (None, "N/A")
    ]
    if not ratings:
        raise RowError(
            f"`{place}` has no score (`fine-grained_score`, `overall_score`, or a `Rating` in `annotations`)"
        )
    return message, sum(ratings) / len(ratings), "mean `Rating`"


def _ranked_answer(item: Any, place: str) -> tuple[Message, float, str]:
    rank = next((name for name in ("rank", "score") if item.get(name) is not None), None)
    if rank is None or item.get("answer") is None:
        raise RowError(f"`{place}` is not an object with `answer` and `rank`")
    number = _number(item[rank], f"{place}.{rank}")
    return answer(item["answer"], f"{place}.answer"), -number if rank == "rank" else number, f"`{rank}`"


def _number(value: Any, place: str) -> float:
    try:
        number = float(value)
        if isinstance(value, bool) or not isfinite(number):
            raise ValueError
        return number
    except (TypeError, ValueError):
        raise RowError(f"`{place}` is {value!r}; wanted a number") from None
