"""The cases of a run one after another, until the time is used up, and what is said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastdpo.ops.oracle import peaked_inputs

from .dpo_loss import cases as pairs
from .dpo_loss.step import DPOLosses
from .largest import measure_growth
from .linear_logprob import cases, real
from .linear_logprob.step import Logprobs
from .measure.ceilings import copy_gbs, gemm_tflops
from .measure.comparison import Comparison
from .measure.entries import Entry
from .measure.faults import attempt, device_lost
from .measure.rows import Missing, measure_case
from .measure.timing import Budget, Rounds, Timer
from .record import Report
from .show.terminal import growth_table, table
from .train_step.cases import TrainCase
from .train_step.tables import terminal_table

InputCase = cases.Case | pairs.PairCase | cases.Growth
Case = InputCase | TrainCase
GROWN_FROM = 4096  # tokens that a growing input repeats, or
PAIRS_FROM = 4


@dataclass(frozen=True)
class Settings:
    """A device's defaults. `clock`: what ratios are of."""

    rounds: Rounds
    minutes: float | None
    clock: str


SETTINGS = {
    "cpu": Settings(Rounds(8), None, "best_ms"),
    "cuda": Settings(Rounds(20, slice_ms=400), 8, "median_ms"),
}


class Group:
    """Inputs, and the rates reached on them, of the cases that differ in their mode only."""

    def __init__(self, case: InputCase, timer: Timer, activations: Path | None, copy: float | None) -> None:
        self.key = group_key(case)
        self.comparison, self.failure = attempt(lambda: comparison_of(case, timer.device, activations))
        self.ceilings: Mapping[str, float | None] = {}
        if self.comparison is not None and not isinstance(case, cases.Growth):
            self.ceilings = {"copy_gbs": copy, **gemm_tflops(*self.comparison.operands, timer)}


def group_key(case: InputCase) -> InputCase:
    return replace(case, mode="")


def comparison_of(case: InputCase, device: str, activations: Path | None) -> Comparison:
    """The inputs of a case, on a device; `activations`: the file of real ones."""
    if isinstance(case, cases.Growth):
        if case.length is None:
            inputs = peaked_inputs(GROWN_FROM, case.h, case.v, cases.DTYPES[case.dtype], device)
            return Logprobs(*inputs)
        base = pairs.PairCase(PAIRS_FROM, case.length, case.h, case.v, case.dtype, case.mode)
        return DPOLosses(pairs.Pairs.of(base, device))
    if isinstance(case, pairs.PairCase):
        return DPOLosses(pairs.Pairs.of(case, device))
    if case.inputs == "real":
        assert activations is not None
        return Logprobs(*real.load(activations, case.n, device))
    return Logprobs(*peaked_inputs(case.n, case.h, case.v, cases.DTYPES[case.dtype], device), case.softcap)


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
    copy = copy_gbs(timer)
    group = None
    for case in planned:
        if budget.over:
            report.add(case, [], [Missing(case.name, "", "no time left")])
            continue
        rows, fits, missing, text = [], [], [], ""
        if isinstance(case, TrainCase):
            from .train_step.step import measure_training  # transformers, only where a trainer is measured

            rows, missing = measure_training(case, entries, settings.rounds, timer, budget)
            text = terminal_table(case, rows, missing, settings.clock)
        else:
            if group is None or group.key != group_key(case):
                group = None  # its inputs are freed before the next are made
                group = Group(case, timer, activations, copy)
            if group.comparison is None:
                missing = [Missing(case.name, "", f"no inputs: {group.failure}")]
            elif isinstance(case, cases.Growth):
                fits, missing = measure_growth(case, group.comparison, entries, timer, budget)
                text = growth_table(case, fits, missing)
            else:
                rows, missing = measure_case(
                    case, group.comparison, entries, settings.rounds, timer, budget, group.ceilings
                )
        print(text or table(case, rows, missing, settings.clock), flush=True)
        report.add(case, rows, missing, fits)
        lost = device_lost(timer.device) if missing else None
        if lost:
            print(f"the device is lost: {lost}; leave the entry that did it out with --entries, and run again")
            return
