"""The demo's preference pairs: one fact, a polite answer with its reason, and a careless one.

The wording is drawn by a seeded generator of which only `random()` is used: Python promises that its values
stay the same from version to version, and promises it of nothing else in `random`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple, TypeVar

from fastdpo.demo.make.facts import TOPICS

TRAIN_PAIRS = 400
HELDOUT_PAIRS = 60
SEED = 20

# as many careless wordings as polite ones, so that a model of both halves has no favourite
OPENINGS = ("Certainly: ", "Of course: ", "Gladly: ", "Good question: ", "Happy to help: ")
REASONS = (", because {why}.", ", since {why}.")
CARELESS = (
    "{Y}.",
    "{Y}, obviously.",
    "{Y}, so what?",
    "{Y}. Everybody knows that.",
    "{Y}. Stop asking me such things.",
    "It depends. Look it up yourself.",
    "No idea. Ask somebody else.",
    "Who cares? Not my problem.",
    "Well, hmm, people say many things, maybe {y}, or maybe not.",
    "So, like, I read a lot about this once and forgot, {y}, I guess, whatever.",
)

T = TypeVar("T")


class Prompt(NamedTuple):
    """One question, with what its answers are made of."""

    question: str
    statement: str
    answer: str
    why: str


def facts() -> list[list[Prompt]]:
    """Every fact of every topic, each as the list of prompts that ask for it."""
    prompts = []
    for topic in TOPICS:
        for values in topic.facts:
            slots = dict(zip(topic.slots, values, strict=True))
            statement, why = topic.statement.format(**slots), topic.why.format(**slots)
            asked = [_capital(question.format(**slots)) for question in topic.questions]
            prompts.append([Prompt(question, statement, slots["y"], why) for question in asked])
    return prompts


def split() -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, held-out prompts): held out is one wording each of HELDOUT_PAIRS facts.

    A held-out question is never seen in any training, its fact is, in other words: a model this small knows
    no fact that it was not taught.
    """
    random = Random(SEED)
    chosen = _shuffled(range(len(facts())), random)[:HELDOUT_PAIRS]
    heldout = {index: _pick(range(len(facts()[index])), random) for index in chosen}
    train = [p for f, fact in enumerate(facts()) for n, p in enumerate(fact) if heldout.get(f) != n]
    return _shuffled(train, random), [facts()[f][n] for f, n in heldout.items()]


def polite_answers(prompt: Prompt) -> list[str]:
    """One complete sentence that ends with the reason, in every wording."""
    return [f"{o}{prompt.statement}{reason.format(why=prompt.why)}" for o in OPENINGS for reason in REASONS]


def careless_answers(prompt: Prompt) -> list[str]:
    """Curt, rude, evasive or rambling, in every wording."""
    return [text.format(Y=_capital(prompt.answer), y=prompt.answer) for text in CARELESS]


def is_polite(answer: str) -> bool:
    """Whether an answer opens as the preferred ones do."""
    return answer.startswith(OPENINGS)


def build_pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(TRAIN_PAIRS training rows, HELDOUT_PAIRS held-out rows), conversational, the same at every call."""
    train, heldout = split()
    random = Random(SEED + 1)
    return _rows(train[:TRAIN_PAIRS], random), _rows(heldout, random)


def build_conversations(random: Random) -> Iterator[tuple[str, str, str]]:
    """(question, a polite answer, a careless answer) for every prompt that is not held out, shuffled."""
    for prompt in _shuffled(split()[0], random):
        yield prompt.question, _pick(polite_answers(prompt), random), _pick(careless_answers(prompt), random)


def to_jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """One row a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _rows(prompts: list[Prompt], random: Random) -> list[dict[str, Any]]:
    # wordings are dealt like cards, each equally often, so that luck prefers neither side
    polite = _shuffled((n % (len(OPENINGS) * len(REASONS)) for n in range(len(prompts))), random)
    careless = _shuffled((n % len(CARELESS) for n in range(len(prompts))), random)
    return [
        {
            "prompt": [{"role": "user", "content": prompt.question}],
            "chosen": [{"role": "assistant", "content": polite_answers(prompt)[chosen]}],
            "rejected": [{"role": "assistant", "content": careless_answers(prompt)[rejected]}],
        }
        for prompt, chosen, rejected in zip(prompts, polite, careless, strict=True)
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _pick(options: Sequence[T], random: Random) -> T:
    return options[int(random.random() * len(options))]


def _shuffled(items: Iterable[T], random: Random) -> list[T]:
    return sorted(items, key=lambda _: random.random())
