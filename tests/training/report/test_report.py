"""The metric files of a run: what they hold, no double line after a resume, no harm from a failed write."""

import csv
import io
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from fastdpo import files
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.files import plain_json
from fastdpo.losses import LossOptions
from fastdpo.training.report import metric_files as report_module
from fastdpo.training.report.metric_files import MetricsReport, curves_png, metric_rows, metrics_csv, summarize


def record(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"loss": loss, "rewards/margins": 1.0 - loss, "epoch": step / 10, "step": step, **more}


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "dpo_metrics"


def test_one_line_per_step_with_training_and_evaluation_merged():
    log = [
        record(10, 0.69),
        {"eval_loss": 0.68, "eval_runtime": 1.5, "epoch": 1.0, "step": 10},
        record(20, 0.5, **{"rewards/chosen": 0.25}),
        {"train_runtime": 7.0, "train_loss": 0.6, "epoch": 2.0, "step": 20},
    ]
    text = metrics_csv(log)
    assert text.splitlines() == [
        "step,epoch,loss,rewards/chosen,rewards/margins,eval_loss,eval_runtime",
        f"10,1.0,0.69,,{1.0 - 0.69},0.68,1.5",
        "20,2.0,0.5,0.25,0.5,,",
    ]


def test_the_order_of_columns_is_that_of_an_undisturbed_run():
    log = [record(1, 0.7, num_tokens=8, entropy=1.5, eval_loss=0.6, grad_norm=2.0)]
    through_a_checkpoint = [dict(sorted(log[0].items()))]
    assert metrics_csv(through_a_checkpoint) == metrics_csv(log)
    assert metrics_csv(log).splitlines()[0] == "step,epoch,loss,rewards/margins,entropy,grad_norm,num_tokens,eval_loss"


def test_a_finished_run_that_is_resumed_keeps_its_run_time(args: TrainingArguments, metrics: Path):
    control, run = TrainerControl(), {"train_runtime": 7.0, "train_loss": 0.6, "step": 2}
    state = TrainerState(log_history=[record(2, 0.5), run], global_step=2)
    MetricsReport().write(args, state)
    for first_step, runtime in ((2, 7.0), (1, 0.001)):
        again = MetricsReport()
        resumed = TrainerState(log_history=[record(1, 0.6)], global_step=first_step)
        again.on_train_begin(args, resumed, control)
        resumed.global_step = 2
        resumed.log_history += [record(2, 0.5), {"train_runtime": 0.001, "step": 2}]
        again.on_train_end(args, resumed, control)
        assert json.loads((metrics / "summary.json").read_text())["runtime"]["train_runtime"] == runtime


def test_a_record_of_a_step_that_is_logged_again_replaces_the_first():
    assert metric_rows([record(1, 0.7), record(2, 0.6), record(2, 0.5)]) == [record(1, 0.7), record(2, 0.5)]


