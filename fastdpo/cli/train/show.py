"""What a run shows: progress lines and one example pair on stderr, the result on stdout."""

import contextlib
import json
import math
import shlex
import sys
from dataclasses import replace
from typing import Any

import datasets
import torch
import transformers
from transformers import ProgressCallback, TrainerCallback

from fastdpo.cli.train.fields import FIELDS
from fastdpo.escaping import visible
from fastdpo.training.report.metric_files import FILES as METRIC_FILES
from fastdpo.training.report.metric_files import FOLDER, metric_rows

# name in the log -> (label, format)
_LINE = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:+.4f}"),
    "rewards/accuracies": ("accuracy", "{:.2f}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "learning_rate": ("lr", "{:.2g}"),
}


def say(text: str) -> None:
    """One line of the log: stderr, without breaking a progress bar."""
    from tqdm.auto import tqdm

    with contextlib.suppress(OSError):  # a terminal that was closed ends no run
        tqdm.write(visible(text), file=sys.stderr)


def no_bars_without_terminal() -> bool:
    """Progress bars are noise in a log file: switch the libraries' off where stderr is no terminal; True if so."""
    if sys.stderr.isatty():
        return False
    hide_bars()
    return True


def hide_bars() -> None:
    """Switch the libraries' progress bars off."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


class ProgressBar(ProgressCallback):
    """Hugging Face's bar without its dict of metrics, which LogLines says in words."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        return


class LogLines(TrainerCallback):
    """`step 10/57  loss 0.6712  margin +0.0312  accuracy 0.62  ...`, training and evaluation alike."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        for prefix, what in (("", "step"), ("eval_", "eval at step")):
            if f"{prefix}loss" in logs:
                parts = [
                    f"{label} {form.format(logs[prefix + name])}"
                    for name, (label, form) in _LINE.items()
                    if isinstance(logs.get(prefix + name), (int, float))
                ]
                say(f"{what} {state.global_step}/{state.max_steps}  " + "  ".join(parts))


def example_pair(tokenizer: Any, collator: Any, example: dict[str, Any], limit: int = 400) -> str:
    """The example as it is trained on: decoded after truncation, the scored tokens between >>> and <<<."""
    batch = replace(collator, layout="padded")([example])
    offsets = batch["offsets"].tolist()
    lines = []
    for sequence, side in enumerate(("chosen", "rejected")):
        start, end = offsets[sequence], offsets[sequence + 1]
        ids = batch["input_ids"][sequence][batch["attention_mask"][sequence].bool()]
        scored = batch["targets"][start:end]
        # a target's row is the position before it
        places = batch["rows"][start:end] + 1 - sequence * batch["input_ids"].shape[1]
        first = int(places[0]) if len(places) else len(ids)
        if sequence == 0:
            lines.append(f"  prompt    {_count(ids[:first])}: {_shorten(tokenizer.decode(ids[:first]), limit)}")
        lines.append(f"  {side:<9} {_count(scored)} scored: {_marked(tokenizer, ids, places, limit)}")
    return "\n".join(lines)


def _marked(tokenizer: Any, ids: Any, places: Any, limit: int) -> str:
    """The text from the first scored token on; each run of scored tokens (scored_turns=all has several) is marked."""
    scored = torch.zeros(len(ids), dtype=torch.bool)
    scored[places] = True
    texts, begin = [], int(places[0]) if len(places) else len(ids)
    while begin < len(ids):
        run = int((scored[begin:] == scored[begin]).long().cumprod(0).sum())
        text = _shorten(tokenizer.decode(ids[begin : begin + run]), limit)
        texts.append(f">>>{text}<<<" if scored[begin] else text)
        begin += run
    return "".join(texts) or ">>><<<"


def _count(tokens: Any) -> str:
    return f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}"


def _shorten(text: str, limit: int) -> str:
    text = text.replace("\n", "\\n")
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} [... {len(text) - limit} characters ...] {text[-half:]}"


def command_text(option: dict[str, Any]) -> str:
    """The command of a run with these arguments, without defaults and secrets."""
    words = ["fastdpo", "train"]
    for field in FIELDS:
        value = option.get(field.name, field.default)
        if value == field.default or field.name.endswith("hub_token"):
            continue
        if isinstance(value, list):
            words += [f"--{field.name}", *map(_word, value)]
        else:
            words.append(f"--{field.name}={_word(value)}")
    return shlex.join(words)


def _word(value: Any) -> str:
    if isinstance(value, dict):  # arguments of from_pretrained may have one more secret
        value = {name: item for name, item in value.items() if name not in ("token", "use_auth_token")}
    if isinstance(value, (dict, bool)):
        return json.dumps(value)
    return "none" if value is None else str(value)


def result_text(state: Any, output_dir: str, pairs: int, saved: str, with_metric_files: bool = True) -> str:
    """The few lines that end a run: what changed, and where the files are. `state`: the trainer's."""
    rows = metric_rows(state.log_history)
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    run = next((record for record in reversed(state.log_history) if "train_runtime" in record), {})
    lines = [f"trained to step {state.global_step} on {pairs} pairs in {run.get('train_runtime', math.nan):.0f} s"]
    for what, prefix, found in (("train", "", train), ("held out", "eval_", evals)):
        if found:
            first, last = found[0], found[-1]
            when = f"step {last['step']}" if first is last else f"step {first['step']} -> {last['step']}"
            changes = (_change(first, last, prefix + name, *form) for name, form in _CHANGES.items())
            lines.append(f"{what}, {when}: {', '.join(changes)}")
    lines.append(f"{saved} and tokenizer: {output_dir}")
    if with_metric_files:
        lines.append(f"metrics: {output_dir}/{FOLDER} ({', '.join(METRIC_FILES)})")
    return "\n".join(lines)


_CHANGES = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("reward margin", "{:+.4f}"),
    "rewards/accuracies": ("accuracy", "{:.2f}"),
}


def _change(first: dict[str, Any], last: dict[str, Any], name: str, label: str, form: str) -> str:
    """`loss 0.6931 -> 0.5123`, or the one value there is."""
    values = [form.format(row.get(name, math.nan)) for row in ((first,) if first is last else (first, last))]
    return f"{label} {' -> '.join(values)}"
