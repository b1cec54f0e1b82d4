"""A lock in output_dir: two runs in one folder would overwrite each other's checkpoints.

The lock itself is the operating system's (through `filelock`), which frees it when its process is gone, however it
went. A file beside it names the owner, for the one who is refused.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import TrainingArguments

from fastdpo.files import DiskError, write_atomic
from fastdpo.json_text import read_json

logger = logging.getLogger(__name__)

# the leading underscores keep both out of uploads of output_dir
NAME = "_fastdpo_run.lock"
OWNER = "_fastdpo_run.json"
# a killed run's data loaders hold its lock until they notice that it is gone
LEFT_BEHIND = 15.0


# of this process: what holds the lock of a folder
_held: dict[Path, Any] = {}


class FolderInUse(DiskError):
    """Another run trains in this output_dir; the message is one sentence."""


@contextlib.contextmanager
def output_dir_locked(args: TrainingArguments, holder: Any) -> Iterator[None]:
    """Hold the lock of `args.output_dir` meanwhile: the first of several processes does, and all stop where it cannot.

    Raises:
        FolderInUse: another run holds it.
        DiskError: it cannot be written.
    """
    refused: list[str | None] = [None]
    with contextlib.ExitStack() as stack:
        if args.process_index == 0:
            try:
                stack.enter_context(locked(Path(args.output_dir or "."), holder))
            except DiskError as error:
                if args.world_size == 1:
                    raise
                refused[0] = str(error)
        if args.world_size > 1:
            broadcast_object_list(refused)
        if refused[0] is not None:
            raise FolderInUse(refused[0])
        yield


@contextlib.contextmanager
def locked(folder: Path, holder: Any) -> Iterator[None]:
    """Hold the lock of `folder` (made where missing) meanwhile; the same `holder` may take it again while it does.

    Raises:
        FolderInUse: another run holds it, of another process or of this one.
        DiskError: it cannot be written.
    """
    path = folder.resolve()
    lock = None if path in _held and _held[path] is holder else _acquired(folder)
    if lock is None:
        yield
        return
    _held[path] = holder
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        with contextlib.suppress(OSError):  # the lock holds without it
            write_atomic(path / OWNER, json.dumps(me))
        yield
    finally:
        with contextlib.suppress(OSError):
            (path / OWNER).unlink(missing_ok=True)
        del _held[path]
        _released(lock)


def check_free(folder: Path) -> None:
    """Raise FolderInUse where a run trains in `folder`, before anything heavy is loaded."""
    lock = _acquired(folder) if (folder / NAME).exists() else None
    if lock is not None:
        _released(lock)


def _acquired(folder: Path) -> Any:
    """The lock of `folder`, held; None, with a line, on a file system that has no locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _has_locks(folder):
            logger.warning(f"the file system of {folder} has no locks, so a second run in it would not be noticed.")
            return None
        lock = FileLock(folder.resolve() / NAME)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = _owner(folder)
            if not _gone(owner):
                raise _in_use(folder, owner) from None
            try:
                lock.acquire(timeout=LEFT_BEHIND)
            except Timeout:
                raise _in_use(folder, _owner(folder)) from None
    except OSError as error:
        raise DiskError(f"output_dir {folder} cannot be written: {error.strerror or error}") from error
    return lock


def _has_locks(folder: Path) -> bool:
    """Network file systems may be mounted without; a file that stands for a lock would outlive a killed run."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
    return True


def _released(lock: Any) -> None:
    """Remove the file while it is locked: who waits for it then sees that it is gone, and makes another."""
    with contextlib.suppress(OSError):  # Windows removes no open file
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _in_use(folder: Path, owner: dict[str, Any]) -> FolderInUse:
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "it has not said which yet"
    return FolderInUse(
        f"output_dir {folder} is in use by another run ({who}); wait for its end, stop it, or give another output_dir"
    )


def _owner(folder: Path) -> dict[str, Any]:
    """What the owner wrote of itself; {} where it has not yet."""
    for _ in range(10):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owner = read_json(folder / OWNER)
            return {name: owner[name] for name in ("pid", "host", "since")}
        time.sleep(0.05)
    return {}


def _gone(owner: dict[str, Any]) -> bool:
    """Whether the owner's process is seen not to live any more."""
    return bool(owner) and owner["host"] == socket.gethostname() and not psutil.pid_exists(owner["pid"])