def test_resume_cuts_the_lines_after_the_checkpoint(args: TrainingArguments, metrics: Path):
    state, control = TrainerState(), TrainerControl()
    killed = MetricsReport()
    killed.on_train_begin(args, state, control)
    state.log_history = [record(step, 0.7 - step / 100) for step in (1, 2, 3, 4)]
    killed.on_save(args, state, control)
    assert [row["step"] for row in read_csv(metrics / "training_metrics.csv")] == ["1", "2", "3", "4"]

    # the checkpoint was taken at step 2: its history is what resume starts from
    resumed = TrainerState(log_history=[record(step, 0.7 - step / 100) for step in (1, 2)])
    again = MetricsReport()
    again.on_train_begin(args, resumed, control)
    assert [row["step"] for row in read_csv(metrics / "training_metrics.csv")] == ["1", "2"]
    for step in (3, 4, 5):
        resumed.log_history.append(record(step, 0.7 - step / 100))
        again.on_log(args, resumed, control)
    again.on_train_end(args, resumed, control)
    rows = read_csv(metrics / "training_metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [float(row["loss"]) for row in rows] == [0.7 - step / 100 for step in (1, 2, 3, 4, 5)]
    assert json.loads((metrics / "log_history.json").read_text()) == resumed.log_history


def test_the_files_follow_a_run_and_only_the_first_process_writes(args: TrainingArguments, metrics: Path):
    control = TrainerControl()
    MetricsReport().on_train_end(args, TrainerState(is_world_process_zero=False), control)
    assert not metrics.exists()
    report, state = MetricsReport(), TrainerState(log_history=[record(1, 0.7)])
    report.on_log(args, state, control)
    report.on_evaluate(args, state, control)
    assert not metrics.exists(), "an evaluation alone is no run"
    report.on_train_begin(args, state, control)
    assert [path.name for path in metrics.iterdir()] == ["training_metrics.csv"], "a log writes the CSV only"
    report.on_evaluate(args, state, control)
    names = ["log_history.json", "summary.json", "training_curves.png", "training_metrics.csv"]
    assert sorted(path.name for path in metrics.iterdir()) == names
    assert sorted(json.loads((metrics / "summary.json").read_text())["files"]) == names


def test_the_picture_is_drawn_once_where_nothing_changes_and_seldom_while_it_runs(
    args: TrainingArguments, metrics: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[int] = []
    monkeypatch.setattr(report_module, "curves_png", lambda log: drawn.append(len(metric_rows(log))) or b"png")
    control, report = TrainerControl(), MetricsReport()
    state = TrainerState(log_history=[record(1, 0.7)])
    report.on_train_begin(args, state, control)
    report.on_save(args, state, control)
    state.log_history.append(record(2, 0.6))
    report.on_evaluate(args, state, control)
    assert drawn == [1], "a running picture is seconds old at most"
    state.log_history.append({"train_runtime": 1.0, "step": 2})
    report.on_train_end(args, state, control)
    report.write(args, state)
    assert drawn == [1, 2]
    assert (metrics / "training_curves.png").read_bytes() == b"png"
    state.log_history.append({"eval_loss": 0.5, "step": 2})
    report.write(args, state)
    assert drawn == [1, 2, 2], "an evaluation after training is in it"


def test_settings_tell_apart_runs_with_other_losses_or_data_rules():
    options = {"simpo_gamma": 1.0, "pref_ftx": 0.1, "aggregate": "mean", "on_overlong": "drop", "scored_turns": "all"}
    args = DPOConfig(output_dir="unused", use_cpu=True, loss_type="simpo", max_prompt_length=64, **options)
    settings = summarize(TrainerState(), args, {})["settings"]
    assert {name: settings[name] for name in options} == options
    assert settings["max_prompt_length"] == 64
    assert {option.name for option in fields(LossOptions)} <= settings.keys()


def test_summary_names_first_last_and_best(args: TrainingArguments):
    log = [record(1, 0.7), record(2, 0.4), record(3, 0.5, num_tokens=640.0), {"train_runtime": 2.5, "step": 3}]
    state = TrainerState(log_history=log, global_step=3)
    summary = summarize(state, args, {"reference": "a frozen copy", "data": {"pairs": 8}})
    assert summary["steps"] == 3
    assert (summary["first"]["loss"], summary["last"]["loss"]) == (0.7, 0.5)
    assert summary["best"]["loss"] == {"step": 2, "value": 0.4}
    assert summary["best"]["rewards/margins"] == {"step": 2, "value": 0.6}
    assert summary["tokens"] == 640.0
    assert summary["runtime"] == {"train_runtime": 2.5}
    assert summary["settings"]["learning_rate"] == args.learning_rate
    assert summary["reference"] == "a frozen copy"
    assert {"python", "fastdpo", "torch", "transformers"} <= summary["versions"].keys()


def test_json_is_strict_where_training_diverged(args: TrainingArguments, metrics: Path):
    state = TrainerState(log_history=[record(1, float("nan")), record(2, float("inf"))])
    MetricsReport().write(args, state)

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    log = json.loads((metrics / "log_history.json").read_text(), parse_constant=refuse)
    assert [row["loss"] for row in log] == [None, None]
    assert [row["loss"] for row in read_csv(metrics / "training_metrics.csv")] == ["nan", "inf"]
    assert plain_json({"a": (1, Path("x"))}) == {"a": [1, "x"]}


@pytest.mark.parametrize("log", [[], [record(1, 0.7)], [record(1, 0.7), {"eval_loss": 0.6, "step": 1}]])
def test_curves_are_drawn_for_any_length(log: list[dict[str, Any]]):
    png = curves_png(log)
    assert png.startswith(b"\x89PNG\r\n")
    assert len(png) > 5000


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "training_metrics.csv"
    files.write_atomic(path, "step\n1\n")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="No space left"):
                files.write_atomic(path, "step\n1\n2\n")
        assert path.read_text() == "step\n1\n"
        assert [p.name for p in tmp_path.iterdir()] == [path.name], "the temporary file is gone"
    files.write_atomic(path, b"step\n1\n2\n")
    assert path.read_text() == "step\n1\n2\n"
