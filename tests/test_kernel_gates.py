"""What can be known of a kernel without a GPU: it compiles for each target, and spills nothing."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_kernel_compiles_without_spills(target):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_ALWAYS_COMPILE": "1",
        "TRITON_DUMP_PTXAS_LOG": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), target],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen, log = 0, ""
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            log += line + "\n"
            continue
        found = json.loads(line)
        if target.startswith("sm"):
            found["registers"] = int(re.search(r"Used (\d+) registers", log)[1])
            found["spills"] = int(re.search(r"(\d+) bytes spill stores", log)[1])
        assert found["spills"] == 0, found
        assert found["registers"] <= 255, found
        assert found["shared"] <= SHARED_LIMIT[target], found
        assert not found["tf32"], found
        assert not found["atomics"], found
        seen, log = seen + 1, ""
    assert seen == 17
