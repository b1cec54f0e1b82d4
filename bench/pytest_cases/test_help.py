"""How long the help of each command takes: interpreter, table of fields, and no torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.5  # seconds, of the fastest round
ROUNDS = 5


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help-all"], *([command, "--help"] for command in COMMANDS)],
    ids=" ".join,
)
def test_help(arguments: list[str], benchmark: Any):
    command = [sys.executable, "-m", "fastdpo", *arguments]
    benchmark.group = "help"
    benchmark.pedantic(
        lambda: subprocess.run(command, check=True, capture_output=True, cwd=ROOT), rounds=ROUNDS, warmup_rounds=1
    )
    assert benchmark.stats is None or benchmark.stats.stats.min < LIMIT
