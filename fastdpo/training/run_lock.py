"""A lock in output_dir: two runs in one folder would overwrite each other's checkpoints.

It is a file that names its owner, made in one step where there is none (no fcntl, which some network filesystems only
pretend to have). A run that is killed leaves it behind, so whoever finds one looks whether its owner lives: on the same
machine by process id and the process's start, which tells a process from a later one with its id; elsewhere by the
file's age, since a live owner touches it all the time.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from fastdpo.training.files import DiskError

logger = logging.getLogger(__name__)

# the leading underscore keeps it out of uploads of output_dir
NAME = "_fastdpo_run.lock"
TOUCH_EVERY = 15.0
# no live owner leaves it alone for so many seconds, not on a slow network either
STALE_AFTER = 90.0


class FolderInUse(DiskError):
    """Another run trains in this output_dir; the message is one sentence."""


@dataclass(frozen=True)
class Owner:
    """host, place: the machine's name, and what tells it from others of that name (boot and process namespace).

    pid, born: the process, and its start as the machine counts it. since: when it took the lock, in words. token: of
    this lock alone.
    """

    host: str
    place: str
    pid: int
    born: str
    since: str
    token: str

    @classmethod
    def me(cls) -> "Owner":
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), _place(), pid, _born(pid) or "", since, secrets.token_hex(8))

    def lives(self) -> bool | None:
        """None where that cannot be seen from here: on another machine, or hidden."""
        if (self.host, self.place) != (socket.gethostname(), _place()):
            return None
        if self.pid == os.getpid():
            return self.token in _tokens
        born = _born(self.pid)
        if born is None and os.name == "posix":
            try:
                os.kill(self.pid, 0)  # no signal, only the question
            except PermissionError:
                return None  # somebody else's, and hidden
            except OSError:
                pass
        return born == self.born


# of this process: who holds the lock of a folder, and how many times over; and the tokens of these locks
_held: dict[Path, tuple[Any, int]] = {}
_tokens: set[str] = set()
_FIX = "wait for its end, stop it, or give another output_dir"


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
                stack.enter_context(holding(str(args.output_dir or "."), holder))
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
def holding(folder: str | os.PathLike[str], holder: Any) -> Iterator[None]:
    """Hold the lock of `folder` (made where missing) meanwhile. The same `holder` may come again while it does.

    Raises:
        FolderInUse: another run holds it, in this process or another.
        DiskError: it cannot be written.
    """
    path = Path(folder).resolve() / NAME
    owner, depth = _held.setdefault(path, (holder, 0))
    if owner is not holder:
        raise FolderInUse(f"output_dir {folder} is in use by another trainer of this process; {_FIX}")
    _held[path] = (holder, depth + 1)
    try:
        with contextlib.nullcontext() if depth else _locked(path, folder):
            yield
    finally:
        if depth:
            _held[path] = (holder, depth)
        else:
            _held.pop(path, None)


if hasattr(os, "register_at_fork"):
    # a forked child holds nothing of what its parent does
    os.register_at_fork(after_in_child=lambda: (_held.clear(), _tokens.clear()))


def check_free(folder: str | os.PathLike[str]) -> None:
    """Raise FolderInUse where a run trains in `folder`, before anything is loaded; a lock that is left over goes."""
    path = Path(folder).resolve() / NAME
    if path.exists():
        _remove_if_left_over(path, folder)


@contextlib.contextmanager
def _locked(path: Path, folder: str | os.PathLike[str]) -> Iterator[None]:
    mine = Owner.me()
    while not _make(path, mine):
        _remove_if_left_over(path, folder)
    _tokens.add(mine.token)
    done = threading.Event()
    toucher = threading.Thread(target=_touch, args=(path, done), name="fastdpo run lock", daemon=True)
    toucher.start()
    try:
        yield
    finally:
        done.set()
        if os.getpid() == mine.pid:
            toucher.join()
            _tokens.discard(mine.token)
            found = _read(path)
            if found is not None and found.token == mine.token:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def _make(path: Path, owner: Owner) -> bool:
    """Make the lock, whole, where there is none; whether it was made. Raises DiskError where nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        if not path.parent.is_dir():
            raise DiskError(f"output_dir {path.parent} is a file; give a folder") from None
        return False
    except OSError as error:
        raise DiskError(f"output_dir {path.parent} cannot be written: {error.strerror}") from error
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(owner), file, indent=1)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise DiskError(f"output_dir {path.parent} cannot be written: {error.strerror}") from error
    return True


def _read(path: Path) -> Owner | None:
    """The owner, None of a lock that is gone or says none (it is being made, or a kill came in between)."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _remove_if_left_over(path: Path, folder: str | os.PathLike[str]) -> None:
    """Remove a lock whose owner is gone; nothing where there is none. Raises FolderInUse where it lives."""
    owner = _read(path)
    for _ in range(20):
        if owner is not None or not path.exists():
            break
        time.sleep(0.05)  # between the moment when it is made and the one when it is written
        owner = _read(path)
    lives = owner.lives() if owner is not None else None
    if lives is None:
        lives = not _is_stale(path, owner)
    if lives:
        who = "a process that it does not name" if owner is None else f"process {owner.pid} on {owner.host}"
        since = "" if owner is None else f", since {owner.since}"
        raise FolderInUse(f"output_dir {folder} is in use by another run ({who}{since}); {_FIX}")
    # two that find it may both be here: only the one whose rename hits that very lock takes it away
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(f"output_dir {folder} cannot be written: {error.strerror}") from error
    if _read(aside) != owner:
        with contextlib.suppress(OSError):
            os.link(aside, path)  # the other one's new lock, back to its place
    aside.unlink(missing_ok=True)


def _is_stale(path: Path, owner: Owner | None) -> bool:
    """Whether nobody touches a lock whose owner cannot be seen from here; waits until that is known."""
    began = _touched(path)
    said = False
    while began is not None:
        age = _now(path) - began
        if age > STALE_AFTER:
            return True
        if not said:
            said = True
            who = f"process {owner.pid} on {owner.host}" if owner else "a process that it does not name"
            logger.warning(f"{path} belongs to {who}: looking up to {STALE_AFTER - age:.0f} s whether that still runs.")
        time.sleep(min(1.0, STALE_AFTER / 10))
        found = _touched(path)
        if found is not None and found != began:
            return False
        began = found
    return True


def _touched(path: Path) -> float | None:
    """When the lock was touched last; None where it is gone. Opened, since a network filesystem keeps old answers."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _now(path: Path) -> float:
    """The time by the clock that dates the lock: a file server's may be minutes off."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with open(probe, "wb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError as error:
        raise DiskError(f"output_dir {path.parent} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(TOUCH_EVERY):
        with contextlib.suppress(OSError):
            os.utime(path)


def _place() -> str:
    """What tells this machine, since its start, and this container from others with the same name."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """What tells the process `pid` from a later one with that id; None where it is gone, or only waits to be reaped."""
    with contextlib.suppress(OSError, IndexError):
        # not psutil's: it counts from a clock that may be set
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    import psutil  # comes with accelerate

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None
