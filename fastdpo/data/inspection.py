"""What preference rows become under a tokenizer: counts, lengths, what is cut, and what looks wrong."""

import io
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.data.errors import DataError
from fastdpo.data.messages import for_template, from_json
from fastdpo.data.tokenize import ID_COLUMNS, TokenizeReport, tokenize_dataset, tokenize_row

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
    num_proc: int | None = None,
    name: str = "train",
) -> Inspection:
    """Look at the rows of `load_preferences`, tokenized by the code that training runs.

    The report's lengths are in tokens; "longer sequence" is the prompt with the longer completion, which `max_length`
    is compared with. Its table `truncation` has training's `TokenizeReport` for each of `max_lengths`.

    Raises `DataError` as `tokenize_dataset` does, but not where a `max_length` leaves no row.
    """
    pairs, whole = tokenize_dataset(rows, tokenizer, max_length=None, num_proc=num_proc, name=name)
    assert isinstance(pairs, Dataset)
    if len(pairs) < len(rows):  # completions without any token: keep them, so that row numbers stay those of the data
        keys = {"tokenizer": tokenizer}
        pairs = rows.map(tokenize_row, fn_kwargs=keys, remove_columns=rows.column_names).select_columns([*ID_COLUMNS])
    prompt, chosen, rejected = (np.array([len(ids) for ids in pairs[column]], dtype=np.int64) for column in ID_COLUMNS)
    lengths = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "longer sequence": prompt + np.maximum(chosen, rejected),
    }
    texts = Counter(json.dumps(row, sort_keys=True) for row in rows)
    report = {
        "name": name,
        "rows": len(rows),
        "kind": "text" if isinstance(rows[0]["prompt"], str) else "messages",
        "with_tools": sum(bool(tools) for tools in rows["tools"]) if "tools" in rows.column_names else 0,
        "identical": sum(a == b for a, b in zip(rows["chosen"], rows["rejected"], strict=True)),
        "duplicated": len(rows) - len(texts),
        "distinct_prompts": len({json.dumps(prompt) for prompt in rows["prompt"]}),
        "chosen_longer": float((chosen > rejected).mean()),
        "lengths": {
            part: {label: float(np.quantile(values, q)) for label, q in QUANTILES.items()}
            for part, values in lengths.items()
        },
        "prompt_cut": whole.prompt_cut,
        "truncation_mode": truncation_mode,
        "truncation": [_cut(pairs, tokenizer, length, truncation_mode, name) for length in max_lengths],
        "findings": special_token_findings(rows, pairs, tokenizer, whole.prompt_cut or 0),
    }
    return Inspection(report, pairs, lengths)


def _cut(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation_mode: str, name: str
) -> dict[str, Any]:
    limits = {"max_length": max_length, "truncation_mode": truncation_mode}
    try:
        return tokenize_dataset(pairs, tokenizer, name=name, **limits)[1].as_dict()
    except DataError:  # no row is left, which is an answer here
        long = sum(len(ids) >= max_length for ids in pairs["prompt_ids"]) if truncation_mode == "keep_start" else 0
        nothing = TokenizeReport(name, 0, max_length, long, len(pairs) - long, 0, 0, 0)
        return nothing.as_dict()


