"""A run that is killed and resumed logs what an undisturbed one logs; half-written checkpoints are never used."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdpo.files import write_atomic
from fastdpo.training.checkpoints import folders as checkpoints
from fastdpo.training.checkpoints.content_hashes import MANIFEST
from fastdpo.training.trainer import DPOTrainer
from resumable_runs import STEPS, history, make
from tiny_runs import KillAt, Killed


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    torch.set_num_threads(1)
    folders = {peft: tmp_path_factory.mktemp(f"undisturbed-{peft}") for peft in (False, True)}
    for peft, folder in folders.items():
        make(folder, peft).train()
    return folders


@pytest.mark.parametrize("peft", [False, True])
def test_resumed_run_logs_the_same(tmp_path: Path, undisturbed: dict[bool, Path], peft: bool) -> None:
    with pytest.raises(Killed):
        make(tmp_path, peft, [KillAt(11)]).train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    trainer = make(tmp_path, peft)
    output = trainer.train(resume_from_checkpoint=True)
    wanted = history(undisturbed[peft])
    assert [line["step"] for line in wanted] == [3, 6, 9, 12]
    assert history(tmp_path) == wanted
    assert len({line["loss"] for line in wanted}) == 4
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    resumed, whole = load_file(tmp_path / name), load_file(undisturbed[peft] / name)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    if not hasattr(trainer, "_initial_global_step"):
        return  # an older transformers divides by the steps of all calls
    # the mean over this call's steps, 9 to 12: not step 7 and 8, which the restored sum holds
    assert output.training_loss == pytest.approx(mean_of_steps(tmp_path.parent / "each", peft, 9), rel=1e-5)


def mean_of_steps(folder: Path, peft: bool, first: int) -> float:
    trainer = make(folder, peft, logging_steps=1, save_strategy="no")
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line][first - 1 :]
    return sum(losses) / len(losses)


def test_without_the_saved_sums_the_first_loss_would_be_wrong(
    tmp_path: Path, undisturbed: dict[bool, Path], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed[False] / "checkpoint-8", tmp_path / "checkpoint-8")
    for name in (checkpoints.STATE_NAME, MANIFEST):  # as another trainer writes it
        (tmp_path / "checkpoint-8" / name).unlink()
    make(tmp_path).train(resume_from_checkpoint=True)
    assert any("has no fastdpo_state.json" in line for line in caplog.messages)
    ours, wanted = history(tmp_path), history(undisturbed[False])
    assert ours[2]["loss"] != wanted[2]["loss"]
    assert ours[3]["loss"] == wanted[3]["loss"]


def test_kill_while_a_checkpoint_is_written(
    tmp_path: Path,
    undisturbed: dict[bool, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def die(self: DPOTrainer, folder: str) -> None:
        if self.state.global_step == 8:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "_save_scaler", die)
        with pytest.raises(Killed):
            make(tmp_path).train()
    # weights and optimizer are there already, the rest is not
    assert names(tmp_path) == ["_incomplete-checkpoint-8", "checkpoint-4"]
    assert (tmp_path / "_incomplete-checkpoint-8" / "checkpoint-8" / "model.safetensors").is_file()
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        make(tmp_path).train(resume_from_checkpoint=True)
    assert any("removed _incomplete-checkpoint-8" in line for line in caplog.messages)
    assert any(line.endswith("checkpoint-4.") and "going on from" in line for line in caplog.messages)
    assert history(tmp_path) == history(undisturbed[False])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("trainer_state.json", "remove", "trainer_state.json is missing"),
        ("trainer_state.json", "cut", "trainer_state.json is not readable"),
        ("model.safetensors", "remove", "the weights are missing"),
        ("model.safetensors", "cut", "model.safetensors is not readable"),
        ("optimizer.pt", "remove", "optimizer.pt is missing"),
        ("optimizer.pt", "cut", "optimizer.pt is not readable"),
        ("scheduler.pt", "cut", "scheduler.pt is not readable"),
        ("rng_state.pth", "remove", "rng_state.pth is missing"),
    ],
)
def test_incomplete_checkpoint_is_passed_over_and_named(
    tmp_path: Path,
    undisturbed: dict[bool, Path],
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
    reason: str,
) -> None:
    for step in (4, 8):
        shutil.copytree(undisturbed[False] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-8" / name
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = checkpoints.resolve_resume(True, tmp_path)
    assert found == str(tmp_path / "checkpoint-4")
    assert any(f"passed over {tmp_path / 'checkpoint-8'}: {reason}" in line for line in caplog.messages)
    with pytest.raises(ValueError, match=f"cannot resume from .*checkpoint-8: {reason}"):
        checkpoints.resolve_resume(str(tmp_path / "checkpoint-8"), tmp_path)


def test_training_goes_past_an_incomplete_checkpoint(tmp_path: Path, undisturbed: dict[bool, Path]) -> None:
    for step in (4, 8):
        shutil.copytree(undisturbed[False] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    # as transformers leaves it: weights, and no state
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    make(tmp_path).train(resume_from_checkpoint=True)
    assert history(tmp_path) == history(undisturbed[False])
    assert checkpoints.incomplete_reason(tmp_path / "checkpoint-8") is None


def test_resume_without_a_checkpoint_starts_from_scratch(
    tmp_path: Path, undisturbed: dict[bool, Path], caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "new").train(resume_from_checkpoint=True)
    assert any("starting from scratch" in line for line in caplog.messages)
    assert history(tmp_path / "new") == history(undisturbed[False])


def test_a_run_that_has_no_step_left_logs_none(tmp_path: Path, undisturbed: dict[bool, Path]) -> None:
    """The sum of steps 7 and 8 is in its checkpoint, for a run that goes on."""
    shutil.copytree(undisturbed[False] / "checkpoint-8", tmp_path / "checkpoint-8")
    trainer = make(tmp_path, max_steps=8)
    trainer.train(resume_from_checkpoint=True)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [3, 6]


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path, undisturbed: dict[bool, Path]) -> None:
    shutil.copytree(undisturbed[False], tmp_path / "done")
    trainer = make(tmp_path / "done")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert history(tmp_path / "done") == history(undisturbed[False])
    weights = load_file(tmp_path / "done" / "model.safetensors")
    wanted = load_file(undisturbed[False] / "model.safetensors")
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("peft", [False, True])
def test_a_checkpoint_of_the_other_kind_is_named(tmp_path: Path, undisturbed: dict[bool, Path], peft: bool) -> None:
    shutil.copytree(undisturbed[not peft] / "checkpoint-8", tmp_path / "checkpoint-8")
    kinds = ("the whole model", "an adapter")
    wanted = f"it is a checkpoint of {kinds[not peft]} and this run trains {kinds[peft]}; go on with"
    for resume in (True, str(tmp_path / "checkpoint-8")):
        with pytest.raises(checkpoints.CheckpointError, match=wanted):
            make(tmp_path, peft).train(resume_from_checkpoint=resume)


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    make(tmp_path, save_steps=2, save_total_limit=2).train()
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12"]


def test_rotation_protects_the_best_and_goes_by_age(tmp_path: Path) -> None:
    for age, step in enumerate((90, 2, 4, 6)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (1000 + age, 1000 + age))
    checkpoints.rotate(tmp_path, 2, [tmp_path / "checkpoint-6", tmp_path / "checkpoint-2"])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    checkpoints.rotate(tmp_path, None, [])
    assert len(names(tmp_path)) == 2


def test_sharded_weights_and_adapter_folders_count_as_weights(tmp_path: Path, undisturbed: dict[bool, Path]) -> None:
    folder = tmp_path / "checkpoint-8"
    shutil.copytree(undisturbed[False] / "checkpoint-8", folder)
    (folder / "model.safetensors").unlink()
    (folder / MANIFEST).unlink()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(2)}, folder / "model-1-of-2.safetensors")
    assert checkpoints.incomplete_reason(folder) == "model-2-of-2.safetensors is missing"
    save_file({"b": torch.zeros(2)}, folder / "model-2-of-2.safetensors")
    assert checkpoints.incomplete_reason(folder) is None
    (folder / "model.safetensors.index.json").unlink()
    (folder / "policy").mkdir()
    save_file({"a": torch.zeros(2)}, folder / "policy" / "adapter_model.safetensors")
    assert checkpoints.incomplete_reason(folder) is None


def test_a_used_folder_is_named_when_training_starts_anew(
    tmp_path: Path, undisturbed: dict[bool, Path], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed[False] / "checkpoint-8", tmp_path / "checkpoint-8")
    make(tmp_path, max_steps=1).train()
    assert any("checkpoints of an earlier run, up to checkpoint-8" in line for line in caplog.messages)


def test_write_atomic_leaves_the_old_content_on_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


# the command itself
