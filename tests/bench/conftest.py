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
    found = SimpleNamespace()
    for name in MODULES:
        *folder, last = name.split(".")
        room = found
        for part in folder:
            if not hasattr(room, part):
                setattr(room, part, SimpleNamespace())
            room = getattr(room, part)
        setattr(room, last, import_module(f"fastdpo.bench.{name}"))
    monkeypatch.setattr(found.linear_logprob.cases, "CPU_SHAPES", [(40, 16, 700)])
    monkeypatch.setattr(found.linear_logprob.cases, "CPU_QUICK", (40, 16, 700))
    monkeypatch.setattr(found.dpo_loss.cases, "CPU_SHAPES", [(2, 24, 16, 700)])
    monkeypatch.setattr(found.dpo_loss.cases, "CPU_QUICK", (2, 24, 16, 700))
    for quick in (True, False):
        sweep = found.linear_logprob.cases.Sweep(20, 16, 300, (10, 20, 40), (150, 300, 600))
        monkeypatch.setitem(found.linear_logprob.cases.SWEEPS, ("cpu", quick), sweep)
        sweep = found.dpo_loss.cases.PairSweep(2, 16, 16, 300, (8, 16, 32), (150, 300, 600))
        monkeypatch.setitem(found.dpo_loss.cases.SWEEPS, ("cpu", quick), sweep)
        monkeypatch.setitem(found.linear_logprob.cases.MOST_TOKENS, ("cpu", quick), 1024)
    monkeypatch.setitem(
        found.train_step.cases.SHAPES, "toy", found.train_step.cases.Shape("llama", 16, 24, 1, 2, 1, 128)
    )
    for name in ("CPU_SIZES", "CPU_QUICK"):
        monkeypatch.setattr(found.train_step.cases, name, [("toy", 2, 64, 3, "full")])
    monkeypatch.setitem(found.train_step.peers.LEARNING_RATES, "full", 3e-3)
    # words of a small vocabulary, wherever the real pairs are
    monkeypatch.setattr(found.train_step.data, "WORDS", 100)
    monkeypatch.setattr(found.train_step.data, "PAIRS", ROOT / "absent.json")
    monkeypatch.setattr(found.benchmark, "TRAIN_ROUNDS", 2)
    rounds = found.measure.timing.Rounds(2, least=1, slice_ms=400)
    monkeypatch.setitem(found.session.SETTINGS, "cpu", replace(found.session.SETTINGS["cpu"], rounds=rounds))
    found.measured = _measured(found)
    found.with_entry = _with_entry(found, monkeypatch)
    found.logprobs = _logprobs(found)
    return found


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
        factory = bench.measure.entries.Factory(
            name, lambda name: bench.measure.entries.Entry(name, "version 1", function)
        )
        kept = [f for f in bench.linear_logprob.peers.FACTORIES if f.name in ("fastdpo", "eager") and f.name != name]
        monkeypatch.setattr(bench.linear_logprob.peers, "FACTORIES", (*kept, factory))

    return with_entry


def _logprobs(bench: SimpleNamespace) -> Callable[..., Any]:
    def logprobs(n: int, h: int, v: int, dtype: torch.dtype, softcap: float | None = None) -> Any:
        return bench.linear_logprob.step.Logprobs(*oracle.peaked_inputs(n, h, v, dtype, "cpu"), softcap)

    return logprobs
