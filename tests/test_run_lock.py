"""Two runs never train in one folder, and a run that was killed keeps nobody out."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from fastdpo.cli import main
from fastdpo.training import run_lock
from fastdpo.training.files import DiskError
from fastdpo.training.run_lock import NAME, FolderInUse, Owner, check_free, holding

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="other processes are forked")


@pytest.fixture
def living(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that holds the lock of a folder."""
    folder = tmp_path / "living"
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with holding(folder, None):
            os.write(writing, b".")
            time.sleep(600)
        os._exit(0)
    os.read(reading, 1)
    yield pid, folder
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def write_lock(folder: Path, **changes: Any) -> Path:
    path = folder / NAME
    path.write_text(json.dumps(asdict(replace(Owner.me(), token="another", **changes))))
    return path


def taken(folder: Path) -> bool:
    with holding(folder, None):
        return json.loads((folder / NAME).read_text())["pid"] == os.getpid()


def test_the_lock_names_its_owner_and_goes_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with holding(folder, "me"):
        found = json.loads((folder / NAME).read_text())
        assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())
        assert found["since"].startswith("20")
        with holding(folder, "me"):
            pass
        assert (folder / NAME).is_file(), "the outer one still holds it"
        sentence = rf"{folder} is in use by another trainer of this process"
        with pytest.raises(FolderInUse, match=sentence), holding(folder, "another"):
            pytest.fail("two holders")
        with pytest.raises(FolderInUse):
            check_free(folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), holding(folder, "me"):
        raise KeyboardInterrupt
    assert list(folder.iterdir()) == []
    with holding(folder, "another"):
        assert (folder / NAME).is_file()


def test_a_living_process_is_named_and_a_killed_one_keeps_nobody_out(
    living: tuple[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pid, folder = living
    lock = (folder / NAME).read_text()
    since = json.loads(lock)["since"]
    sentence = (
        f"output_dir {folder} is in use by another run (process {pid} on {socket.gethostname()}, since {since})"
        "; wait for its end, stop it, or give another output_dir"
    )
    for attempt in (lambda: check_free(folder), lambda: taken(folder)):
        with pytest.raises(FolderInUse) as raised:
            attempt()
        assert str(raised.value) == sentence
    # the command says so before it loads anything
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert main(["train", "-m", f"{tmp_path}/model", "-d", "none.json", "--output_dir", str(folder), "--use_cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"fastdpo train: error: {sentence}"
    assert (folder / NAME).read_text() == lock
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now: nobody has asked for its end
    assert taken(folder)


def test_a_process_with_the_id_of_a_gone_one_is_told_apart(tmp_path: Path) -> None:
    for pid, born in ((os.getppid(), "1"), (os.getpid(), "1"), (os.getpid(), run_lock._born(os.getpid()))):
        write_lock(tmp_path, pid=pid, born=born)
        check_free(tmp_path)
        assert not (tmp_path / NAME).exists()
    write_lock(tmp_path, pid=os.getppid(), born=run_lock._born(os.getppid()))
    with pytest.raises(FolderInUse, match=f"process {os.getppid()} on"):
        check_free(tmp_path)


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"place": "another boot"}, None])
def test_an_owner_that_cannot_be_seen_lives_as_long_as_it_touches_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any] | None
) -> None:
    monkeypatch.setattr(run_lock, "STALE_AFTER", 0.4)
    path = tmp_path / NAME
    if changes is None:  # a kill came between making and writing it
        path.touch()
    else:
        write_lock(tmp_path, **changes)
    done = threading.Event()

    def touch() -> None:
        while not done.wait(0.05):
            os.utime(path)

    toucher = threading.Thread(target=touch)
    toucher.start()
    name = "a process that it does not name" if changes is None else f"process {os.getpid()} on"
    try:
        with pytest.raises(FolderInUse, match=name):
            taken(tmp_path)
    finally:
        done.set()
        toucher.join()
    assert taken(tmp_path), "nobody touched it for so long"
    assert list(tmp_path.iterdir()) == []


def test_an_old_lock_of_another_machine_is_taken_at_once(tmp_path: Path) -> None:
    path = write_lock(tmp_path, host="elsewhere")
    os.utime(path, (time.time() - 1000,) * 2)
    began = time.monotonic()
    assert taken(tmp_path)
    assert time.monotonic() - began < 5


def test_the_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "TOUCH_EVERY", 0.02)
    with holding(tmp_path, None):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 10
        while not (tmp_path / NAME).stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_a_forked_child_holds_nothing_and_leaves_its_parents_lock(tmp_path: Path) -> None:
    def child() -> int:
        try:
            with holding(tmp_path, "me"):
                return 1
        except FolderInUse as error:
            return 0 if f"process {os.getppid()} on" in str(error) else 2

    with holding(tmp_path, "me"):
        pid = os.fork()
        if pid == 0:
            os._exit(child())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (tmp_path / NAME).is_file()


def test_of_many_that_find_a_dead_ones_lock_one_gets_it(tmp_path: Path) -> None:
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        write_lock(folder, born="1")
        gate, opened = os.pipe()
        children = []
        for _ in range(6):
            pid = os.fork()
            if pid == 0:
                os.close(opened)
                os.read(gate, 1)  # until the parent closes its end
                code = 3
                try:
                    with holding(folder, None):
                        time.sleep(0.3)
                        code = 1
                except FolderInUse:
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        os.close(gate)
        os.close(opened)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert sorted(codes) == [0, 0, 0, 0, 0, 1]
        assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"), holding(tmp_path / "file", None):
        pytest.fail("a file was locked")


class Look(TrainerCallback):
    """Sees the lock while a trainer trains, and tries a second run in its folder."""

    def __init__(self, other: Any) -> None:
        self.other, self.seen = other, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(json.loads(Path(args.output_dir, NAME).read_text())["pid"])
        with pytest.raises(FolderInUse, match="another trainer of this process"):
            self.other.train()


def test_a_trainer_holds_it_as_long_as_it_trains(tmp_path: Path, make_trainer: Any) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 1}
    other = make_trainer(tmp_path, **options)
    trainer = make_trainer(tmp_path, **options)
    look = Look(other)
    trainer.add_callback(look)
    for _ in range(2):
        trainer.train()
        assert look.seen == [os.getpid()] * 2
        assert not list(tmp_path.rglob("*lock*"))
        look.seen.clear()
    assert other.state.global_step == 0
    other.evaluate(other.train_dataset)  # reading is free
    other.train()
    assert other.state.global_step == 2


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
