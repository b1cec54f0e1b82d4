"""What `max_length` and its relatives do to tokenized rows: which are kept, which are cut, which are too long."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from fastdpo.data.errors import DataError
from fastdpo.data.rows.sides import id_columns, mask_columns, sides_of
from fastdpo.data.tokenize_report import TokenizeReport
from fastdpo.data.tokenize_row import PROMPT_CUT
from fastdpo.wording import count

ON_OVERLONG = ("truncate", "drop", "error")
_SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """`DPOConfig`'s arguments of these names."""

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    on_overlong: str = "truncate"

    def __post_init__(self) -> None:
        if self.on_overlong not in ON_OVERLONG:
            raise ValueError(f"on_overlong is {self.on_overlong!r}; wanted one of {', '.join(ON_OVERLONG)}.")

    @property
    def shortens(self) -> bool:
        """Whether prompts or completions have a limit of their own."""
        return bool(self.max_prompt_length or self.max_completion_length)

    def parts(self, completions: int) -> list[int | None]:
        """The longest prompt, and the longest of each completion."""
        return [self.max_prompt_length, *[self.max_completion_length] * completions]

    def shorten(self, row: dict[str, Any]) -> dict[str, Any]:
        """The prompt's last tokens and the completions' first ones, and what of the masks belongs to them."""
        limit = self.max_prompt_length
        cuts = [slice(-limit if limit else None, None)]
        cuts += [slice(self.max_completion_length)] * len(sides_of(row))
        columns = [*zip(id_columns(row), cuts, strict=True), *zip(mask_columns(row), cuts, strict=True)]
        return {column: row[column][part] for column, part in columns if column in row}


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, (rows,) int64 each; of chosen and rejected, or of the one completion. first, last: its scored
    tokens at either end, as indices into the completion; where none is scored, first is past last."""

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    first: tuple[np.ndarray, ...]
    last: tuple[np.ndarray, ...]
    prompt_cut: np.ndarray | None = None

    @property
    def longer(self) -> np.ndarray:
        """Of the longer completion."""
        return np.maximum.reduce(self.completions)


def flat_lists(dataset: Dataset, columns: Sequence[str]) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Columns of lists of ints, some rows at a time, without Python lists: all values, and where each row begins.

    Each pair is values (n,) and offsets (rows + 1,) int64.
    """
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000):
        lists = {}
        for column in columns:
            chunk = cast("pa.Table", table).column(column).combine_chunks()
            lengths = pc.call_function("list_value_length", [chunk]).to_numpy(zero_copy_only=False)
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            lists[column] = values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        yield lists


def measure(dataset: Dataset) -> Lengths:
    """The lengths of a dataset's rows."""
    ids, masks = id_columns(dataset.column_names), mask_columns(dataset.column_names)
    masked = masks[0] in dataset.column_names
    parts: list[list[np.ndarray]] = []
    for lists in flat_lists(dataset, [*ids, *masks[1:]] if masked else ids):
        prompt, *completions = (np.diff(lists[column][1]) for column in ids)
        ends = [_ends(*lists[name]) for name in masks[1:]] if masked else [(n * 0, n - 1) for n in completions]
        parts.append([prompt, *completions, *(first for first, _ in ends), *(last for _, last in ends)])
    prompt, *rest = (np.concatenate(part) for part in zip(*parts, strict=True))
    sides = len(ids) - 1
    cut = None
    if PROMPT_CUT in dataset.column_names:
        cut = np.array(dataset.select_columns([PROMPT_CUT])[:][PROMPT_CUT])
    return Lengths(prompt, tuple(rest[:sides]), tuple(rest[sides : 2 * sides]), tuple(rest[2 * sides :]), cut)


