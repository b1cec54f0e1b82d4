"""What preference rows become under a tokenizer: counts, lengths, what is cut, and what looks wrong."""

import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.data.findings import Weights, balance_findings, repeated_pairs, special_token_findings, template_findings
from fastdpo.data.limits import Limits, apply_limits, measure
from fastdpo.data.rows.sides import LABEL, SIDES, sides_of, token_columns
from fastdpo.data.tokenize_dataset import tokenize_dataset, tokenize_rows

QUANTILES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Inspection:
    """`report` is plain JSON; `pairs` has the ids (not cut); `lengths` maps prompt, chosen, ... to (rows,) int64."""

    report: dict[str, Any]
    pairs: Dataset
    lengths: dict[str, np.ndarray]


def inspect_pairs(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_lengths: Sequence[int],
    *,
    truncation_mode: str = "keep_start",
    on_overlong: str = "truncate",
    scored_turns: str = "last",
    num_proc: int | None = None,
    name: str = "train",
    skip_bad_rows: bool = False,
) -> Inspection:
    """Look at the rows of `load_preferences`, tokenized by the code that training runs.

    The report's lengths are in tokens; "longer sequence" is the prompt with the longer completion, which `max_length`
    is compared with ("sequence" of unpaired rows). Its table `truncation` has training's `TokenizeReport` for each of
    `max_lengths`. `scored_turns` as in `tokenize_row`.

    Raises `DataError` as `tokenize_dataset` does, but neither where a `max_length` leaves no row nor for
    `on_overlong="error"`.
    """
    options: dict[str, Any] = {"scored_turns": scored_turns}
    pairs, whole = tokenize_dataset(
        rows, tokenizer, max_length=None, num_proc=num_proc, name=name, skip_bad_rows=skip_bad_rows, **options
    )
    assert isinstance(pairs, Dataset)
    if whole.dropped_unscored:  # completions without any token: keep them, so that row numbers stay those of the data
        columns = token_columns(pairs.column_names)
        pairs, _ = tokenize_rows(rows, tokenizer, name, None, scored_turns, num_proc, skip_bad_rows)
        pairs = pairs.select_columns(columns)
    measured = measure(pairs)
    sides = sides_of(pairs.column_names)
    paired = sides == SIDES
    lengths = {
        "prompt": measured.prompt,
        **dict(zip(sides, measured.completions, strict=True)),
        _WHOLE[paired]: measured.prompt + measured.longer,
    }
    identical, duplicated = repeated_pairs(pairs)
    # a run that would stop there is no reason not to look
    drop = "drop" if on_overlong == "drop" else "truncate"
    limits = [Limits(length, truncation_mode, on_overlong=drop) for length in max_lengths]
    report = {
        "name": name,
        "rows": len(pairs),
        "kind": "text" if isinstance(rows[0]["prompt"], str) else "messages",
        "with_tools": sum(bool(tools) for tools in rows["tools"]) if "tools" in rows.column_names else 0,
        **({"identical": identical} if paired else _labels(pairs)),
        "duplicated": duplicated,
        "distinct_prompts": len({json.dumps(prompt) for prompt in rows["prompt"]}),
        **({"chosen_longer": float(np.greater(*measured.completions).mean())} if paired else {}),
        "lengths": {
            part: {label: float(np.quantile(values, q)) for label, q in QUANTILES.items()}
            for part, values in lengths.items()
        },
        "prompt_cut": whole.prompt_cut,
        "truncation_mode": truncation_mode,
        "on_overlong": on_overlong,
        "scored_turns": scored_turns,
        "truncation": [apply_limits(measured, limit, name)[1].as_dict() for limit in limits],
        "findings": [
            *whole.left_out,
            *special_token_findings(pairs, tokenizer),
            *template_findings(rows[0], tokenizer),
            *([] if paired else balance_findings(pairs[LABEL], Weights())),
        ],
    }
    if whole.prompt_cut:
        report["findings"].append(
            f"in {whole.prompt_cut} of {len(pairs)} rows the prompt alone ends in other tokens than before its "
            "completion (the template renders it otherwise, or tokens merge across the boundary): completions start "
            "where they part."
        )
    return Inspection(report, pairs, lengths)


# the sequence that max_length is compared with, of unpaired rows and of pairs
_WHOLE = ("sequence", "longer sequence")


def _labels(rows: Dataset) -> dict[str, int]:
    desirable = int(np.count_nonzero(rows[LABEL]))
    return {"desirable": desirable, "undesirable": len(rows) - desirable}


def histogram_png(inspection: Inspection, max_lengths: Sequence[int]) -> bytes:
    """Two panels: the lengths of the parts, and of the longer sequence of each pair with `max_lengths` marked."""
    # the object interface: no pyplot state, no display, any thread
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    parts, whole = figure.subplots(1, 2)
    lengths = dict(inspection.lengths)
    longest = lengths.pop(next(name for name in _WHOLE if name in lengths))
    # one very long row would squeeze all others into the first bar
    bins = _bins(np.concatenate(list(lengths.values())))
    for (name, values), color in zip(lengths.items(), ("tab:gray", "tab:blue", "tab:orange"), strict=False):
        parts.hist(np.minimum(values, bins[-1]), bins, histtype="step", linewidth=1.6, color=color, label=name)
    parts.set(title=", ".join(lengths), xlabel=_label(bins, longest=max(v.max() for v in lengths.values())))
    parts.legend()
    bins = _bins(longest, max(max_lengths))
    whole.hist(np.minimum(longest, bins[-1]), bins, color="tab:blue", alpha=0.75)
    for length, style in zip(max_lengths, itertools.cycle(("--", "-.", ":"))):
        over = float((longest > length).mean())
        whole.axvline(length, color="tab:red", linestyle=style, label=f"max_length {length}: {over:.1%} are longer")
    paired = len(lengths) > 2
    whole.set(title=f"prompt + {'longer ' if paired else ''}completion", xlabel=_label(bins, longest=longest.max()))
    whole.legend()
    for axes in (parts, whole):
        axes.set_ylabel("pairs" if paired else "rows")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{inspection.report['name']}: {inspection.report['rows']} {'pairs' if paired else 'rows'}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _bins(values: np.ndarray, at_least: int = 0) -> np.ndarray:
    return np.linspace(0, max(float(np.quantile(values, 0.99)), at_least * 1.05, 1.0), 41)


def _label(bins: np.ndarray, longest: int) -> str:
    return "tokens" if longest <= bins[-1] else f"tokens (the last bar holds all longer ones, up to {longest})"
