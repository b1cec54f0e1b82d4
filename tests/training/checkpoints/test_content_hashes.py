"""One flipped bit of anything that a run goes on from is found, and the checkpoint before it is taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdpo.training.checkpoints import folders
from fastdpo.training.checkpoints.content_hashes import (
    MANIFEST,
    changed_file,
    file_hash,
    files_of,
    hash_files,
    tensors_hash,
    write_manifest,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def two_checkpoints(run: Path, make_trainer: Any, tmp_path: Path) -> Path:
    """A copy of a run with checkpoint-2 and checkpoint-4."""
    if not (run / "checkpoint-4").is_dir():
        make_trainer(run, save_steps=2).train()
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


NAMES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    *("fastdpo_state.json", "config.json", "tokenizer.json", "training_args.bin", MANIFEST),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_found_and_the_checkpoint_passed_over(
    two_checkpoints: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = two_checkpoints / "checkpoint-4"
    assert folders.incomplete_reason(newest) is None
    for where in (0.1, 0.5, 0.9):
        shutil.copy(newest / name, two_checkpoints / "kept")
        flip(newest / name, where)
        reason = folders.incomplete_reason(newest)
        assert reason is not None, where
        assert folders.newest_complete(two_checkpoints) == str(two_checkpoints / "checkpoint-2")
        with pytest.raises(folders.CheckpointError, match="cannot resume from"):
            folders.resolve_resume(str(newest), two_checkpoints)
        shutil.move(two_checkpoints / "kept", newest / name)
    assert any(f"passed over {newest}: " in line for line in caplog.messages)


def test_every_file_of_a_checkpoint_is_covered(two_checkpoints: Path) -> None:
    folder = two_checkpoints / "checkpoint-4"
    hashes = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(hashes) == files_of(folder)
    assert {"model.safetensors", "optimizer.pt", "fastdpo_state.json", "trainer_state.json"} <= hashes.keys()
    (folder / "notes.txt").write_text("somebody's own")
    assert changed_file(folder) is None


CASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a list": ("fastdpo_state.json", lambda state: [state]),
    "null": ("fastdpo_state.json", lambda state: None),
    "a key less": ("fastdpo_state.json", lambda state: {k: v for k, v in state.items() if k != "metric_sums"}),
    "text for a number": ("fastdpo_state.json", lambda state: {**state, "loss_since_log": "0.5"}),
    "a number for a list": ("fastdpo_state.json", lambda state: {**state, "margins": 3}),
    "history as text": ("trainer_state.json", lambda state: {**state, "log_history": "none"}),
    "history of text": ("trainer_state.json", lambda state: {**state, "log_history": ["none"]}),
    "history without steps": ("trainer_state.json", lambda state: {**state, "log_history": [{"loss": 1.0}]}),
    "step as text": ("trainer_state.json", lambda state: {**state, "global_step": "4"}),
    "state as a list": ("trainer_state.json", lambda state: [state]),
    "unknown field": ("trainer_state.json", lambda state: {**state, "no_such_field": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_types_are_passed_over_without_hashes_too(
    two_checkpoints: Path, make_trainer: Any, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, change = CASES[case]
    newest = two_checkpoints / "checkpoint-4"
    (newest / MANIFEST).unlink()
    (newest / name).write_text(json.dumps(change(json.loads((newest / name).read_text()))))
    assert folders.incomplete_reason(newest) == f"{name} is not readable"
    if case in ("a key less", "history of text"):
        trainer = make_trainer(two_checkpoints, save_steps=2)
        trainer.train(resume_from_checkpoint=True)
        assert any(f"passed over {newest}: {name} is not readable" in line for line in caplog.messages)
        assert any("going on from" in line and line.endswith("checkpoint-2.") for line in caplog.messages)


def test_a_checkpoint_without_hashes_is_taken(two_checkpoints: Path) -> None:
    """Those of other trainers, and of fastdpo up to 0.1, have none."""
    (two_checkpoints / "checkpoint-4" / MANIFEST).unlink()
    assert folders.incomplete_reason(two_checkpoints / "checkpoint-4") is None


def test_the_best_model_is_not_taken_from_a_changed_file(two_checkpoints: Path, make_trainer: Any) -> None:
    trainer = make_trainer(two_checkpoints, save_steps=2)
    trainer.state.best_model_checkpoint = str(two_checkpoints / "checkpoint-2")
    trainer._load_best_model()
    flip(two_checkpoints / "checkpoint-2" / "model.safetensors", 0.7)
    with pytest.raises(folders.CheckpointError, match=r"best model cannot be taken .* hash differs"):
        trainer._load_best_model()


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in (("a", b"abc"), ("sub/b", b""), ("sub/c", bytes(3 << 24))):
        (tmp_path / name).write_bytes(content)
    assert files_of(tmp_path) == ["a", "sub/b", "sub/c"]
    # what the reference implementation gives for these
    assert file_hash(tmp_path / "a") == "06b05ab6733a618578af5f94892f3950"
    assert file_hash(tmp_path / "sub" / "b") == "99aa06d3014798d86001c324468d497f"
    write_manifest(tmp_path, hash_files(tmp_path, files_of(tmp_path)))
    assert changed_file(tmp_path) is None
    (tmp_path / "sub" / "c").write_bytes(bytes((3 << 24) - 1))
    assert (
        changed_file(tmp_path)
        == f"sub/c is not as it was written (its hash differs; to use it all the same remove {MANIFEST})"
    )
    (tmp_path / "sub" / "c").unlink()
    assert changed_file(tmp_path) == "c is missing"
    one = {"x": torch.arange(4.0), "y": torch.ones(2, dtype=torch.bfloat16), "z": torch.tensor(3)}
    assert tensors_hash(one) == tensors_hash(dict(reversed(one.items())))
    others = [{**one, "x": torch.arange(4.0).reshape(2, 2)}, {**one, "z": torch.tensor(4)}, {"x": one["x"]}]
    others.append({**one, "y": torch.ones(2, dtype=torch.float16)})
    assert len({tensors_hash(other) for other in [one, *others]}) == 5


def test_a_flipped_bit_of_a_stored_log_prob_is_computed_again(
    make_trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"precompute_ref_log_probs": True, "precompute_ref_dir": str(tmp_path / "logps"), "max_steps": 1}
    make_trainer(tmp_path / "a", **options)
    path = tmp_path / "logps" / "train" / "shard-00000.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is mapped
    content = bytearray(path.read_bytes())
    place = content.rindex(stored["ref_chosen_logps"].numpy().tobytes())
    content[place + 2] ^= 0x40  # of the first number: a bit of its mantissa
    path.write_bytes(content)
    assert not torch.equal(load_file(path)["ref_chosen_logps"], stored["ref_chosen_logps"])
    trainer = make_trainer(tmp_path / "b", **options)
    assert any(f"{path} is not as it was written" in line and "computed again" in line for line in caplog.messages)
    assert torch.equal(load_file(path)["ref_chosen_logps"], stored["ref_chosen_logps"])
    column = torch.tensor(trainer.train_dataset["ref_chosen_logps"][:])
    assert torch.equal(column, stored["ref_chosen_logps"])
