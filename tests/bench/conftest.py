"""The suite with toy shapes: `bench.<module>`, and helpers that several tests share."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpo.ops import oracle

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT / "bench").with_suffix("").parts)
    for path in sorted((ROOT / "bench").glob("**/*.py"))
    if "pytest_cases" not in path.parts
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The suite's modules by name (`bench.train_step.peers`), with toy shapes and few rounds, and:

    measured(out, *arguments, case=...) -> (exit code, record): a run without a plot and a search of the largest N,
    unless the arguments ask for them; with_entry(name, function): one more entry in linear_logprob, beside ours and
    eager; logprobs(n, h, v, dtype, softcap): inputs.
    """
    suite = SimpleNamespace()
    for name in MODULES:
        *folder, last = name.split(".")
        room = suite
        for part in folder:
            if not hasattr(room, part):
                setattr(room, part, SimpleNamespace())
            room = getattr(room, part)
        setattr(room, last, import_module(f"fastdpo.bench.{name}"))
    logprobs, pairs, trainers = suite.linear_logprob, suite.dpo_loss, suite.train_step
    monkeypatch.setattr(logprobs.cases, "CPU_SHAPES", [(40, 16, 700)])
    monkeypatch.setattr(logprobs.cases, "CPU_QUICK", (40, 16, 700))
    monkeypatch.setattr(pairs.cases, "CPU_SHAPES", [(2, 24, 16, 700)])
    monkeypatch.setattr(pairs.cases, "CPU_QUICK", (2, 24, 16, 700))
    for quick in (True, False):
        sweep = logprobs.cases.Sweep(20, 16, 300, (10, 20, 40), (150, 300, 600))
        monkeypatch.setitem(logprobs.cases.SWEEPS, ("cpu", quick), sweep)
        sweep = pairs.cases.PairSweep(2, 16, 16, 300, (8, 16, 32), (150, 300, 600))
        monkeypatch.setitem(pairs.cases.SWEEPS, ("cpu", quick), sweep)
        monkeypatch.setitem(logprobs.cases.MOST_TOKENS, ("cpu", quick), 1024)
    monkeypatch.setitem(trainers.cases.SHAPES, "toy", trainers.cases.ModelShape("llama", 16, 24, 1, 2, 1, 128))
    for name in ("CPU_SIZES", "CPU_QUICK"):
        monkeypatch.setattr(trainers.cases, name, [("toy", 2, 64, 3, "full")])
    monkeypatch.setitem(trainers.peers.LEARNING_RATES, "full", 3e-3)
    # words of a small vocabulary, wherever the real pairs are
    monkeypatch.setattr(trainers.data, "WORDS", 100)
    monkeypatch.setattr(trainers.data, "PAIRS", ROOT / "absent.json")
    monkeypatch.setattr(suite.benchmark, "TRAIN_ROUNDS", 2)
    rounds = suite.measure.timing.Rounds(2, least=1, slice_ms=400)
    monkeypatch.setitem(suite.session.SETTINGS, "cpu", replace(suite.session.SETTINGS["cpu"], rounds=rounds))
    suite.measured = _measured(suite)
    suite.with_entry = _with_entry(suite, monkeypatch)
    suite.logprobs = _logprobs(suite)
    return suite


def _measured(bench: SimpleNamespace) -> Callable[..., tuple[int, dict[str, Any]]]:
    def measured(out: Path, *arguments: str, case: str = "linear_logprob") -> tuple[int, dict[str, Any]]:
        plot = [] if "--plot" in arguments else ["--no_plot"]
        memory = [] if "--memory_budget" in arguments else ["--memory_budget", "0"]
        status = bench.run.main([case, "--device", "cpu", "--out", str(out), *plot, *memory, *arguments])
        (path,) = out.glob(f"{case}_cpu_*.json")
        return status, json.loads(path.read_text())

    return measured


def _with_entry(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    def with_entry(name: str, function: Any) -> None:
        entries, peers = bench.measure.entries, bench.linear_logprob.peers
        factory = entries.Factory(name, lambda name: entries.Entry(name, "version 1", function))
        kept = [f for f in peers.FACTORIES if f.name in ("fastdpo", "eager") and f.name != name]
        monkeypatch.setattr(peers, "FACTORIES", (*kept, factory))

    return with_entry


def _logprobs(bench: SimpleNamespace) -> Callable[..., Any]:
    def logprobs(n: int, h: int, v: int, dtype: torch.dtype, softcap: float | None = None) -> Any:
        inputs = oracle.peaked_inputs(n, h, v, dtype, "cpu")
        return bench.linear_logprob.step.LogprobComparison(*inputs, softcap)

    return logprobs
