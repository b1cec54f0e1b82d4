"""What looks wrong in tokenized pairs, one sentence each; counted in Arrow's buffers, so that training can look too."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdpo.data.errors import DataError
from fastdpo.data.limits import flat_lists
from fastdpo.data.rows.messages import for_template, from_json
from fastdpo.data.rows.sides import id_columns
from fastdpo.data.shown import template_errors
from fastdpo.json_text import read_json
from fastdpo.wording import first_line


def repeated_pairs(pairs: Dataset) -> tuple[int, int]:
    """How many pairs have the same chosen and rejected tokens, and how many rows are the same as an earlier one.

    Unpaired rows of the same answer count as the same whatever their labels say.
    """
    identical = 0
    seen: set[int] = set()
    for lists in flat_lists(pairs, id_columns(pairs.column_names)):
        parts = []
        for values, offsets in lists.values():
            ids = values.astype(np.int64).tobytes()
            parts.append([ids[8 * begin : 8 * end] for begin, end in pairwise(offsets.tolist())])
        for row in zip(*parts, strict=True):
            identical += len(row) == 3 and row[1] == row[2]
            seen.add(hash(row))
    return identical, len(pairs) - len(seen)


def special_token_findings(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One sentence for each thing that is unusual about BOS and EOS: doubled, missing."""
    total = len(pairs)
    findings = []
    doubled_bos = 0
    ends = end_ids(tokenizer)
    blank = _Blank(tokenizer)
    columns = id_columns(pairs.column_names)
    sides = [column.removesuffix("_ids") for column in columns[1:]]
    missing, doubled = np.zeros(len(sides), int), np.zeros(len(sides), int)
    for table in flat_lists(pairs, columns):
        doubled_bos += _count_double_bos(*table["prompt_ids"], tokenizer.bos_token_id)
        counts = np.array([_count_endings(*table[side], ends, blank) for side in columns[1:]])
        missing += counts[:, 0]
        doubled += counts[:, 1]
    if doubled_bos:
        findings.append(
            f"{doubled_bos} of {total} prompts begin with {tokenizer.bos_token} twice: the text or the template has "
            "it, and the tokenizer adds it again; take it out of one of them."
        )
    names = (
        " or ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ends)) or "(the tokenizer has none)"
    )
    for counts, text in (
        (missing, f"do not end with the EOS token {names}: a model trained on them may not learn to stop"),
        (doubled, f"end with the EOS token {names} twice: take it out of the data or the template"),
    ):
        if any(counts):
            whose = sides if len(sides) > 1 else [""]
            where = " and ".join(f"{n} of {total} {side}".rstrip() for n, side in zip(counts, whose, strict=True))
            findings.append(f"{where} completions {text}.")
    return findings


@dataclass(frozen=True)
class Weights:
    """What training gives to `balance_findings`, under the names of its arguments; these are the defaults.

    per_device_train_batch_size: None where it is not known."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    train_sampling_strategy: str | None = "sequential"
    per_device_train_batch_size: int | None = None


def balance_findings(labels: Sequence[bool], options: Weights | Any) -> list[str]:
    """The same about desirable and undesirable answers. options: a config, or `Weights`."""
    good = int(np.count_nonzero(labels))
    bad = len(labels) - good
    if not good or not bad:
        kind = "undesirable" if bad else "desirable"
        return [f"all {len(labels)} answers are {kind}: nothing tells the model what the other kind is."]
    findings = []
    weights = options.desirable_weight, options.undesirable_weight
    ratio = weights[0] * good / (weights[1] * bad) if weights[1] else np.inf
    # eq. 8 of arXiv:2402.01306, with TRL's room for rounding
    if not 0.99 <= ratio <= 1.34:
        lowest, most = weights[1] * bad / good, 4 / 3 * weights[1] * bad / good
        others = weights[0] * good / bad
        findings.append(
            f"{good} desirable and {bad} undesirable answers weigh {ratio:.2f} to 1, and the KTO paper takes 1 to 4/3: "
            f"give desirable_weight between {lowest:.2f} and {most:.2f}, or undesirable_weight between "
            f"{0.75 * others:.2f} and {others:.2f}, not both."
        )
    size = options.per_device_train_batch_size
    if options.train_sampling_strategy == "sequential" and size and len(labels) > 2 * size:
        batches = np.asarray(labels, dtype=bool)[: len(labels) // size * size].reshape(-1, size)
        one_kind = float((batches.all(1) | ~batches.any(1)).mean())
        # what answers in random order have, and four standard deviations more
        share = good / len(labels)
        usual = share**size + (1 - share) ** size
        if one_kind > 0.5 and one_kind > usual + 4 * (usual * (1 - usual) / len(batches)) ** 0.5:
            findings.append(
                f"{one_kind:.0%} of the batches of {size} rows, which are taken in their order, have one kind of "
                "answers alone: shuffle the rows, or give train_sampling_strategy='random'."
            )
    return findings


def template_findings(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The same about the chat template, for a row before tokenization."""
    if isinstance(row["prompt"], str) or has_generation_prompt(row, tokenizer):
        return []
    return [
        "the chat template ignores add_generation_prompt: the header of the answer's turn is scored as part of "
        "the completions, and generation has to produce it."
    ]


