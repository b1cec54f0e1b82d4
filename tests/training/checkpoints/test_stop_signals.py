"""A run that is asked to end finishes its step, writes a checkpoint and says how to go on."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import TrainerCallback

from fastdpo.cli import main
from fastdpo.training.checkpoints.folders import checkpoints_by_step, incomplete_reason
from fastdpo.training.checkpoints.stop_signals import Preempted
from tiny_runs import ENVIRONMENT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these are Unix signals")


@pytest.fixture(autouse=True)
def signals_as_python_starts_with() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, and would stay so."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Signal(TrainerCallback):
    """Sends a signal to the process in the middle of a step, of an evaluation, or of a second one."""

    def __init__(self, number: int, step: int, where: str = "on_substep_end") -> None:
        self.number, self.step = number, step
        setattr(self, where, self._send)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), self.number)


def losses(trainer: Any) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]


OPTIONS: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_steps": 100, "logging_steps": 2}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_step_is_finished_and_the_run_goes_on_as_if_nothing_had_been(
    make_trainer: Any, tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_trainer(tmp_path / "whole", **OPTIONS)
    whole.train()
    before = signal.getsignal(number)
    # two steps are done and the third has begun
    trainer = make_trainer(tmp_path / "ended", callbacks=[Signal(number, 2)], **OPTIONS)
    with pytest.raises(Preempted) as end:
        trainer.train()
    assert end.value.code == 143
    assert signal.getsignal(number) is before
    assert [step for step, _ in checkpoints_by_step(tmp_path / "ended")] == [3]
    assert incomplete_reason(tmp_path / "ended" / "checkpoint-3") is None
    assert not (tmp_path / "ended" / "model.safetensors").is_file()
    name = signal.Signals(number).name
    assert any(line.startswith(f"{name}: a checkpoint is written at the end of this step") for line in caplog.messages)
    assert any(f"{tmp_path / 'ended' / 'checkpoint-3'} is written: resume_from" in line for line in caplog.messages)
    resumed = make_trainer(tmp_path / "ended", **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4},
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"},
        {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "best",
            "metric_for_best_model": "loss",
            "load_best_model_at_end": True,
        },
    ],
    ids=["steps", "no", "best"],
)
def test_an_evaluation_is_left_in_the_middle(
    make_trainer: Any, id_pairs: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    sends = Signal(signal.SIGTERM, 2, "on_prediction_step")
    trainer = make_trainer(tmp_path, eval_data=id_pairs(9, seed=2), callbacks=[sends], **options)
    with pytest.raises(Preempted):
        trainer.train()
    assert [step for step, _ in checkpoints_by_step(tmp_path)] == [2]
    assert incomplete_reason(tmp_path / "checkpoint-2") is None


def test_a_signal_that_comes_twice_at_once_is_one(make_trainer: Any, tmp_path: Path) -> None:
    """A scheduler signals a process and its parents, which pass it on; a shell sends SIGHUP again."""
    both = [Signal(signal.SIGTERM, 1, "on_step_begin"), Signal(signal.SIGHUP, 1, "on_step_begin")]
    with pytest.raises(Preempted):
        make_trainer(tmp_path, callbacks=[*both, Signal(signal.SIGTERM, 1, "on_step_begin")]).train()
    assert [step for step, _ in checkpoints_by_step(tmp_path)] == [2]


@pytest.mark.parametrize("planned", [{}, {"max_tokens_per_batch": 64}], ids=["pairs", "tokens"])
def test_a_signal_to_the_whole_group_leaves_the_data_loaders(
    make_trainer: Any, id_pairs: Any, tmp_path: Path, planned: dict[str, Any]
) -> None:
    class ToAll(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                children = psutil.Process().children()
                assert children
                for child in children:
                    child.send_signal(signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"dataloader_num_workers": 2, "save_strategy": "no", "max_steps": 30, **planned}
    trainer = make_trainer(tmp_path, data=id_pairs(60), callbacks=[ToAll()], **options)
    with pytest.raises(Preempted):
        trainer.train()
    assert [step for step, _ in checkpoints_by_step(tmp_path)] == [2]


def test_workers_that_are_left_end_with_the_process(tmp_path: Path) -> None:
    """Persistent workers live on after training; Python ends them by SIGTERM at its exit, and waits for them."""
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "import psutil\n"
        "import tiny_runs\n"
        f"trainer = tiny_runs.make(Path({str(tmp_path)!r}), dataloader_num_workers=2, "
        "dataloader_persistent_workers=True, dataloader_pin_memory=False, max_tokens_per_batch=64)\n"
        "kept = trainer.get_train_dataloader()\n"
        "trainer.get_train_dataloader = lambda: kept\n"
        "trainer.train()\n"
        "assert len(psutil.Process().children()) == 2\n"
    )
    subprocess.run([sys.executable, str(script)], env=ENVIRONMENT, check=True, timeout=120)


@pytest.mark.parametrize("options", [{"save_only_model": True}, {"save_strategy": "no"}])
def test_the_checkpoint_of_an_ended_run_can_be_resumed(make_trainer: Any, tmp_path: Path, options: Any) -> None:
    with pytest.raises(Preempted):
        make_trainer(tmp_path, callbacks=[Signal(signal.SIGTERM, 1, "on_step_begin")], **options).train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in losses(resumed)] == [1, 2, 3, 4]


def test_an_evaluation_before_the_first_step_is_left_too(
    make_trainer: Any, id_pairs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sends = Signal(signal.SIGTERM, 0, "on_prediction_step")
    trainer = make_trainer(tmp_path, eval_data=id_pairs(9, seed=2), callbacks=[sends], eval_on_start=True)
    with pytest.raises(Preempted):
        trainer.train()
    assert not checkpoints_by_step(tmp_path)
    assert any("before the first step, so there is no checkpoint" in line for line in caplog.messages)


def test_a_signal_that_somebody_else_handles_or_ignores_stays_theirs(make_trainer: Any, tmp_path: Path) -> None:
    seen: list[int] = []
    found = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        callbacks = [Signal(signal.SIGTERM, 1, "on_step_begin"), Signal(signal.SIGHUP, 2, "on_step_begin")]
        trainer = make_trainer(tmp_path, callbacks=callbacks, save_strategy="no")
        trainer.train()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), found, strict=True):
            signal.signal(number, handler)
    assert seen == [signal.SIGTERM]
    assert trainer.state.global_step == 4


def test_training_in_a_thread_works_without_them(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="no")
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


def test_the_command_exits_with_143(
    train_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sends_at(monkeypatch, Signal(signal.SIGTERM, 1, "on_step_begin"))
    assert main(train_command) == 143
    error = capfd.readouterr().err
    assert f"{tmp_path / 'out' / 'checkpoint-2'} is written: resume_from_checkpoint goes on from it." in error
    assert "Traceback" not in error
    assert main([*train_command, "--resume_from_checkpoint"]) == 0


def test_ctrl_c_says_which_checkpoint_there_is_or_that_there_is_none(
    train_command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for more, wanted in (
        ([], f"there is no checkpoint in {tmp_path / 'out'} yet, so the same command starts from the beginning"),
        (["--save_steps=1"], f"--resume_from_checkpoint goes on from {tmp_path / 'out' / 'checkpoint-2'}"),
    ):
        with monkeypatch.context() as patch:
            sends_at(patch, Interrupt())
            assert main([*train_command, *more]) == 130
        assert f"fastdpo train: interrupted; {wanted}" in capfd.readouterr().err


class Interrupt(TrainerCallback):
    """What Ctrl-C raises: a test's process may ignore the signal."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def sends_at(patch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    from fastdpo.cli.train import session

    made = session.DPOTrainer
    patch.setattr(session, "DPOTrainer", lambda *args, **options: made(*args, **options, callbacks=[callback]))


