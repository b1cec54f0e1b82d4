"""The largest N (scored tokens) whose step fits a budget of memory, found by running it.

Memory is the peak above the inputs, gradients included, as everywhere in the suite. Sizes are doubled until the peak
is `MARGIN` times the budget (a path may change with N, so a larger N can need less), then the gap above the largest
size that fits is halved. Both ends of what is reported have been run: N fits, the next size does not. The answer at
N is checked against fp64 on a sample.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.ops.oracle import passes

from .linear_logprob.cases import Growth
from .measure.comparison import Comparison
from .measure.entries import Entry
from .measure.faults import attempt
from .measure.missing import NO_TIME, OUT_OF_MEMORY, WRONG, Missing
from .measure.timing import Budget, Timer, peak_mib

MARGIN = 4
STEPS = 16  # N is found to one part in so many


@dataclass
class Fit:
    """One entry's largest N and its peak; the smallest size seen above it that does not fit (None: none was tried).

    n is 0 where nothing fits; `next_peak_mib` None: it ran out of memory.
    """

    case: str
    entry: str
    version: str
    n: int = 0
    peak_mib: float | None = None
    next_n: int | None = None
    next_peak_mib: float | None = None
    error: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        return dict(vars(self))


def search(peak_of: Callable[[int], float], budget: float, most: int, stop: float) -> dict[int, float]:
    """Peaks by size, of every size that was tried: doubled from 1 to `most` (a power of two) while the peak is at most
    `stop`, then halved between the largest that fits and the next."""
    peaks: dict[int, float] = {}
    size = 1
    while size <= most:
        peaks[size] = peak_of(size)
        if peaks[size] > stop:
            break
        size *= 2
    low, high = around(peaks, budget)
    while low and high and high - low > max(1, low // STEPS):
        middle = (low + high) // 2
        peaks[middle] = peak_of(middle)
        low, high = around(peaks, budget)
    return peaks


def around(peaks: Mapping[int, float], budget: float) -> tuple[int, int | None]:
    """The largest size that fits (0: none), and the next one that was tried."""
    low = max((size for size, peak in peaks.items() if peak <= budget), default=0)
    return low, min((size for size in peaks if size > low), default=None)


class _NoFit(Exception):
    """Why an entry has no largest N."""


def measure_growth(
    case: Growth, base: Comparison, entries: Mapping[str, Entry], timer: Timer, budget: Budget
) -> tuple[list[Fit], list[Missing]]:
    """The entries' fits, and every entry that has none; forced forms of ours are left out."""
    fits, missing = [], []
    for entry in entries.values():
        if entry.settings:
            continue
        try:
            fits.append(_fit(case, base, entry, timer, budget))
        except _NoFit as reason:
            missing.append(Missing(case.name, entry.name, str(reason)))
    return fits, missing


def _fit(case: Growth, base: Comparison, entry: Entry, timer: Timer, budget: Budget) -> Fit:
    obstacle = entry.obstacle(case.dtype, None)
    if obstacle is not None:
        raise _NoFit(obstacle)
    tokens: dict[int, int] = {}

    def run(size: int) -> float:
        comparison = base.grown(size)
        tokens[size] = comparison.tokens
        return peak_mib(lambda: comparison.step(entry, case.mode), timer.device)

    def peak_of(size: int) -> float:
        if budget.over:
            raise _NoFit(NO_TIME)
        peak, reason = attempt(lambda: run(size))
        if peak is None and (reason != OUT_OF_MEMORY or size not in tokens):
            raise _NoFit(reason)
        return math.inf if peak is None else peak

    peaks = search(peak_of, case.budget_mib, case.most_units, _stop(case.budget_mib, timer.device))
    low, high = around(peaks, case.budget_mib)
    fit = Fit(case.name, entry.name, entry.version)
    if high is not None:
        fit.next_n, fit.next_peak_mib = tokens[high], None if peaks[high] == math.inf else peaks[high]
    if low:
        fit.n, fit.peak_mib = tokens[low], peaks[low]
        error, reason = attempt(lambda: _checked(case, base.grown(low), entry))
        if error is None:
            raise _NoFit(f"N = {fit.n}: {reason}")
        fit.error = error
    return fit


def _checked(case: Growth, comparison: Comparison, entry: Entry) -> dict[str, float]:
    """Errors of a sample of the answer.

    Raises:
        RuntimeError: it is wrong.
    """
    sample, outputs = comparison.sample(comparison.step(entry, case.mode))
    error = sample.truth.errors(outputs)
    if not passes(error, sample.eager_errors):
        raise RuntimeError(f"({entry.version}) {WRONG}: {error}")
    return error


def free_mib() -> float | None:
    """Memory that this machine can still give, MiB; None where it does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _stop(budget: float, device: str) -> float:
    """Peak MiB after which no larger size is tried; on a CPU the next one, up to twice that, must not fill memory."""
    free = free_mib() if device == "cpu" else None
    return MARGIN * budget if free is None else min(MARGIN * budget, free / 4)
