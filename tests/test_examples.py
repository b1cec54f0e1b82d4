"""The examples run as they are written, each in its own process, and learn: the loss falls and the margin rises."""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
STEP = re.compile(r"^step (\d+): loss (\S+), reward margin (\S+)$", re.M)


def test_there_are_examples():
    assert [path.name for path in EXAMPLES] == ["lightning_module.py", "plain_torch.py", "trainer_subclass.py"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_learns(path: Path, tmp_path: Path):
    if path.stem == "lightning_module" and find_spec("lightning") is None:
        if os.environ.get("FASTDPO_REQUIRE_DATA") == "1":
            pytest.fail("FASTDPO_REQUIRE_DATA=1 and lightning is not installed")
        pytest.skip("lightning is not installed")
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    numbers, losses, margins = zip(*STEP.findall(done.stdout), strict=True)
    assert numbers == tuple(str(number) for number in range(20))
    losses, margins = [float(x) for x in losses], [float(x) for x in margins]
    # policy and reference start equal
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert sum(losses[-3:]) / 3 < 0.65
    assert sum(margins[-3:]) / 3 > 0.08
