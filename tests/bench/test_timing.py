"""Clocks: interleaved rounds, a budget that ends, device events after a flush, failures on the way."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def timing(bench):
    return bench.measure.timing


def test_rounds_are_interleaved_and_the_first_is_a_warm_up(timing):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times, failed = timing.interleaved(runs, timing.Rounds(2), timing.Timer("cpu"))
    assert order == ["a", "b"] * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}
    assert not failed


def test_a_slow_run_gets_fewer_rounds_spread_over_all(timing, monkeypatch):
    order, timer = [], timing.Timer("cpu")
    monkeypatch.setattr(timer, "once", lambda run: run())

    def timed(name, ms):
        return lambda: order.append(name) or ms

    runs = {"slow": timed("s", 50.0), "fast": timed("f", 1.0)}
    times, _ = timing.interleaved(runs, timing.Rounds(9, least=3, slice_ms=20.0), timer)
    assert "".join(order) == "sf" + "ffsf" * 3
    assert len(times["slow"]) == 3


def test_a_run_that_fails_in_a_round_is_dropped_and_named(timing):
    left = [1, 1]

    def fails_later():
        left.pop()

    runs = {"good": lambda: None, "bad": fails_later}
    times, failed = timing.interleaved(runs, timing.Rounds(4), timing.Timer("cpu"))
    assert len(times["good"]) == 4
    assert set(times) == {"good"}
    assert failed["bad"].startswith("IndexError")


def test_a_budget_that_ends_within_a_case_keeps_what_it_has(bench, timing, monkeypatch):
    now = [0.0]
    budget = timing.Budget(1.0, clock=lambda: now[0])

    def slow(hidden, weight, labels, softcap):
        now[0] += 20.0
        return bench.linear_logprob.peers.eager(hidden, weight, labels)

    case = bench.linear_logprob.cases.LogprobCase(40, 16, 700, "fp32", "forward")
    eager = bench.linear_logprob.peers.EAGER
    entries = {name: replace(eager, name=name, run=slow) for name in ("a", "b", "c")}
    comparison = bench.logprobs(40, 16, 700, torch.float32)
    rounds, timer = timing.Rounds(5), timing.Timer("cpu")
    # an entry runs twice before the rounds: checked, and its peak taken
    rows, missing = bench.measure.rows.measure_case(case, comparison, entries, rounds, timer, budget, {})
    assert rows == []
    assert [str(m) for m in missing] == [f"{case.name}: {name}: no time left" for name in "abc"]
    now[0] = -160.0
    rows, missing = bench.measure.rows.measure_case(case, comparison, entries, rounds, timer, budget, {})
    assert {row.entry: len(row.times) for row in rows} == {"a": 1, "b": 1, "c": 1}
    assert missing == []


def test_a_gpu_run_is_timed_by_events_after_a_flush_of_its_cache(bench, timing, monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 1.5

    properties = SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=132, total_memory=80 << 30)
    cuda = SimpleNamespace(
        get_device_properties=lambda device: properties,
        get_device_name=lambda device: "GPU X",
        get_device_capability=lambda device: (9, 0),
        synchronize=lambda: log.append("wait"),
        memory_allocated=lambda: 7 << 20,
        reset_peak_memory_stats=lambda: log.append("reset"),
        max_memory_allocated=lambda: 19 << 20,
        Event=Event,
    )
    flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    sizes = []
    empty = lambda size, **_: sizes.append(size) or flush  # noqa: E731
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda, empty=empty, int8=torch.int8))
    timer = timing.Timer("cuda")
    assert sizes == [100 << 20]
    assert timer.once(lambda: log.append("run")) == 1.5
    assert log == ["wait", "flush", "event", "run", "event", "wait"]
    log.clear()
    assert timing.peak_mib(lambda: log.append("run"), "cuda") == 12.0
    assert log == ["wait", "reset", "run", "wait"]

    fake = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"), __version__="2", get_num_threads=lambda: 1)
    monkeypatch.setattr(bench.measure.conditions, "torch", fake)
    monkeypatch.setenv("FASTDPO_KEEP_MB", "0")
    environment = bench.measure.conditions.environment("cuda", "command", "abc")
    assert [environment[name] for name in ("device", "capability", "cuda", "commit")] == ["GPU X", "9.0", "13.0", "abc"]
    assert environment["memory_gib"] == 80.0
    assert environment["settings"]["FASTDPO_KEEP_MB"] == "0"


@pytest.mark.parametrize(
    "reason",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_other_words_for_out_of_memory(bench, reason):
    assert bench.measure.faults.out_of_memory(reason) == "out of memory"
    assert bench.measure.faults.out_of_memory(RuntimeError("out of range")) is None
