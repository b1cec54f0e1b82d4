"""Advice on logged numbers: each rule fires once on its picture of a run, and on no healthy one."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.report.advice import RULES, Advisor
from fastdpo.training.report.metric_files import MetricsReport

NAN = math.nan


def config(**options: Any) -> DPOConfig:
    return DPOConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none", **options})


def loss_of(margin: float) -> float:
    """The sigmoid loss of a margin."""
    return math.log1p(math.exp(-margin)) if margin > -30 else -margin


def healthy(index: int) -> dict[str, float]:
    """The log after 10 * (index + 1) steps: chosen rises a little and falls a little, rejected falls."""
    margin = 0.08 * (index + 1)
    return {
        "step": 10 * (index + 1),
        "epoch": 0.1 * (index + 1),
        "loss": loss_of(margin),
        "rewards/margins": margin,
        "rewards/chosen": 0.1 - 0.02 * index,
        "rewards/rejected": 0.1 - 0.02 * index - margin,
        "rewards/accuracies": min(0.55 + 0.02 * index, 0.9),
        "logps/chosen": -250.0 - index,
        "logps/rejected": -270.0 - 2 * index,
        "length/chosen": 180.0,
        "length/rejected": 150.0,
        "entropy": 1.2 - 0.01 * index,
        "grad_norm": 3.0,
        "learning_rate": 1e-6,
    }


def log(steps: int, change: Callable[[int], dict[str, float]] = lambda index: {}) -> list[dict[str, float]]:
    return [{**healthy(index), **change(index)} for index in range(steps)]


def play(records: list[dict[str, float]], **options: Any) -> list[dict[str, Any]]:
    """The advice of a run that logs `records`."""
    args = config(**options)
    advisor, state, control = Advisor(args), TrainerState(), TrainerControl()
    advisor.on_train_begin(args, state, control)
    for record in records:
        state.log_history.append(record)
        advisor.on_log(args, state, control)
    return advisor.given


STUCK = {"loss": 0.6930, "rewards/margins": 0.0003, "rewards/chosen": 0.0002}
STILL = {"loss": math.log(2), "rewards/margins": 0.0, "rewards/chosen": 0.0}
SAME = {"logps/chosen": -90.0, "logps/rejected": -90.0, "length/chosen": 50.0, "length/rejected": 50.0}


def from_third(**values: float) -> Callable[[int], dict[str, float]]:
    return lambda index: values if index >= 2 else {}


def falling(index: int) -> dict[str, float]:
    return {"rewards/chosen": -0.15 * index, "rewards/margins": 0.05 * index, "loss": loss_of(0.05 * index)}


CASES: list[tuple[str, Any, dict[str, Any], int, str]] = [
    ("not_finite", from_third(loss=NAN, grad_norm=NAN), {}, 30, "updates were too large (grad norm 3 before)"),
    ("not_finite", lambda index: {"loss": NAN}, {}, 10, "not finite from the start"),
    ("not_finite", from_third(**{"rewards/margins": math.inf}), {"fp16": True}, 30, "bf16=True"),
    ("gradient_not_finite", from_third(grad_norm=math.inf), {}, 30, "the gradient norm is inf"),
    ("gradient_not_finite", from_third(grad_norm=NAN), {"fp16": True}, 50, "fp16 overflows in the backward"),
    ("no_gradient", from_third(grad_norm=0.0), {}, 40, "target_modules"),
    ("no_gradient", lambda index: {"grad_norm": 0.0, **STILL, **SAME}, {}, 20, "answers are the same"),
    ("no_gradient", from_third(grad_norm=0.0), {"loss_type": "hinge"}, 40, "past hinge's margin"),
    ("stuck", lambda index: STUCK, {}, 50, "learning_rate (now 1e-06) is too small"),
    ("stuck", lambda index: STUCK, {"loss_type": "robust", "label_smoothing": 0.1}, 50, "too small"),
    ("stuck", lambda index: {**STUCK, "learning_rate": 0.0}, {}, 50, "the learning rate is 0"),
    ("stuck", lambda index: STILL, {}, 50, "the weights do not change"),
    ("stuck", lambda index: {**STILL, **SAME}, {}, 50, "answers are the same"),
    ("chosen_falls", falling, {}, 100, "rpo_alpha=1.0, lower learning_rate (now 1e-06), loss_type apo_zero"),
    ("too_easy", lambda index: {"rewards/accuracies": min(index, 1)}, {}, 50, "from the first 320 pairs on"),
    (
        "too_easy",
        lambda index: {"rewards/accuracies": 1.0, "length/rejected": 1.0},
        {"ld_alpha": 0.5},
        50,
        "length tells them apart (chosen 180 tokens, rejected 1)",
    ),
    ("margins_explode", lambda index: {"rewards/margins": 4.0 * index}, {}, 80, "280 nats from the reference"),
    ("entropy_collapses", from_third(entropy=0.05), {}, 50, "fell from 1.2 to 0.05 nats"),
    ("length_bias", lambda index: {"length/rejected": 80.0}, {}, 50, "the chosen answers are 2.2 times as long"),
]


@pytest.mark.parametrize(("rule", "change", "options", "step", "said"), CASES)
def test_a_run_out_of_its_range_gets_one_line(
    rule: str, change: Any, options: dict[str, Any], step: int, said: str
) -> None:
    # twice as long as it takes: nothing is said again
    given = play(log(20, change), **options)
    assert [advice["rule"] for advice in given] == [rule]
    assert given[0]["step"] == step
    assert said in given[0]["text"], given[0]["text"]
    assert "likely cause" in given[0]["text"]
    assert "fix: " in given[0]["text"]
    assert not given[0]["text"].endswith(".")
    assert given[0]["text"].count("\n") == 0


def test_every_rule_has_a_run() -> None:
    assert {row[0] for row in CASES} == set(RULES)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda index: {}, {}),
        # a number that means something else for this loss, or is wanted
        (lambda index: STUCK, {"loss_type": "hinge"}),
        (lambda index: STUCK, {"loss_type": ["sigmoid", "sft"]}),
        (lambda index: STUCK, {"sync_ref_model": True}),
        (falling, {"loss_type": "apo_down"}),
        (falling, {"loss_type": "simpo"}),
        (falling, {"reference_free": True}),
        (lambda index: {"rewards/margins": 4.0 * index}, {"loss_type": "ipo"}),
        (lambda index: {"length/rejected": 80.0}, {"loss_type": "sigmoid_norm"}),
        (lambda index: {"length/rejected": 80.0}, {"ld_alpha": 0.5}),
        (lambda index: {"length/rejected": 80.0}, {"aggregate": "mean"}),
        # warming up; a slow start that moves
        (lambda index: {**STUCK, "learning_rate": 1e-8 * index}, {}),
        (lambda index: {"rewards/margins": 0.002 * (index + 1), "loss": loss_of(0.002 * (index + 1))}, {}),
        # chosen falls, and rejected by far more: what DPO does in most runs
        (lambda index: {"rewards/chosen": -0.1 * index, "rewards/margins": 0.15 * index}, {}),
        # accuracy is reached, not there at once; or after an epoch; or too few pairs to tell
        (lambda index: {"rewards/accuracies": 1.0 if index > 3 else 0.7}, {}),
        (lambda index: {"rewards/accuracies": 1.0, "epoch": index + 1.0}, {}),
        (lambda index: {"rewards/accuracies": 1.0, "step": index + 1}, {"per_device_train_batch_size": 2}),
        # fp16 finds its loss scale; the loss is done with, and so is its gradient
        (lambda index: {"grad_norm": math.inf if index < 2 else 2.0}, {"fp16": True}),
        (lambda index: {"grad_norm": 0.0 if index > 10 else 1.0, "loss": 0.0 if index > 10 else 0.5}, {}),
    ],
)
def test_other_runs_get_none(change: Any, options: dict[str, Any]) -> None:
    assert play(log(20, change), **options) == []


def test_a_log_without_the_further_metrics_is_understood() -> None:
    names = ("step", "loss", "rewards/margins", "rewards/chosen", "rewards/accuracies")
    records = [{name: record[name] for name in names} for record in log(12)]
    assert play(records) == []


def test_a_resumed_run_says_nothing_twice(caplog: pytest.LogCaptureFixture) -> None:
    args = config()
    records: list[dict[str, Any]] = [*log(8, lambda index: STUCK)]
    records.insert(6, {"eval_loss": 0.69, "step": 60})
    whole = play(records)
    assert [message for message in caplog.messages if message.startswith("advice (step 50): the loss stays at ln 2")]
    caplog.clear()
    resumed, control = Advisor(args), TrainerControl()
    held = resumed.given
    state = TrainerState(log_history=records[:7])
    resumed.on_train_begin(args, state, control)
    for record in records[7:]:
        state.log_history.append(record)
        resumed.on_log(args, state, control)
    assert held == whole
    assert "advice" not in caplog.text


def test_only_the_first_process_speaks(caplog: pytest.LogCaptureFixture) -> None:
    args, control = config(), TrainerControl()
    advisor, state = Advisor(args), TrainerState(is_world_process_zero=False)
    state.log_history.append({**healthy(0), "loss": NAN})
    with caplog.at_level(logging.INFO):
        advisor.on_log(args, state, control)
    assert len(advisor.given) == 1
    assert "advice" not in caplog.text


def test_advice_reaches_the_summary(tmp_path: Path) -> None:
    args = config(output_dir=str(tmp_path))
    advisor, state, control = Advisor(args), TrainerState(), TrainerControl()
    report = MetricsReport({"advice": advisor.given})
    for callback in (advisor, report):
        callback.on_train_begin(args, state, control)
    for record in log(6, lambda index: STUCK):
        state.log_history.append(record)
        advisor.on_log(args, state, control)
    report.on_train_end(args, state, control)
    summary = json.loads((tmp_path / "dpo_metrics" / "summary.json").read_text())
    assert [advice["rule"] for advice in summary["advice"]] == ["stuck"]
