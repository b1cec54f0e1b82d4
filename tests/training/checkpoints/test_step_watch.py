"""A number that is not finite stops the run after its step, named, and the last good checkpoint stays."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastdpo.cli import main
from fastdpo.cli.train import session
from fastdpo.training.checkpoints import step_watch
from fastdpo.training.checkpoints.folders import CheckpointError, checkpoints_by_step
from fastdpo.training.checkpoints.step_watch import NotFiniteError

NAN, INF = float("nan"), float("inf")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


class BreakAt(TrainerCallback):
    """Puts a number into the model when a step begins, or when its gradients are complete."""

    def __init__(self, step: int, what: str, value: float) -> None:
        self.step, self.what, self.value = step, what, value

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step != self.step - 1:
            return
        weight = model.get_parameter(WEIGHT)
        if self.what == "loss":
            weight.data[0, 0] = self.value
        elif self.what == "gradient":
            handle = weight.register_hook(lambda gradient: self._spoilt(gradient, handle))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.what == "weight" and state.global_step == self.step - 1:
            model.get_parameter(WEIGHT).data[2, 3] = self.value

    def _spoilt(self, gradient: torch.Tensor, handle: Any) -> torch.Tensor:
        handle.remove()
        gradient = gradient.clone()
        gradient[1, 1] = self.value
        return gradient


CAUSES = {
    "loss": r"step 4: the loss is nan, so training stops",
    "gradient": rf"step 4: the gradient of {WEIGHT} is (nan|inf), so training stops",
    "weight": rf"step 4: the weight {WEIGHT} is (nan|inf), so training stops",
}


@pytest.mark.parametrize("norm", [1.0, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("what", CAUSES)
def test_the_run_stops_after_the_step_and_says_where_it_began(
    make_trainer: Any, tmp_path: Path, what: str, value: float, norm: float
) -> None:
    options = {"max_steps": 5, "save_steps": 1, "save_total_limit": 1, "max_grad_norm": norm, "logging_steps": 100}
    trainer = make_trainer(tmp_path, callbacks=[BreakAt(4, what, value)], **options)
    with pytest.raises(NotFiniteError, match=CAUSES[what]) as error:
        trainer.train()
    assert trainer.state.global_step == 4
    assert f"go on from {tmp_path / 'checkpoint-3'} with a learning_rate below 0.01" in str(error.value)
    # the last good checkpoint is not rotated away, and nothing of the broken weights is written
    assert [step for step, _ in checkpoints_by_step(tmp_path)] == [3]
    assert all(bool(torch.isfinite(t).all()) for t in load_file(tmp_path / "checkpoint-3/model.safetensors").values())
    assert not (tmp_path / "model.safetensors").is_file()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


def test_it_is_found_in_any_micro_batch_and_without_a_checkpoint(make_trainer: Any, tmp_path: Path) -> None:
    class SecondBatch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.get_parameter(WEIGHT).data[0, 0] = NAN

    trainer = make_trainer(tmp_path, callbacks=[SecondBatch()], gradient_accumulation_steps=2, save_strategy="no")
    with pytest.raises(NotFiniteError, match=r"step 1: the loss is nan.*start again \(there is no checkpoint yet\)"):
        trainer.train()


def test_adapters_are_watched(make_trainer: Any, tmp_path: Path) -> None:
    class Break(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)
            parameter.data[0, 0] = INF

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(NotFiniteError, match=r"step 1: the weight .*layers\.0\.self_attn\.q_proj\.lora_B.* is inf"):
        make_trainer(tmp_path, peft_config=lora, callbacks=[Break()]).train()


def test_on_nan_continue_goes_on_and_says_so_once(
    make_trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, callbacks=[BreakAt(2, "loss", NAN)], on_nan="continue", save_steps=1)
    trainer.train()
    assert trainer.state.global_step == 4
    said = [line for line in caplog.messages if "on_nan is 'continue'" in line]
    assert said == ["step 2: the loss is nan, and training goes on (on_nan is 'continue')."]


def test_the_command_exits_with_1(
    train_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = session.DPOTrainer
    broken = [BreakAt(3, "gradient", NAN)]
    monkeypatch.setattr(session, "DPOTrainer", lambda *args, **options: made(*args, **options, callbacks=broken))
    assert main([*train_command, "--save_steps=1", "--save_total_limit=1"]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"fastdpo train: failed: step 3: the gradient of {WEIGHT} is nan, so training stops; go on from"
    )
    assert [step for step, _ in checkpoints_by_step(tmp_path / "out")] == [2]
    broken.clear()
    assert main([*train_command, "--resume_from_checkpoint"]) == 0


@pytest.mark.parametrize("early", ["logging_steps", "save_steps"])
def test_on_a_gpu_the_answer_is_read_a_step_later_but_before_a_log_or_a_save(
    make_trainer: Any, tmp_path: Path, early: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_watch, "steps_behind", lambda device: 1)
    options = {"logging_steps": 100, "save_steps": 100, "max_steps": 9}
    for folder, more, stops_at in (("late", {}, 5), ("now", {early: 4}, 4)):
        trainer = make_trainer(tmp_path / folder, callbacks=[BreakAt(4, "weight", NAN)], **{**options, **more})
        with pytest.raises(NotFiniteError, match="step 4"):
            trainer.train()
        assert trainer.state.global_step == stops_at
        assert not checkpoints_by_step(tmp_path / folder)


def test_what_led_to_it_is_in_the_metric_files(make_trainer: Any, tmp_path: Path) -> None:
    """The window that ends with the number, though it would have been logged later."""
    trainer = make_trainer(tmp_path, callbacks=[BreakAt(3, "loss", NAN)], logging_steps=10, max_steps=9)
    with pytest.raises(NotFiniteError):
        trainer.train()
    (row,) = csv.DictReader((tmp_path / "dpo_metrics" / "training_metrics.csv").read_text().splitlines())
    assert (row["step"], row["loss"]) == ("3", "nan")
    assert json.loads((tmp_path / "dpo_metrics" / "summary.json").read_text())["steps"] == 3


def test_any_error_leaves_what_was_logged_and_one_before_training_leaves_the_files_alone(
    make_trainer: Any, id_pairs: Any, tmp_path: Path
) -> None:
    class Fail(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[Fail()], save_steps=2).train()
    table = (tmp_path / "dpo_metrics" / "training_metrics.csv").read_text()
    assert [row["step"] for row in csv.DictReader(table.splitlines())] == ["1", "2", "3"]
    with pytest.raises(CheckpointError, match="other rows"):
        make_trainer(tmp_path, data=id_pairs(9, seed=5)).train(resume_from_checkpoint=True)
    assert (tmp_path / "dpo_metrics" / "training_metrics.csv").read_text() == table
