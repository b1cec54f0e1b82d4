"""Measures one case: every entry against fp64 first, then those that pass, interleaved."""

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdpo.ops.oracle import Truth, passes

from .bounds import Work
from .comparison import AnyCase, Comparison
from .entries import Entry
from .faults import attempt
from .missing import NO_TIME, SAME_PATH, WRONG, Missing
from .timing import Budget, Rounds, Timer, interleaved, peak_mib
from .traffic import Traffic


@dataclass
class Row:
    """One entry on one case. Times in milliseconds, memory in MiB above the inputs (gradients included)."""

    case: str
    entry: str
    version: str
    error: dict[str, float]  # largest absolute error against fp64 on the same operands
    row_errors: dict[str, float | None] = field(default_factory=dict)  # relative, of sampled rows of dh
    times: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    predicted_peak_mib: float | None = None
    work: Work | None = None
    tokens: int = 0  # scored
    moved: float | None = None  # bytes: of the operators on a CPU (`Traffic`), of the tiles elsewhere (`Work`)
    bounded: bool = True  # the work's bytes go through device memory; on a CPU they may stay in its cache
    ceilings: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times)

    @property
    def bound_ms(self) -> float | None:
        if self.work is None or not self.bounded:
            return None
        return self.work.bound_ms(self.ceilings.get("gemm_tflops"), self.ceilings.get("copy_gbs"))

    def timings(self) -> dict[str, float]:
        return {
            "best_ms": min(self.times),
            "median_ms": self.median_ms,
            "p20_ms": quantile(self.times, 0.2),
            "p80_ms": quantile(self.times, 0.8),
            "rounds": len(self.times),
        }

    def summary(self) -> dict[str, Any]:
        median = self.median_ms
        flops = self.work.flops if self.work else 0.0
        gemm, copy, bound = self.ceilings.get("gemm_tflops"), self.ceilings.get("copy_gbs"), self.bound_ms
        gbs = self.moved / median / 1e6 if self.moved else None
        return {
            "case": self.case,
            "entry": self.entry,
            "version": self.version,
            "error": self.error,
            "row_errors": self.row_errors,
            "tokens": self.tokens,
            "peak_mib": self.peak_mib,
            "tflop": flops / 1e12,
            "predicted_peak_mib": self.predicted_peak_mib,
            **self.timings(),
            "tflops": flops / median / 1e9 if flops else None,
            "path": self.work.path if self.work else "",
            "flop": flops,
            "tile_bytes": self.work.tile_bytes if self.work and self.bounded else None,
            "bytes": self.moved,
            "gbs": gbs,
            "copy_share": gbs / copy if gbs and copy else None,
            "gemm_share": flops / median / 1e9 / gemm if flops and gemm else None,
            "bound_ms": bound,
            "bound_share": bound / median if bound else None,
            **{name: self.ceilings.get(name) for name in ("gemm_tflops", "gemm_fp32_out_tflops", "copy_gbs")},
        }


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def measure_case(
    case: AnyCase,
    comparison: Comparison,
    entries: Mapping[str, Entry],
    rounds: Rounds,
    timer: Timer,
    budget: Budget,
    ceilings: Mapping[str, float | None],
) -> tuple[list[Row], list[Missing]]:
    """The rows of one case, and every entry that has none."""
    truth, failure = attempt(lambda: comparison.truth)
    by_eager, failure = attempt(lambda: comparison.eager_errors) if truth is not None else (None, failure)
    if truth is None or by_eager is None:
        return [], [Missing(case.name, "", f"nothing to check against: {failure}")]

    rows: dict[str, Row] = {}
    missing: dict[str, str] = {}
    check = functools.partial(_checked, case, comparison, truth, by_eager, timer, rows)
    for entry in entries.values():
        row, reason = (None, NO_TIME) if budget.over else check(entry)
        if row is None:
            missing[entry.name] = reason
        else:
            row.ceilings = ceilings
            rows[entry.name] = row

    runs = {key: functools.partial(comparison.step, entries[key], case.mode) for key in rows}
    times, failed = interleaved(runs, rounds, timer, lambda: budget.over)
    missing |= failed
    for key, taken in times.items():
        rows[key].times = taken
        if not taken:
            missing[key] = NO_TIME
    measured = [row for row in rows.values() if row.times]
    return measured, [Missing(case.name, key, missing[key]) for key in entries if key in missing]


def _checked(
    case: AnyCase,
    comparison: Comparison,
    truth: Truth,
    by_eager: dict[str, float],
    timer: Timer,
    rows: Mapping[str, Row],
    entry: Entry,
) -> tuple[Row | None, str]:
    """The entry's row without its times, or why it has none; `rows` are those before it."""
    reason = entry.obstacle(case.dtype, comparison.softcap)
    if reason is not None:
        return None, reason
    planned, reason = attempt(lambda: comparison.work(entry, case.mode))
    if planned is None:
        return None, reason
    if entry.settings and any(row.work == planned[0] for row in rows.values()):
        return None, SAME_PATH  # a forced form of ours

    moved = None if planned[0] is None else planned[0].tile_bytes

    def run() -> tuple[dict[str, float], dict[str, float | None]]:
        nonlocal moved
        if timer.device == "cpu":
            with Traffic() as traffic:
                outputs = comparison.step(entry, case.mode)
            moved = float(traffic.bytes)
        else:
            outputs = comparison.step(entry, case.mode)
        timer.wait()
        return truth.errors(outputs), truth.row_errors(outputs)

    errors, reason = attempt(run)
    if errors is None:
        return None, reason
    error, row_errors = errors
    if not passes(error, by_eager):
        return None, f"({entry.version}) {WRONG}, not timed: {error}, eager {by_eager}"
    peak, reason = attempt(lambda: peak_mib(lambda: comparison.step(entry, case.mode), timer.device))
    if peak is None:
        return None, reason
    work, predicted = planned
    row = Row(case.name, entry.name, entry.version, error, row_errors, peak_mib=peak, work=work)
    row.predicted_peak_mib, row.tokens, row.moved = predicted, comparison.tokens, moved
    row.bounded = timer.device != "cpu"
    return row, ""
