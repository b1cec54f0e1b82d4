"""Metric files of a run, in <output_dir>/dpo_metrics: table, curves, summary and Trainer's log history.

Each file is a rendering of `state.log_history`, which checkpoints save and resume restores: a run that was killed and
resumed therefore leaves neither a gap nor a double line.
"""

import contextlib
import csv
import io
import json
import logging
import math
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.files import METRICS_FOLDER, plain_json
from fastdpo.json_text import read_json
from fastdpo.losses import LossOptions, UnpairedOptions
from fastdpo.training.report.metrics import LOGGED
from fastdpo.training.report.patient_files import PatientFiles
from fastdpo.versions import installed_versions

logger = logging.getLogger(__name__)

FOLDER = METRICS_FOLDER
FILES = ("training_metrics.csv", "training_curves.png", "summary.json", "log_history.json")
LEADING = (
    "step",
    "epoch",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# Trainer's record at the end of training: it belongs to the run, not to a step
RUN_RECORD = "train_runtime"
NOT_RUNTIME = LOGGED | {"step", "epoch", "total_flos"}
# a running picture is drawn again after so many seconds: it takes one, more than a step of a small model
DRAW_EVERY = 30.0
# what tells two runs apart: all that changes the weights that come out
ESSENTIALS = (
    *dict.fromkeys(option.name for kind in (LossOptions, UnpairedOptions) for option in fields(kind)),
    *("max_length", "max_prompt_length", "max_completion_length", "truncation_mode", "on_overlong", "scored_turns"),
    *("router_aux_loss_coef", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "disable_dropout"),
    *("batch_layout", "max_tokens_per_batch", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim"),
    *("num_train_epochs", "max_steps", "train_sampling_strategy", "gradient_checkpointing", "bf16", "fp16"),
    *("seed", "data_seed"),
)


def metric_rows(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dict per logged step, in step order; training and evaluation records of one step are one row.

    The run's record counts where it has the means of the steps since the last log.
    """
    rows: dict[int, dict[str, Any]] = {}
    for record in log_history:
        if RUN_RECORD in record:
            values = {name: value for name, value in record.items() if name in LOGGED or name in ("step", "epoch")}
            if not LOGGED & values.keys():
                continue
        else:
            values = record
        rows.setdefault(int(record["step"]), {}).update(values)
    return [rows[step] for step in sorted(rows)]


def metric_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """step, epoch, loss, rewards and logps first, then the others by name, eval_* last."""
    seen = {name for row in rows for name in row}
    leading = [name for name in LEADING if name in seen]
    # by name, since a history that went through a checkpoint has its keys sorted
    return leading + sorted(seen.difference(leading), key=lambda name: (name.startswith("eval_"), name))


def metrics_csv(log_history: Iterable[Mapping[str, Any]]) -> str:
    """The text of training_metrics.csv; a metric that a step did not log is an empty cell."""
    rows = metric_rows(log_history)
    text = io.StringIO()
    writer = csv.DictWriter(text, metric_columns(rows) or ["step"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summarize(state: TrainerState, args: TrainingArguments, details: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json holds: settings, data, reference, versions, first / last / best metrics, runtime, files."""
    rows = metric_rows(state.log_history)
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    run = next((record for record in reversed(state.log_history) if RUN_RECORD in record), {})
    best = {}
    for name in ("loss", "rewards/margins", "rewards/accuracies", "eval_loss", "eval_rewards/margins"):
        known = [row for row in rows if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
        if known:
            row = (min if name.endswith("loss") else max)(known, key=lambda row, name=name: row[name])
            best[name] = {"step": row["step"], "value": row[name]}
    return {
        **details,
        "settings": {name: getattr(args, name) for name in ESSENTIALS if hasattr(args, name)},
        "steps": state.global_step,
        "first": train[0] if train else None,
        "last": train[-1] if train else None,
        "first_eval": evals[0] if evals else None,
        "last_eval": evals[-1] if evals else None,
        "best": best,
        "tokens": next((row["num_tokens"] for row in reversed(rows) if "num_tokens" in row), None),
        "runtime": {name: value for name, value in run.items() if name not in NOT_RUNTIME},
        "versions": {"python": platform.python_version(), **installed_versions()},
    }


def _run_record(path: Path) -> dict[str, Any] | None:
    """Trainer's record of a whole run in a log_history.json, None where there is none that can be read."""
    try:
        history = read_json(path)
        return next((record for record in reversed(history) if RUN_RECORD in record), None)
    except (OSError, ValueError, TypeError):
        return None


_ACCURACY = "accuracy (share of pairs with margin > 0)"


def curves_png(log_history: Iterable[Mapping[str, Any]]) -> bytes:
    """Four panels as a PNG: loss, reward margin, accuracy (of KTO its KL), chosen and rejected reward.

    Dots are evaluations; the shade around the margin is from the pairs' 10% to their 90% quantile.
    """
    # the object interface: no pyplot state, no display, any thread
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = metric_rows(log_history)
    kto = any("kl" in row or "eval_kl" in row for row in rows)
    accuracy = {"KL from the reference (nats)": ("kl",)} if kto else {_ACCURACY: ("rewards/accuracies",)}
    panels = {
        "loss": ("loss",),
        "reward margin (chosen - rejected)": ("rewards/margins",),
        **accuracy,
        "rewards": ("rewards/chosen", "rewards/rejected"),
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for color, name in zip(("tab:blue", "tab:orange"), names, strict=False):
            for prefix, style in (("", "-"), ("eval_", "o")):
                points = [(row["step"], row[prefix + name]) for row in rows if prefix + name in row]
                if points:
                    # a single training point would be an invisible line
                    style = "." if style == "-" and len(points) == 1 else style
                    axes.plot(*zip(*points, strict=True), style, color=color, label=prefix + name)
            draw_band(axes, rows, name, color)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def draw_band(axes: Any, rows: Iterable[Mapping[str, Any]], name: str, color: Any) -> None:
    """Shade from the 10% to the 90% quantile of a metric, where it is logged with them."""
    low, high = f"{name}_p10", f"{name}_p90"
    band = [(row["step"], row[low], row[high]) for row in rows if low in row and high in row]
    if len(band) > 1:
        axes.fill_between(*zip(*band, strict=True), color=color, alpha=0.12, linewidth=0)


class MetricsReport(TrainerCallback):
    """Write the metric files of a run, each atomically, on world process zero, unless `args.metric_files` is off.

    details: what the summary says besides the metrics (model, data counts, reference, ...); it may be filled until the
    end of training. The CSV follows the run, at most once a second; everything is written at save, evaluation and end
    (the picture at the first of them, then at most every `DRAW_EVERY` seconds, and at the end where it is not of the
    last step already). A disk that is full in between stops nothing, see `PatientFiles`. An evaluation of a trainer
    that has not trained writes nothing: the folder may hold the files of the run that trained the model.
    """

    def __init__(self, details: Mapping[str, Any] | None = None) -> None:
        self.details: dict[str, Any] = dict(details or {})
        self.files = PatientFiles("metric files")
        self._written = self._drawn_at = -math.inf
        self._drawn: list[dict[str, Any]] | None = None
        self._trains: bool | None = None
        self._first_step = 0
        # whether training began since the trainer set it to False
        self.began = False
        self._earlier_run: dict[str, Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = True
        self._trains = True
        self._first_step, self._earlier_run = state.global_step, None
        if not _writes(args, state):
            return
        # a resumed run starts from the checkpoint's history: lines that a killed run wrote after it go
        folder = self._write_csv(args, state)
        self._earlier_run = _run_record(folder / "log_history.json")
        with contextlib.suppress(OSError):  # a disk that lets nothing be written lets nothing be removed
            for leftover in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                leftover.unlink(missing_ok=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trains and _writes(args, state) and time.monotonic() - self._written > 1.0:
            self._write_csv(args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trains is not None:
            # after training there may be no later moment to draw
            self._write(args, state, DRAW_EVERY if self._trains else 0.0)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(args, state, DRAW_EVERY)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        earlier = self._earlier_run
        if earlier and state.global_step == self._first_step == earlier.get("step"):
            # a finished run was resumed and no step was trained: its own run time is worth keeping, not this one
            state.log_history = [earlier if RUN_RECORD in record else record for record in state.log_history]
        self._trains = False
        self.write(args, state)
        reason = self.files.lost()
        if reason is not None:
            logger.warning(
                f"the metric files of this run are not on disk ({reason}); trainer.state.log_history and each "
                "checkpoint's trainer_state.json have its metrics."
            )

    def write(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write all four files."""
        self._write(args, state, 0.0)

    def _write(self, args: TrainingArguments, state: TrainerState, draw_after: float) -> None:
        if not _writes(args, state):
            return
        folder = self._write_csv(args, state)
        summary = summarize(state, args, self.details)
        summary["files"] = list(FILES)
        for name, value in (("log_history.json", state.log_history), ("summary.json", summary)):
            self.files.write(folder / name, json.dumps(plain_json(value), indent=2, ensure_ascii=False) + "\n")
        rows = metric_rows(state.log_history)
        if rows != self._drawn and time.monotonic() - self._drawn_at >= draw_after:
            self.files.write(folder / "training_curves.png", curves_png(state.log_history))
            self._drawn, self._drawn_at = rows, time.monotonic()

    def _write_csv(self, args: TrainingArguments, state: TrainerState) -> Path:
        folder = Path(args.output_dir or ".") / FOLDER
        self.files.write(folder / "training_metrics.csv", metrics_csv(state.log_history))
        self._written = time.monotonic()
        return folder


def _writes(args: TrainingArguments, state: TrainerState) -> bool:
    return state.is_world_process_zero and getattr(args, "metric_files", True)


def read_summary(path: Path) -> dict[str, Any]:
    """A run's summary.json, {} where there is none. Raises ValueError with one sentence where it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        summary = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path} should be a JSON object, got {type(summary).__name__}")
    return summary
