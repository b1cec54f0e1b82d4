"""README: its Python blocks run, its table is what bench/results says, its commands are the ones that are tested."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([")


def test_blocks_that_are_not_run_compile():
    for block in re.findall(r"^```python no-run\n(.*?)^```", README, re.M | re.S):
        compile(block, "README.md", "exec")


def test_the_two_commands_are_exact():
    start = "python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e "
    assert f"{start}. && fastdpo train --demo\n" in README
    assert f'{start}".[test]" && pytest\n' in README


def test_the_table_is_rendered_from_results(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.show import readme as tables

    assert tables.newest("cpu") is not None
    assert tables.rendered(README) == README, "run `python -m bench.show.readme`"
    with_other_number = README.replace("| 512x512x32000", "| 513x512x32000")
    assert tables.rendered(with_other_number) == README
