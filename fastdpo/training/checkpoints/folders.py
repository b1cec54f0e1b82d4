"""Checkpoints on disk: written in a staging folder, renamed in one step, checked before use.

transformers writes a checkpoint in place, trainer_state.json last, and resumes from the highest number it
finds. A run that is killed while it saves would then fail to resume, or go on from trained weights at step 0.
"""

import contextlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from fastdpo.files import remove_tree, sync_folder, sync_tree, why_not_written, write_atomic
from fastdpo.json_text import read_json
from fastdpo.models.load_errors import unreadable_weights
from fastdpo.training.checkpoints.content_hashes import changed_file

logger = logging.getLogger(__name__)

STATE_NAME = "fastdpo_state.json"
# what it always has
_STATE: dict[str, Any] = {
    "loss_since_log": float,
    "last_logged_step": int,
    "num_tokens": int,
    "metric_sums": list,
    "margins": list,
}
REFERENCE_NAME = "reference.safetensors"
# the leading underscore also keeps a staging folder out of uploads of output_dir
_STAGING = "_incomplete-checkpoint-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """Training cannot go on from the checkpoint that was asked for; the message is one sentence."""


class CheckpointNotWritten(RuntimeError):
    """A checkpoint (nothing of it is left), or the model, could not be written; the message is one sentence."""


def staging_folder(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of `step` is written before it is complete."""
    return Path(run_dir) / f"{_STAGING}{step}"


def remove_leftovers(run_dir: str | os.PathLike[str]) -> list[str]:
    """Remove what killed runs left half written (or half deleted) in `run_dir`; returns the names."""
    leftovers = sorted(path for path in Path(run_dir).glob(f"{_STAGING}*") if path.is_dir() or path.is_symlink())
    for path in leftovers:
        remove_tree(path)
    return [path.name for path in leftovers]


@contextlib.contextmanager
def whole_or_nothing(staging: Path, final: Path) -> Iterator[None]:
    """Where `final` cannot be written, remove `staging`: half a checkpoint must not take the room that is missing.

    Raises:
        CheckpointNotWritten: for an error of the disk.
    """
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        remove_tree(staging)
        raise CheckpointNotWritten(
            f"{final} cannot be written: {reason}; make room, and go on from an earlier one with resume_from_checkpoint"
        ) from error


@contextlib.contextmanager
def model_or_sentence(folder: str) -> Iterator[None]:
    """For writing a model outside of checkpoints. Raises CheckpointNotWritten for an error of the disk."""
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        raise CheckpointNotWritten(
            f"the model cannot be written to {folder}: {reason}; what is there of it is not whole: make room, and save "
            "it again, or go on from a checkpoint with resume_from_checkpoint, which saves it at the end"
        ) from error


def publish(staged: Path, final: Path) -> None:
    """Make `staged` durable and rename it to `final`; an older folder of that name is replaced."""
    sync_tree(staged)
    if final.exists() or final.is_symlink():
        remove_checkpoint(final)
    os.replace(staged, final)
    sync_folder(final.parent)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a kill in between leaves a leftover, not a checkpoint with files missing."""
    doomed = path.with_name(f"{_STAGING}{path.name}-deleted")
    remove_tree(doomed)
    os.replace(path, doomed)
    remove_tree(doomed)


def checkpoints_by_step(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """The `checkpoint-N` folders of `run_dir` with their steps, lowest first."""
    checkpoints = []
    for path in Path(run_dir).glob("checkpoint-*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            checkpoints.append((int(match[1]), path))
    return sorted(checkpoints)


def rotate(run_dir: str | os.PathLike[str], limit: int | None, keep: list[Path]) -> None:
    """Delete the oldest checkpoints until `limit` are left; those in `keep` stay. No limit: None or 0."""
    if not limit or limit < 0:
        return
    # by age, so that higher numbers of an earlier run in the same folder go first
    by_age = sorted((path.stat().st_mtime_ns, step, path) for step, path in checkpoints_by_step(run_dir))
    protected = {path.resolve() for path in keep}
    surplus = len(by_age) - max(limit, len(protected))
    for _, _, path in by_age:
        if surplus > 0 and path.resolve() not in protected:
            remove_checkpoint(path)
            surplus -= 1


def incomplete_reason(folder: str | os.PathLike[str], sharded: bool = False) -> str | None:
    """Why training cannot go on from `folder`, or None when everything is there, readable, and as it was written.

    sharded: the checkpoint is DeepSpeed's or FSDP's, whose own folders hold weights and optimizer; of those only the
        content is compared.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "no such folder"
    return _wrong_state(folder) or (None if sharded else _wrong_parts(folder)) or changed_file(folder)


