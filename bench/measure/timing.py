"""Clocks: a budget, device events, interleaved rounds, peak memory."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .faults import attempt

MIB = 1 << 20
Run = Callable[[], object]


class Budget:
    """Minutes of wall time for new work, None for no limit; the clock starts when it is made."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if minutes is None else clock() + 60 * minutes

    @property
    def over(self) -> bool:
        return self._end is not None and self._clock() >= self._end


class Timer:
    """Times one run after another on a device.

    On CUDA with events, after a write over twice the L2 cache, so that no run finds the inputs there; the host is
    not waited for inside a run. On a CPU with the wall clock, after collecting garbage.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        gc.freeze()  # modules stay; collecting between runs need not look at them
        self._flush: Tensor | None = None
        if device == "cuda":
            size = 2 * torch.cuda.get_device_properties("cuda").L2_cache_size
            self._flush = torch.empty(max(size, MIB), dtype=torch.int8, device="cuda")

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def once(self, run: Run) -> float:
        """Milliseconds."""
        if self._flush is None:
            gc.collect()
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.wait()
        self._flush.zero_()
        start.record()
        run()
        end.record()
        self.wait()
        return start.elapsed_time(end)


@dataclass(frozen=True)
class Rounds:
    """How often each run is timed: `most` times, fewer (at least `least`) where that takes longer than `slice_ms`."""

    most: int
    least: int = 3
    slice_ms: float | None = None

    def of(self, warm_ms: float) -> int:
        if self.slice_ms is None:
            return self.most
        return min(self.most, max(self.least, int(self.slice_ms / max(warm_ms, 1e-3))))


def interleaved(
    runs: Mapping[str, Run],
    rounds: Rounds,
    timer: Timer,
    over: Callable[[], bool] = lambda: False,
    warm_up: bool = True,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each run, one of each per round, after a warm-up that also says how many rounds each gets;
    runs with fewer are spread over all rounds. And why a run failed, by name; its times are dropped. `warm_up` False:
    all are warm already, and get `most` rounds.

    Once `over` says so no round is begun.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    share = {} if warm_up else dict.fromkeys(runs, rounds.most)
    if timer.device == "cuda":
        gc.collect()
    for index in range(-1 if warm_up else 0, rounds.most):
        if over():
            break
        for name, run in runs.items():
            if name in failed:
                continue
            # of `most` rounds, those in which the running total of its share steps up
            due = index < 0 or (index + 1) * share[name] // rounds.most > index * share[name] // rounds.most
            if not due:
                continue
            took, failure = attempt(lambda run=run: timer.once(run))
            if took is None:
                failed[name] = failure
                times.pop(name)
            elif index < 0:
                share[name] = rounds.of(took)
            else:
                times[name].append(took)
    return times, failed


class Peak:
    """Peak bytes of torch's allocator above those at the start, of what one thread runs while this is entered."""

    def __init__(self, device: str) -> None:
        self.mib = 0.0
        self._cuda = device == "cuda"

    def __enter__(self) -> "Peak":
        if self._cuda:
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._recorded.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.mib = (torch.cuda.max_memory_allocated() - self._before) / MIB
            return
        self._recorded.__exit__(*reason)
        now = peak = 0
        for event in self._recorded.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
            if event.name() == "[memory]":
                now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
                peak = max(peak, now)
        self.mib = peak / MIB


def peak_mib(run: Run, device: str) -> float:
    """Peak of a run, MiB (see `Peak`)."""
    with Peak(device) as peak:
        run()
    return peak.mib
