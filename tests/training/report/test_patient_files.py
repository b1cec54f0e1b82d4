"""A disk that is full in the middle of a run costs a line, not the run; its files are written when there is room."""

import csv
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.files import write_atomic
from fastdpo.training import trainer as trainer_module
from fastdpo.training.checkpoints import folders
from fastdpo.training.checkpoints.folders import CheckpointNotWritten
from fastdpo.training.report import patient_files
from fastdpo.training.report.metric_files import FILES
from fastdpo.training.report.patient_files import PatientFiles
from fastdpo.training.trainer import DPOTrainer

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Stands for `write_atomic`; while `error` is set nothing can be written."""

    error: OSError | None = None

    def write(self, path: Path, data: str | bytes) -> None:
        if self.error is not None:
            raise self.error
        write_atomic(path, data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(patient_files, "write_atomic", made.write)
    return made


class At(TrainerCallback):
    """Does something before the log of a step."""

    def __init__(self, **at: Callable[[], None]) -> None:
        self.at = {int(name.removeprefix("step_")): action for name, action in at.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at.get(state.global_step, lambda: None)()


def make(folder: Path, **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 11)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )
    given = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 6, "logging_steps": 1, **options}
    args = DPOConfig(output_dir=str(folder), **{"save_strategy": "no", **given})
    rows = [{"prompt_ids": [3, n], "chosen_ids": [5, 0], "rejected_ids": [7, 0]} for n in range(1, 5)]
    data = Dataset.from_list(rows)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, eos_token_id=0, **SIZES))
    return DPOTrainer(model, args=args, train_dataset=data, eval_dataset=data.select([0]), processing_class=tokenizer)


def lines(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def test_what_cannot_be_written_waits(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    files, first, second = PatientFiles("notes"), tmp_path / "notes/a.txt", tmp_path / "notes/b.bin"
    files.write(first, "one")
    assert (first.read_text(), files.read(first), files.read(second)) == ("one", "one", None)
    disk.error = FULL
    for text in ("two", "three"):
        files.write(first, text)
    files.write(second, b"bytes")
    assert (first.read_text(), second.exists(), files.read(first)) == ("one", False, "three")
    assert files.lost() == "No space left on device"
    assert [record.getMessage() for record in caplog.records] == [
        f"notes cannot be written to {tmp_path}/notes: No space left on device; training goes on, and they are kept in "
        "memory and written when it is possible again."
    ]
    caplog.clear()
    disk.error = None
    assert files.lost() is None
    assert (first.read_text(), second.read_bytes()) == ("three", b"bytes")
    assert [record.getMessage() for record in caplog.records] == [
        f"notes are written to {tmp_path}/notes again, with what was kept."
    ]


def test_a_file_that_is_small_enough_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, data: str | bytes) -> None:
        if len(data) > 3:
            raise FULL
        write_atomic(path, data)

    monkeypatch.setattr(patient_files, "write_atomic", write)
    files = PatientFiles("notes")
    files.write(tmp_path / "a", "large")
    files.write(tmp_path / "b", "fit")
    assert (tmp_path / "b").read_text() == "fit"
    assert files.lost() == "No space left on device"


@pytest.mark.parametrize("error", [FULL, OSError(errno.EROFS, "Read-only file system")], ids=["full", "read-only"])
def test_a_full_disk_in_mid_run_costs_one_line(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1, generate_during_eval=True)
    trainer.add_callback(At(step_2=lambda: setattr(disk, "error", error), step_5=lambda: setattr(disk, "error", None)))
    monkeypatch.setattr(
        "fastdpo.training.report.metric_files.time.monotonic", lambda: 0.0
    )  # every evaluation writes all the same
    trainer.train()
    assert trainer.state.global_step == 6
    assert len(lines(caplog, "cannot be written")) == 1
    assert len(lines(caplog, "written to")) == 2, "once that it cannot be, once that it is"
    with open(tmp_path / "dpo_metrics/training_metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]
    assert {path.name for path in (tmp_path / "dpo_metrics").iterdir()} == {*FILES, "answers.jsonl"}
    answers = (tmp_path / "dpo_metrics/answers.jsonl").read_text().splitlines()
    assert len(answers) == 6


def test_files_that_never_get_written_are_said_at_the_end(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path)
    disk.error = FULL
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert len(lines(caplog, "No space left on device")) == 2
    assert lines(caplog, "not on disk") == [
        "the metric files of this run are not on disk (No space left on device); trainer.state.log_history and each "
        "checkpoint's trainer_state.json have its metrics."
    ]


def test_a_file_in_place_of_the_folder_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path)
    (tmp_path / "dpo_metrics").write_text("mine")
    trainer.train()
    assert len(lines(caplog, "cannot be written")) == 1
    assert (tmp_path / "dpo_metrics").read_text() == "mine"


def test_a_tracker_that_cannot_write_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make(tmp_path / "out", report_to="tensorboard")
    (board,) = [one for one in trainer.callback_handler.callbacks if type(one).__name__ == "TensorBoardCallback"]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise FULL

    def fill() -> None:
        board.tb_writer.add_scalar = board.tb_writer.close = fail  # pyright: ignore[reportOptionalMemberAccess]

    trainer.add_callback(At(step_2=fill))
    trainer.train()
    assert trainer.state.global_step == 6
    assert lines(caplog, "TensorBoard") == [
        "TensorBoardCallback cannot write: No space left on device; training goes on, and its log may end here."
    ]
    # before the first step it is no accident
    monkeypatch.setattr(type(board), "_init_summary_writer", fail)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path / "out", report_to="tensorboard").train()


def test_only_model_and_checkpoint_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise FULL

    trainer = make(tmp_path / "card", max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "write_card", fail)
        trainer.save_model()
    assert lines(caplog, "README.md") == [
        "the model is saved, and its README.md cannot be written: No space left on device."
    ]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "save_pretrained", fail)
        with pytest.raises(CheckpointNotWritten, match=r"card: No space left on device; what is there .* not whole"):
            trainer.save_model()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_atomic", fail)
        with pytest.raises(CheckpointNotWritten, match="checkpoint-1 cannot be written: No space left on device"):
            make(tmp_path / "checkpoint", save_strategy="steps", save_steps=1).train()