def _wrong_state(folder: Path) -> str | None:
    """What is wrong with trainer_state.json or fastdpo_state.json, None where nothing is."""
    try:
        state = read_json(folder / TRAINER_STATE_NAME)
        step, history = state["global_step"], state["log_history"]
        as_trainer_writes = isinstance(step, int) and isinstance(history, list)
        if not as_trainer_writes or not all(isinstance(line.get("step"), int | float) for line in history):
            return f"{TRAINER_STATE_NAME} is not readable"
        TrainerState(**state)
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return f"{TRAINER_STATE_NAME} is not readable"
    match = _CHECKPOINT.fullmatch(folder.name)
    if match and step != int(match[1]):
        return f"{TRAINER_STATE_NAME} is of step {step}"
    path = folder / STATE_NAME
    if path.is_file():  # another trainer writes none
        try:
            ours = read_json(path)
            wrong = [name for name, kind in _STATE.items() if not isinstance(ours[name], kind)]
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            wrong = [STATE_NAME]
        if wrong:
            return f"{STATE_NAME} is not readable"
    return None


def _wrong_parts(folder: Path) -> str | None:
    """What is wrong with the files of weights, optimizer, schedule and random numbers, None where nothing is."""
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (folder / name).is_file():
            return f"{name} is missing (was it saved with save_only_model?)"
    rng_files = sorted(folder.glob("rng_state*.pth"))
    if not rng_files:
        return "rng_state.pth is missing"
    for path in [folder / "optimizer.pt", folder / "scheduler.pt", *rng_files]:
        # torch.save writes a zip; its directory is at the end, so a file cut short does not open
        try:
            readable = zipfile.is_zipfile(path)
        except (zipfile.BadZipFile, OSError):
            readable = False
        if not readable:
            return f"{path.name} is not readable"
    return unreadable_weights(folder, REFERENCE_NAME)


def newest_complete(run_dir: str | os.PathLike[str], sharded: bool = False) -> str | None:
    """The complete checkpoint with the most steps, or None; those passed over are named in a log line."""
    for _, path in reversed(checkpoints_by_step(run_dir)):
        reason = incomplete_reason(path, sharded)
        if reason is None:
            return str(path)
        logger.warning(f"resume: passed over {path}: {reason}.")
    return None


def resolve_resume(
    resume: str | bool | os.PathLike[str] | None,
    run_dir: str | os.PathLike[str],
    sharded: bool = False,
    adapter: bool | None = None,
) -> str | None:
    """The checkpoint to go on from, or None to start at step 0.

    True takes the newest complete checkpoint in `run_dir`; when there is none, training starts from scratch,
    so that the command of a run that was killed before its first save can simply be repeated. `adapter` says
    whether an adapter is trained; None: not known yet.

    Raises:
        CheckpointError: a checkpoint given by path that is not complete, or one of an adapter where the whole
            model is trained, or the other way round.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        newest = newest_complete(run_dir, sharded)
        if newest is None:
            logger.warning(f"resume: no complete checkpoint in {run_dir}, starting from scratch.")
        else:
            _check_kind(newest, sharded, adapter)
            logger.warning(f"resume: going on from {newest}.")
        return newest
    reason = incomplete_reason(resume, sharded)
    if reason is not None:
        inside = checkpoints_by_step(resume)
        fix = f"a folder in it, such as {inside[-1][1]}" if inside else "another one"
        raise CheckpointError(
            f"cannot resume from {os.fspath(resume)}: {reason}; give {fix}, or True for the newest complete one."
        )
    _check_kind(resume, sharded, adapter)
    return os.fspath(resume)


def _check_kind(folder: str | os.PathLike[str], sharded: bool, adapter: bool | None) -> None:
    if sharded or adapter is None:
        return
    path = Path(folder)
    whole_model = any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    if whole_model == adapter:
        kinds = ("the whole model", "an adapter")
        fix = "without --use_peft (peft_config)" if adapter else "with --use_peft (peft_config)"
        raise CheckpointError(
            f"cannot resume from {path}: it is a checkpoint of {kinds[not whole_model]} and this run trains "
            f"{kinds[adapter]}; go on {fix}, or use another output_dir."
        )


def save_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write what a checkpoint of transformers lacks: running sums that are not logged yet."""
    write_atomic(Path(folder) / STATE_NAME, json.dumps(state, indent=1))


def load_state(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read it back; None, with a log line, for a checkpoint that another trainer wrote."""
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        logger.warning(f"resume: {folder} has no {STATE_NAME}; the first logged means start at this checkpoint.")
        return None
    return read_json(path)