def has_generation_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template adds anything to the row's prompt when asked for a generation prompt."""
    options = {"tools": from_json(row.get("tools")), **(from_json(row.get("chat_template_kwargs")) or {})}
    prompt = for_template(row["prompt"])
    try:
        with template_errors():
            without, with_it = (
                tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=prompted, **options)
                for prompted in (False, True)
            )
    except TemplateError:  # a row that it refuses, which is said elsewhere
        return True
    return without != with_it


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the tokenizer's EOS, and those of a generation_config.json beside it."""
    ids: list[Any] = [tokenizer.eos_token_id]
    file = Path(tokenizer.name_or_path, "generation_config.json")
    if file.is_file():
        try:
            eos = read_json(file).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file} is not a JSON object ({first_line(error)}); copy or save the model again."
            ) from error
        ids += eos if isinstance(eos, list) else [eos]
    return {token for token in ids if isinstance(token, int)}


class _Blank:
    """Whether a token is nothing but white space; each is decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        distinct, place = np.unique(tokens, return_inverse=True)
        for token in distinct.tolist():
            if token not in self.known:
                self.known[token] = not str(self.tokenizer.decode([token])).strip()
        return np.array([self.known[token] for token in distinct.tolist()], dtype=bool)[place]


def _count_double_bos(ids: np.ndarray, offsets: np.ndarray, bos: Any) -> int:
    begin = offsets[:-1][np.diff(offsets) >= 2]
    return 0 if bos is None else int(((ids[begin] == bos) & (ids[begin + 1] == bos)).sum())


def _count_endings(ids: np.ndarray, offsets: np.ndarray, ends: set[int], blank: _Blank) -> tuple[int, int]:
    """Completions without a token of `ends` before trailing white space, and those that have it twice."""
    begin, place = offsets[:-1], offsets[1:] - 1
    rows = np.flatnonzero(place >= begin)
    ended = np.zeros(len(begin), dtype=bool)
    while len(rows):
        tokens = ids[place[rows]]
        is_end = np.isin(tokens, list(ends))
        ended[rows[is_end]] = True
        rows = rows[~is_end & blank(tokens)]
        place[rows] -= 1
        rows = rows[place[rows] >= begin[rows]]
    ending, doubled = ids[np.maximum(place, 0)], 0
    # the same token once more, white space between them aside
    rows = np.flatnonzero(ended)
    place[rows] -= 1
    rows = rows[place[rows] >= begin[rows]]
    while len(rows):
        tokens = ids[place[rows]]
        doubled += int((tokens == ending[rows]).sum())
        rows = rows[(tokens != ending[rows]) & blank(tokens)]
        place[rows] -= 1
        rows = rows[place[rows] >= begin[rows]]
    return int((~ended).sum()), doubled
