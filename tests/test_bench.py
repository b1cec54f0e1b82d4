"""The benchmark suite: its oracle refuses a wrong entry, its rounds interleave, its report holds every condition."""

import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import cases, measure, peers, run, tables

    class Modules:
        pass

    for module in (cases, measure, peers, run, tables):
        setattr(Modules, module.__name__.rpartition(".")[2], module)
    return Modules


@pytest.mark.parametrize("mode", ["forward", "frozen", "trained"])
def test_every_entry_passes_the_oracle_and_a_wrong_one_does_not(bench, mode):
    case = bench.cases.Case(64, 32, 900, "bf16", mode)
    entries = bench.peers.entries()
    assert set(entries) == {"fastdpo", "eager", "trl"}
    by_eager = bench.measure.errors(entries["eager"][0], case, "cpu")
    assert len(by_eager) == {"forward": 1, "frozen": 2, "trained": 3}[mode]
    for name, (entry, _) in entries.items():
        assert bench.measure.passes(bench.measure.errors(entry, case, "cpu"), by_eager), name

    def wrong(hidden, weight, labels):
        return bench.peers.eager_entry(hidden, weight, labels) * 1.05

    assert not bench.measure.passes(bench.measure.errors(wrong, case, "cpu"), by_eager)


def test_rounds_are_interleaved_and_the_first_is_a_warm_up(bench):
    order = []
    times = bench.measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, "cpu")
    assert order == ["a", "b"] * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}


def test_inputs_are_peaked(bench):
    hidden, weight, labels = bench.cases.peaked_inputs(200, 64, 4000, torch.float32, "cpu")
    p = torch.softmax(hidden @ weight.t(), -1).gather(1, labels[:, None])
    assert float((p > 0.9).float().mean()) > 0.3
    assert float((p < 0.1).float().mean()) > 0.1


def test_run_writes_every_condition(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.cases, "CPU_SHAPES", [(40, 16, 700)])
    assert bench.run.main(["linear_logprob", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("linear_logprob_cpu_*.json")
    record = json.loads(path.read_text())
    assert {"device", "threads", "torch", "commit", "command", "date", "load_average_at_start"} <= set(
        record["environment"]
    )
    assert len(record["rows"]) == 18
    for row in record["rows"]:
        assert row["best_ms"] <= row["median_ms"]
        assert row["rounds"] == 2
        assert row["peak_mib"] > 0
        if row["entry"] == "fastdpo":
            assert row["peak_mib"] <= row["predicted_peak_mib"], row["case"]
    printed = capsys.readouterr().out
    assert re.search(r"40x16x700 bf16 frozen\n.*\n +fastdpo +[\d.]+", printed)
    assert "no ratio here speaks of one" in printed
    table = bench.tables.table(path)
    assert table.count("\n| 40x16x700") == 6


def test_cuda_without_a_device_is_refused_with_words(bench, capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(SystemExit):
        bench.run.main(["linear_logprob", "--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err
