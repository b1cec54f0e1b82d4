"""The cases of a run one after another, until the time is used up, and what is said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import cases, pairs, real
from bench.ceilings import copy_gbs, gemm_tflops
from bench.comparison import Comparison
from bench.dpo_loss import DPOLosses
from bench.entries import Entry
from bench.faults import attempt, device_lost
from bench.linear_logprob import Logprobs
from bench.measure import Missing, measure_case
from bench.report import Report, table
from bench.timing import Budget, Rounds, Timer

Case = cases.Case | pairs.PairCase


@dataclass(frozen=True)
class Settings:
    """A device's defaults. `clock`: what ratios are of; `ceilings`: rates are measured and bounds reported."""

    rounds: Rounds
    minutes: float | None
    clock: str
    ceilings: bool


SETTINGS = {
    "cpu": Settings(Rounds(8), None, "best_ms", ceilings=False),
    "cuda": Settings(Rounds(20, slice_ms=400), 8, "median_ms", ceilings=True),
}


class Group:
    """Inputs, and the rates reached on them, of the cases that differ in their mode only."""

    def __init__(self, case: Case, timer: Timer, activations: Path | None, copy: float | None) -> None:
        self.key = replace(case, mode="")
        self.comparison, self.failure = attempt(lambda: _comparison(case, timer.device, activations))
        self.ceilings: Mapping[str, float | None] = {}
        if copy is not None and self.comparison is not None:
            self.ceilings = {"copy_gbs": copy, **gemm_tflops(*self.comparison.operands, timer)}


def _comparison(case: Case, device: str, activations: Path | None) -> Comparison:
    if isinstance(case, pairs.PairCase):
        return DPOLosses(pairs.Pairs.of(case, device))
    if case.inputs == "real":
        assert activations is not None
        return Logprobs(*real.load(activations, case.n, device))
    return Logprobs(*cases.peaked_inputs(case.n, case.h, case.v, cases.DTYPES[case.dtype], device), case.softcap)


def run_cases(
    planned: Sequence[Case],
    entries: Mapping[str, Entry],
    settings: Settings,
    timer: Timer,
    budget: Budget,
    report: Report,
    activations: Path | None = None,
) -> None:
    """Measures the cases in their order, printing and writing each when it is done."""
    copy = copy_gbs(timer) if settings.ceilings else None
    group = None
    for case in planned:
        if budget.over:
            report.add(case, [], [Missing(case.name, "", "no time left")])
            continue
        if group is None or group.key != replace(case, mode=""):
            group = None  # its inputs are freed before the next are made
            group = Group(case, timer, activations, copy)
        if group.comparison is None:
            rows, missing = [], [Missing(case.name, "", f"no inputs: {group.failure}")]
        else:
            rows, missing = measure_case(
                case, group.comparison, entries, settings.rounds, timer, budget, group.ceilings
            )
        print(table(case, rows, missing, settings.clock), flush=True)
        report.add(case, rows, missing)
        lost = device_lost(timer.device) if missing else None
        if lost:
            print(f"the device is lost: {lost}; leave the entry that did it out with --entries, and run again")
            return
