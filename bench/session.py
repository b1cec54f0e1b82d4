"""The cases of a run one after another, until the time is used up, and what is said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .dpo_loss.cases import PairCase
from .dpo_loss.step import LossComparison
from .largest import measure_growth
from .linear_logprob.cases import Growth, LogprobCase
from .linear_logprob.step import LogprobComparison
from .measure.ceilings import copy_gbs, gemm_tflops
from .measure.comparison import Comparison
from .measure.entries import Entry
from .measure.faults import attempt, device_lost
from .measure.missing import NO_TIME, Missing
from .measure.rows import measure_case
from .measure.timing import Budget, Rounds, Timer
from .record import RunRecord
from .show.terminal import growth_table, table
from .train_step.cases import TrainCase
from .train_step.tables import terminal_table

InputCase = LogprobCase | PairCase | Growth
Case = InputCase | TrainCase


@dataclass(frozen=True)
class Settings:
    """A device's defaults. `clock`: the time that ratios are made of."""

    rounds: Rounds
    minutes: float | None
    clock: str


SETTINGS = {
    "cpu": Settings(Rounds(8), None, "best_ms"),
    "cuda": Settings(Rounds(20, slice_ms=400), 8, "median_ms"),
}


class SharedInputs:
    """Inputs of the cases that differ in their mode only, and the rates that are reached on them."""

    def __init__(self, case: InputCase, timer: Timer, activations: Path | None, copy: float | None) -> None:
        self.of = without_mode(case)
        self.comparison, self.failure = attempt(lambda: comparison_of(case, timer.device, activations))
        self.ceilings: Mapping[str, float | None] = {}
        if self.comparison is not None and not isinstance(case, Growth):
            self.ceilings = {"copy_gbs": copy, **gemm_tflops(*self.comparison.operands, timer)}


def without_mode(case: InputCase) -> InputCase:
    return replace(case, mode="")


def comparison_of(case: InputCase, device: str, activations: Path | None) -> Comparison:
    """The inputs of a case, on a device; `activations`: the file of a model's own."""
    if isinstance(case, PairCase) or (isinstance(case, Growth) and case.length is not None):
        return LossComparison.of(case, device)
    return LogprobComparison.of(case, device, activations)


def run_cases(
    planned: Sequence[Case],
    entries: Mapping[str, Entry],
    settings: Settings,
    timer: Timer,
    budget: Budget,
    record: RunRecord,
    activations: Path | None = None,
) -> None:
    """Measures the cases in their order, printing and writing each when it is done."""
    copy = copy_gbs(timer)
    inputs = None
    for case in planned:
        if budget.over:
            record.add(case, [], [Missing(case.name, "", NO_TIME)])
            continue
        rows, fits, missing, text = [], [], [], ""
        if isinstance(case, TrainCase):
            from .train_step.step import measure_training  # transformers, only where a trainer is measured

            rows, missing = measure_training(case, entries, settings.rounds, timer, budget)
            text = terminal_table(case, rows, missing, settings.clock)
        else:
            if inputs is None or inputs.of != without_mode(case):
                inputs = None  # freed before the next are made
                inputs = SharedInputs(case, timer, activations, copy)
            if inputs.comparison is None:
                missing = [Missing(case.name, "", f"no inputs: {inputs.failure}")]
            elif isinstance(case, Growth):
                fits, missing = measure_growth(case, inputs.comparison, entries, timer, budget)
                text = growth_table(case, fits, missing)
            else:
                rows, missing = measure_case(
                    case, inputs.comparison, entries, settings.rounds, timer, budget, inputs.ceilings
                )
        print(text or table(case, rows, missing, settings.clock), flush=True)
        record.add(case, rows, missing, fits)
        lost = device_lost(timer.device) if missing else None
        if lost:
            print(f"the device is lost: {lost}; leave the entry that did it out with --entries, and run again")
            return
