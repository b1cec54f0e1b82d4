"""`fastdpo` itself: its commands, its version, and how a command ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastdpo.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_version_and_commands(capsys: pytest.CaptureFixture[str]):
    from fastdpo import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdpo {__version__}\n"
    assert main(["tran"]) == 2
    assert capsys.readouterr().err == "fastdpo: error: there is no command 'tran'; did you mean 'train'?\n"
    assert main([]) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is meant")
def test_a_result_that_cannot_be_printed(tmp_path: Path):
    code = (
        "import sys; from fastdpo.cli import main; from fastdpo.cli.train import command; "
        "command.run = lambda request: 'result'; sys.exit(main(['train']))"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "fastdpo train: failed: training is done and saved, but its result cannot be printed to stdout: "
        "No space left on device\n"
    )
