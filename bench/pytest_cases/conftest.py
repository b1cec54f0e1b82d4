"""The suite's cases, entries and oracle for pytest-benchmark: `pytest bench --benchmark-only`."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from fastdpo.ops.oracle import passes

from ..measure.bounds import Work
from ..measure.comparison import Comparison
from ..measure.entries import Entry, Factory, LeftOut
from ..measure.faults import out_of_memory
from ..measure.timing import Timer, peak_mib
from ..session import InputCase, comparison_of, without_mode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 3


@pytest.fixture
def measure(benchmark: Any) -> Callable[[InputCase, Factory], None]:
    """Checks an entry on a case against fp64, then times it. Skips what is not installed or does not fit."""

    def run(case: InputCase, factory: Factory) -> None:
        entry = _made(factory)
        comparison = _comparison(without_mode(case))
        obstacle = entry.obstacle(case.dtype, comparison.softcap)
        if obstacle is not None:
            pytest.skip(obstacle)
        try:
            error = comparison.truth.errors(comparison.step(entry, case.mode))
            assert passes(error, comparison.eager_errors), f"{error}, eager {comparison.eager_errors}"
            peak = peak_mib(lambda: comparison.step(entry, case.mode), DEVICE)
        except (RuntimeError, MemoryError) as reason:
            if out_of_memory(reason) is None:
                raise
            pytest.skip("out of memory")
        work: Work | None = comparison.work(entry, case.mode)[0]
        benchmark.group = case.name
        benchmark.extra_info.update(version=entry.version, device=DEVICE, error=error, peak_mib=peak)
        benchmark.extra_info.update(tokens=comparison.tokens, flop=None if work is None else work.flops)
        timer = Timer(DEVICE)

        def step() -> None:
            comparison.step(entry, case.mode)
            timer.wait()

        benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)

    return run


@cache
def _made(factory: Factory) -> Entry:
    try:
        return factory.make(factory.name)
    except (LeftOut, ImportError) as reason:
        pytest.skip(str(reason))


@lru_cache(maxsize=1)  # cases that differ in their mode follow each other
def _comparison(key: InputCase) -> Comparison:
    return comparison_of(key, DEVICE, None)
