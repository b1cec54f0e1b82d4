"""The same cases as pytest benchmarks: `pytest bench --benchmark-only`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def run_pytest(*arguments: str) -> str:
    # in a worker's environment pytest-benchmark would not measure
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-only", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_case_is_checked_and_timed_with_its_error_and_memory(tmp_path):
    # the name of one case in both files: the quick shapes of this machine's device
    chosen = "bf16-forward-eager or (dpo and frozen and rows)"
    out = tmp_path / "b.json"
    run_pytest("-k", chosen, f"--benchmark-json={out}")
    benchmarks = {b["name"]: b for b in json.loads(out.read_text())["benchmarks"]}
    names = {name.partition("[")[0] for name in benchmarks}
    assert names == {"test_linear_logprob", "test_dpo_loss"}
    for name, benchmark in benchmarks.items():
        info = benchmark["extra_info"]
        assert benchmark["group"].replace(" ", "-") in name
        assert benchmark["stats"]["rounds"] == 3
        assert info["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
        assert info["peak_mib"] > 0
        assert info["flop"] > 0
        assert info["tokens"] > 0
        assert max(info["error"].values()) < 0.2


def test_cases_and_entries_are_the_suites(bench, monkeypatch):
    monkeypatch.undo()  # its own shapes, not the toy ones
    listed = [line.partition("::")[2] for line in run_pytest("--collect-only").splitlines() if "::" in line]
    listed = [name for name in listed if name.startswith(("test_dpo_loss", "test_linear_logprob"))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rooms = {
        "dpo_loss": (bench.dpo_loss.cases.pair_cases, bench.dpo_loss.peers),
        "linear_logprob": (bench.linear_logprob.cases.logprob_cases, bench.linear_logprob.peers),
    }
    expected = [
        f"test_{name}[{case.name.replace(' ', '-')}-{factory.name.replace(' ', '-')}]"
        for name, (cases, peers) in rooms.items()
        for case in cases(device, quick=True)
        for factory in peers.FACTORIES
        if device in factory.devices
    ]
    assert listed == expected