def special_token_findings(
    rows: Dataset, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, prompt_cut: int = 0
) -> list[str]:
    """One sentence for each thing that is unusual: doubled BOS, missing or doubled EOS, no generation prompt, ...

    rows and pairs: the same rows, before and after tokenization. prompt_cut: `TokenizeReport.prompt_cut`.
    """
    total = len(pairs)
    found = []
    bos = tokenizer.bos_token_id
    double_bos = sum(bos is not None and ids[:2] == [bos, bos] for ids in pairs["prompt_ids"])
    if double_bos:
        found.append(
            f"{double_bos} of {total} prompts begin with {tokenizer.bos_token} twice: the text or the template has it, "
            "and the tokenizer adds it again; take it out of one of them."
        )
    ends = end_ids(tokenizer)
    missing, doubled, tails = {}, {}, {}
    for side in ID_COLUMNS[1:]:
        where = [_last_of(ids, ends) for ids in pairs[side]]
        for ids, last in zip(pairs[side], where, strict=True):
            tail = tuple(ids[last + 1 :]) if last is not None else None
            if tail not in tails:
                tails[tail] = tail is None or bool(str(tokenizer.decode(list(tail))).strip())
            missing[side] = missing.get(side, 0) + tails[tail]
            doubled[side] = doubled.get(side, 0) + (not tails[tail] and bool(last) and ids[last - 1] == ids[last])
    names = (
        " or ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(ends)) or "(the tokenizer has none)"
    )
    for counts, text in (
        (missing, f"do not end with the EOS token {names}: a model trained on them may not learn to stop"),
        (doubled, f"end with the EOS token {names} twice: take it out of the data or the template"),
    ):
        if any(counts.values()):
            chosen, rejected = counts.values()
            found.append(f"{chosen} of {total} chosen and {rejected} of {total} rejected completions {text}.")
    if not isinstance(rows[0]["prompt"], str) and not has_generation_prompt(rows[0], tokenizer):
        found.append(
            "the chat template ignores add_generation_prompt: the header of the answer's turn is scored as part of "
            "the completions, and generation has to produce it."
        )
    if prompt_cut:
        found.append(
            f"in {prompt_cut} of {total} rows the prompt alone ends in other tokens than before its completion (the "
            "template renders it otherwise, or tokens merge across the boundary): completions start where they part."
        )
    return found


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the tokenizer's EOS, and those of a generation_config.json beside it."""
    ids: list[Any] = [tokenizer.eos_token_id]
    file = Path(tokenizer.name_or_path, "generation_config.json")
    if file.is_file():
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ids += eos if isinstance(eos, list) else [eos]
    return {token for token in ids if isinstance(token, int)}


def _last_of(ids: list[int], wanted: set[int]) -> int | None:
    return next((index for index in range(len(ids) - 1, -1, -1) if ids[index] in wanted), None)


def has_generation_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template adds anything to the row's prompt when asked for a generation prompt."""
    options = {"tools": from_json(row.get("tools")), **(from_json(row.get("chat_template_kwargs")) or {})}
    prompt = for_template(row["prompt"])
    without, with_it = (
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=wanted, **options)
        for wanted in (False, True)
    )
    return without != with_it


def histogram_png(inspection: Inspection, max_lengths: Sequence[int]) -> bytes:
    """Two panels: the lengths of the parts, and of the longer sequence of each pair with `max_lengths` marked."""
    # the object interface: no pyplot state, no display, any thread
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    parts, whole = figure.subplots(1, 2)
    lengths = dict(inspection.lengths)
    longest = lengths.pop("longer sequence")
    # one very long row would squeeze all others into the first bar
    bins = _bins(np.concatenate(list(lengths.values())))
    for (name, values), color in zip(lengths.items(), ("tab:gray", "tab:blue", "tab:orange"), strict=True):
        parts.hist(np.minimum(values, bins[-1]), bins, histtype="step", linewidth=1.6, color=color, label=name)
    parts.set(title="prompt, chosen, rejected", xlabel=_label(bins, longest=max(v.max() for v in lengths.values())))
    parts.legend()
    bins = _bins(longest, max(max_lengths))
    whole.hist(np.minimum(longest, bins[-1]), bins, color="tab:blue", alpha=0.75)
    for length, style in zip(max_lengths, itertools.cycle(("--", "-.", ":"))):
        over = float((longest > length).mean())
        whole.axvline(length, color="tab:red", linestyle=style, label=f"max_length {length}: {over:.1%} are longer")
    whole.set(title="prompt + longer completion", xlabel=_label(bins, longest=longest.max()))
    whole.legend()
    for axes in (parts, whole):
        axes.set_ylabel("pairs")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{inspection.report['name']}: {inspection.report['rows']} pairs")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _bins(values: np.ndarray, at_least: int = 0) -> np.ndarray:
    return np.linspace(0, max(float(np.quantile(values, 0.99)), at_least * 1.05, 1.0), 41)


def _label(bins: np.ndarray, longest: int) -> str:
    return "tokens" if longest <= bins[-1] else f"tokens (the last bar holds all longer ones, up to {longest})"