TWO_PROCESSES = """
import os, signal, sys
import torch
from transformers import TrainerCallback
from fastdpo.cli import main
from fastdpo.cli.train import session

torch.set_num_threads(1)


class Act(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1 and os.environ["RANK"] == "1":
            if sys.argv[1] == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                next(iter(model.parameters())).data.fill_(float("nan"))


made = session.DPOTrainer
session.DPOTrainer = lambda *args, **options: made(*args, **options, callbacks=[Act()])
code = main(sys.argv[2:])
sys.stderr.flush()
os._exit(code)  # all is written; threads of gloo sometimes abort a process that ends by the book
"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "code"), [("signal", 143), ("nan", 1)])
def test_two_processes_end_at_the_same_step(train_command: list[str], tmp_path: Path, what: str, code: int) -> None:
    """Though only one of them was told, or met the number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [*train_command, "--use_cpu", "--save_steps=1", "--ddp_find_unused_parameters=False"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, what, *command],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], "\n".join(errors)
    steps = [step for step, _ in checkpoints_by_step(tmp_path / "out")]
    assert steps == ([1, 2] if what == "signal" else [1])
    assert all(incomplete_reason(path) is None for _, path in checkpoints_by_step(tmp_path / "out"))
    if what == "nan":
        assert "step 2: " in errors[0]
