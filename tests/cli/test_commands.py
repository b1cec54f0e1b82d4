"""`fastdpo` itself: its commands, its version, and how a command ends."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli import main
from fastdpo.cli.command import NESTED, end_command
from fastdpo.cli.errors import TrainingFailed, UsageError, WriteFailed
from fastdpo.data.errors import RowError

ROOT = Path(__file__).resolve().parents[2]


def test_version_and_commands(capsys: pytest.CaptureFixture[str]):
    from fastdpo import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdpo {__version__}\n"
    assert main(["tran"]) == 2
    assert capsys.readouterr().err == "fastdpo: error: there is no command 'tran'; did you mean 'train'?\n"
    assert main([]) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is meant")
@pytest.mark.parametrize(
    ("command", "code", "noun"),
    [
        ("train", "command.run = lambda request: 'result'", "training is done and saved, but its result"),
        ("doctor", "command.examine = lambda arguments: {'ok': True}", "the report"),
    ],
)
def test_a_result_that_cannot_be_printed(command: str, code: str, noun: str):
    code = (
        f"import sys; from fastdpo.cli import main; from fastdpo.cli.{command} import command; {code}; "
        f"sys.exit(main(['{command}', *sys.argv[1:]]))"
    )
    words = [sys.executable, "-c", code, *(["--json"] if command == "doctor" else [])]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == (f"fastdpo {command}: failed: {noun} cannot be printed to stdout: No space left on device\n")


def caused_by(cause: Exception) -> TrainingFailed:
    failure = TrainingFailed()
    failure.__cause__ = cause
    return failure


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UsageError("--beta is\nmissing"), 2, "error: --beta is\nmissing"),  # ours, possibly a list of rows
        (ValueError("no\n such  file"), 2, "error: no such file"),
        (FileNotFoundError(), 2, "error: FileNotFoundError"),
        (ImportError("no torch"), 2, "error: no torch"),
        (RecursionError("too deep"), 2, f"error: {NESTED}"),
        (WriteFailed("out.json cannot be written"), 1, "failed: out.json cannot be written"),
        (ZeroDivisionError("by zero"), 1, "failed: ZeroDivisionError: by zero (--debug shows the traceback)"),
        (caused_by(ValueError("a\nshape")), 1, "failed: ValueError: a shape (--debug shows the traceback)"),
        (caused_by(RowError("is null")), 1, "failed: is null"),
        (KeyboardInterrupt(), 130, "stopped"),
        (SystemExit("no GPU"), 1, "failed: no GPU"),
        (SystemExit(143), 143, None),
        (SystemExit(), 0, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_command_ends_in_one_sentence(capfd: Any, error: BaseException, code: int, sentence: str | None):
    def work() -> str:
        print("a library's line")
        raise error

    assert end_command("fastdpo try", False, work, str, interrupted=lambda: "stopped") == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "a library's line\n" + ("" if sentence is None else f"fastdpo try: {sentence}\n")


def test_a_command_says_which_errors_are_of_its_input(capsys: pytest.CaptureFixture[str]):
    def work() -> str:
        raise ValueError("odd")

    assert end_command("fastdpo try", True, work, str, input_errors=(UsageError,)) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("\nfastdpo try: failed: ValueError: odd\n")


def test_the_result_goes_to_stdout_and_says_the_exit_code(capsys: pytest.CaptureFixture[str]):
    assert end_command("fastdpo try", False, lambda: 3, lambda n: f"{n} wrong\n", exit_code=lambda n: int(n > 2)) == 1
    assert capsys.readouterr() == ("3 wrong\n", "")