def _ends(mask: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last 1 of each row of a mask, as indices into the row; past it and -1 where it has none."""
    ones = np.concatenate([[-1], np.flatnonzero(mask), [len(mask)]])
    begin, end = offsets[:-1], offsets[1:]
    first = ones[np.searchsorted(ones, begin)] - begin
    last = ones[np.searchsorted(ones, end) - 1] - begin
    return first, np.maximum(last, -1)


def measure_row(row: Mapping[str, Any]) -> Lengths:
    """The same for one row of a stream."""
    prompt, *completions = (np.array([len(row[column])]) for column in id_columns(row))
    masks = mask_columns(row)
    if masks[0] in row:
        ends = [_ends(np.asarray(row[name]), np.array([0, len(row[name])])) for name in masks[1:]]
    else:
        ends = [(n * 0, n - 1) for n in completions]
    return Lengths(prompt, tuple(completions), tuple(first for first, _ in ends), tuple(last for _, last in ends))


@dataclass(frozen=True)
class Verdict:
    """What the limits do to each row, (rows,) bool each. `cut`, `scored`, `whole`: of each completion; `shortened`: of
    the prompt and of each."""

    overlong: np.ndarray
    long_prompt: np.ndarray
    cut: list[np.ndarray]
    scored: list[np.ndarray]
    whole: list[np.ndarray]  # int64, tokens of prompt + completion
    shortened: list[np.ndarray]

    def kept(self, drop_overlong: bool) -> np.ndarray:
        kept = ~self.long_prompt & np.logical_or.reduce(self.scored)
        return kept & ~self.overlong if drop_overlong else kept


def judge(lengths: Lengths, limits: Limits) -> Verdict:
    """What the collator will cut off each sequence, and whether it then has a token to score."""
    whole_lengths = [lengths.prompt, *lengths.completions]
    most = limits.parts(len(lengths.completions))
    prompt, *completions = (
        n if limit is None else np.minimum(n, limit) for n, limit in zip(whole_lengths, most, strict=True)
    )
    keep_start = limits.truncation_mode == "keep_start"
    whole, cut, scored = [], [], []
    for completion, first, last in zip(completions, lengths.first, lengths.last, strict=True):
        whole.append(prompt + completion)
        over = np.maximum(whole[-1] - limits.max_length, 0) if limits.max_length is not None else completion * 0
        begin = completion * 0 if keep_start else np.maximum(over - prompt, 0)
        end = completion - over if keep_start else completion
        # position 0 has nothing before it that could predict it
        nothing_before = prompt == 0 if keep_start else prompt <= over
        begin = begin + nothing_before
        cut.append(over > 0)
        scored.append(np.maximum(first, begin) < np.minimum(last + 1, end))
    long_prompt = prompt >= limits.max_length if keep_start and limits.max_length is not None else prompt < 0
    left = [prompt, *completions]
    return Verdict(
        overlong=np.logical_or.reduce(cut),
        long_prompt=long_prompt,
        cut=cut,
        scored=scored,
        whole=whole,
        shortened=[before > after for before, after in zip(whole_lengths, left, strict=True)],
    )


def apply_limits(lengths: Lengths, limits: Limits, name: str) -> tuple[np.ndarray, TokenizeReport]:
    """The indices of the rows that are kept, and the counts. Raises `DataError` for `on_overlong="error"`."""
    verdict = judge(lengths, limits)
    drop = limits.on_overlong == "drop"
    if limits.on_overlong == "error" and verdict.overlong.any():
        raise DataError(_overlong(verdict, limits, name))
    kept = verdict.kept(drop)
    overlong = verdict.overlong if drop else kept & False
    long_prompt = verdict.long_prompt & ~overlong

    def total(which: np.ndarray) -> int:
        return int((which & kept).sum())

    names = ("chosen", "rejected") if len(verdict.cut) == 2 else ("completions",)
    cut: dict[str, Any] = {
        f"truncated_{name}": total(of_side) for name, of_side in zip(names, verdict.cut, strict=True)
    }
    for part, shortened in zip(("prompts", *names), verdict.shortened, strict=True):
        cut[f"shortened_{part}"] = total(shortened)
    report = TokenizeReport(
        name=name,
        rows=int(kept.sum()),
        max_length=limits.max_length,
        overlong=int(verdict.overlong.sum()),
        dropped_overlong=int(overlong.sum()),
        dropped_long_prompt=int(long_prompt.sum()),
        dropped_unscored=int((~kept & ~overlong & ~long_prompt).sum()),
        empty_after_truncation=total(~np.logical_and.reduce(verdict.scored)),
        **cut,
        prompt_cut=total(lengths.prompt_cut > 0) if lengths.prompt_cut is not None else 0,
        length_of=_length_of(lengths, limits) if long_prompt.any() else None,
    )
    return np.flatnonzero(kept), report


def _length_of(lengths: Lengths, limits: Limits) -> dict[str, int]:
    """The `max_length` with which the prompt alone fills it in no more than a share of the rows."""
    limit = limits.max_prompt_length
    prompts = np.sort(lengths.prompt if limit is None else np.minimum(lengths.prompt, limit))
    shares = {"95 %": 0.95, "100 %": 1.0}
    return {label: int(prompts[math.ceil(share * len(prompts)) - 1]) + 1 for label, share in shares.items()}


def keep_row(row: dict[str, Any], index: int, limits: Limits, name: str) -> bool:
    """Whether a stream's row is kept. Raises `DataError` for `on_overlong="error"`."""
    verdict = judge(measure_row(row), limits)
    if limits.on_overlong == "error" and verdict.overlong[0]:
        raise DataError(_overlong(verdict, limits, name, first=index))
    return bool(verdict.kept(limits.on_overlong == "drop")[0])


def _overlong(verdict: Verdict, limits: Limits, name: str, first: int = 0) -> str:
    rows = np.flatnonzero(verdict.overlong)
    lines = []
    for row in rows[:_SHOWN]:
        tokens = f"{verdict.whole[0][row]} tokens"
        if len(verdict.whole) == 2:
            tokens += f" with chosen, {verdict.whole[1][row]} with rejected"
        lines.append(f"  {name}[{first + row}]: {tokens}")
    if len(rows) > _SHOWN:
        lines.append(f"  and {len(rows) - _SHOWN} more")
    of = f" of {len(verdict.overlong)}" if len(verdict.overlong) > 1 else ""
    are = "is" if len(rows) == 1 else "are"
    longer = count(len(rows), "pair" if len(verdict.whole) == 2 else "row")
    return "\n".join(
        [
            f"{name}: {longer}{of} {are} longer than max_length={limits.max_length}, and on_overlong is 'error':",
            *lines,
            "Raise max_length, or take on_overlong=drop or truncate.",
        ]
    )


def none_left(lengths: Lengths, report: TokenizeReport) -> str:
    """Why a dataset has no row left."""
    total = len(lengths.prompt)
    rows = f"all {total} rows were" if total > 1 else "the only row was"
    if report.dropped_overlong:
        shortest = int((lengths.prompt + lengths.longer).min())
        return (
            f"{report.name}: {rows} dropped, since each row is longer than max_length={report.max_length} and "
            f"on_overlong is 'drop', or has nothing to score (the shortest has {shortest} tokens); raise max_length."
        )
    if not report.dropped_long_prompt:
        return f"{report.name}: {rows} dropped, since no completion has a token that could be scored."
    rest = f" or no scored token ({report.dropped_unscored})" if report.dropped_unscored else ""
    return (
        f"{report.name}: {rows} dropped, since each prompt alone has max_length={report.max_length} tokens or "
        f"more{rest} (the shortest has {int(lengths.prompt.min())}); raise max_length."
    )
