"""What a run shows: progress lines on stderr, the result on stdout."""

import json
import math
import shlex
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from fastdpo.cli.terminal import say
from fastdpo.cli.train.fields import FIELDS
from fastdpo.training.report.metric_files import FILES as METRIC_FILES
from fastdpo.training.report.metric_files import FOLDER, metric_rows

# name in the log -> (label, format)
_LINE = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:+.4f}"),
    "rewards/accuracies": ("accuracy", "{:.2f}"),
    "kl": ("KL", "{:.3g}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "learning_rate": ("lr", "{:.2g}"),
}


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


def result_text(state: Any, output_dir: str, data: str, saved: str, with_metric_files: bool = True) -> str:
    """The few lines that end a run: what changed, and where the files are.

    state: the trainer's. data: what was trained on (`200 pairs`).
    """
    rows = metric_rows(state.log_history)
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    run = next((record for record in reversed(state.log_history) if "train_runtime" in record), {})
    lines = [f"trained to step {state.global_step} on {data} in {run.get('train_runtime', math.nan):.0f} s"]
    for what, prefix, rows in (("train", "", train), ("held out", "eval_", evals)):
        if rows:
            first, last = rows[0], rows[-1]
            when = f"step {last['step']}" if first is last else f"step {first['step']} -> {last['step']}"
            shown = {name: form for name, form in _CHANGES.items() if prefix + name in first or prefix + name in last}
            changes = (_change(first, last, prefix + name, *form) for name, form in shown.items())
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
