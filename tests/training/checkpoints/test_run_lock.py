"""Two runs never train in one folder, and a run that was killed keeps nobody out."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from fastdpo.cli import main
from fastdpo.files import DiskError
from fastdpo.training.checkpoints import run_lock
from fastdpo.training.checkpoints.run_lock import NAME, OWNER, FolderInUse, check_free, locked

HOLD = """
import sys, time
from pathlib import Path
from fastdpo.training.checkpoints.run_lock import locked
with locked(Path(sys.argv[1]), None):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that holds the lock of tmp_path / "out"."""
    folder = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process, folder
    process.kill()
    process.communicate()


def test_the_owner_is_named_and_leaves_nothing_of_itself(tmp_path: Path) -> None:
    with locked(tmp_path / "out", "me"):
        owner = json.loads((tmp_path / "out" / OWNER).read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        with locked(tmp_path / "out", "me"):
            pass
        # still held
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"), locked(tmp_path / "out", "another"):
            pytest.fail("two hold it")
    assert list((tmp_path / "out").iterdir()) == []
    check_free(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_second_process_is_refused_and_a_killed_one_keeps_nobody_out(
    other_run: tuple[subprocess.Popen[str], Path],
    train_command: list[str],
    make_trainer: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    process, folder = other_run
    since = json.loads((folder / OWNER).read_text())["since"]
    wanted = f"in use by another run (process {process.pid} on {socket.gethostname()}, since {since})"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(train_command) == 2
    assert wanted in capfd.readouterr().err.splitlines()[-1]
    with pytest.raises(FolderInUse) as error:
        make_trainer(folder, max_steps=1).train()
    assert wanted in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / OWNER).exists()
    make_trainer(folder, max_steps=1).train()
    assert not (folder / OWNER).exists()


def test_a_lock_that_a_killed_run_s_children_keep_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"pid": 2**22 + 1, "host": socket.gethostname(), "since": "yesterday"}
    taken, free = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path, "child"):
            (tmp_path / OWNER).write_text(json.dumps(gone))
            taken.set()
            free.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    monkeypatch.setattr(run_lock, "LEFT_BEHIND", 0.2)
    with pytest.raises(FolderInUse, match="since yesterday"), locked(tmp_path, "me"):
        pytest.fail("two hold it")
    monkeypatch.setattr(run_lock, "LEFT_BEHIND", 30.0)
    threading.Timer(0.3, free.set).start()
    with locked(tmp_path, "me"):
        assert free.is_set()
    thread.join()


class Look(TrainerCallback):
    """While a trainer trains, tries a second run in its folder, and reads there."""

    def __init__(self, other: Any) -> None:
        self.other, self.refused = other, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
            self.other.train()
        self.refused += 1


def test_a_trainer_holds_it_as_long_as_it_trains(tmp_path: Path, make_trainer: Any) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 1}
    other = make_trainer(tmp_path, **options)
    look = Look(other)
    trainer = make_trainer(tmp_path, callbacks=[look], **options)
    for times in (2, 4):
        trainer.train()
        assert look.refused == times
    assert other.state.global_step == 0
    other.train()
    assert other.state.global_step == 2
    assert not [path for path in tmp_path.rglob("*") if path.name in (NAME, OWNER)]


def test_an_error_in_training_frees_it(tmp_path: Path, make_trainer: Any) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        make_trainer(tmp_path, callbacks=[Fail()]).train()
    check_free(tmp_path)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path, "me"):
        assert list(tmp_path.iterdir()) == []
    assert any(f"the file system of {tmp_path} has no locks" in line for line in caplog.messages)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"), locked(tmp_path / "file", None):
        pytest.fail("a file was locked")


def test_of_many_one_holds_it_at_a_time(tmp_path: Path) -> None:
    """Also where each removes its file as it leaves."""
    inside, times = 0, 0

    def work(name: int) -> None:
        nonlocal inside, times
        for _ in range(60):
            try:
                with locked(tmp_path, name):
                    inside += 1
                    assert inside == 1
                    times += 1
                    time.sleep(0.001)
                    inside -= 1
            except FolderInUse:
                time.sleep(0.001)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert times > 20


def test_several_processes_stop_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's refusal is the others' too: they would wait for it until a timeout."""

    class Args:
        output_dir, process_index, world_size = str(tmp_path), 1, 2

    def received(values: list[Any]) -> None:
        values[0] = "output_dir out is in use"

    monkeypatch.setattr(run_lock, "broadcast_object_list", received)
    with pytest.raises(FolderInUse, match="output_dir out is in use"), run_lock.output_dir_locked(Args(), None):
        pytest.fail("it went on alone")
    assert list(tmp_path.iterdir()) == []
