"""Measures `train_step`: trainers that were seen to compute the same losses, interleaved round by round.

Every trainer's first epoch is checked against TRL's, step by step, with the same start, pairs, order and arguments;
its steps also count host reads and give the peak of memory. The later epochs, of the same pairs, are the rounds.
"""

import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers

from ..measure.entries import Entry, make_entries
from ..measure.faults import attempt
from ..measure.missing import NO_ROOM, NO_TIME, WRONG, Missing
from ..measure.rows import Row
from ..measure.timing import MIB, Budget, Peak, Rounds, Timer, interleaved
from . import peers
from .cases import YARDSTICK, TrainCase
from .counts import positions, resting_bytes, waits
from .data import PairRows, make_pairs
from .peers import Models, Setup
from .turns import StepByStep

# what is compared: of the loss and the rewards' margin the difference, of log-probs the difference over their size
COMPARED = {"loss": "loss", "margin": "rewards/margins", "logp": "logps/chosen", "logp rejected": "logps/rejected"}
RELATIVE = ("logp", "logp rejected")
# sums over hundreds of tokens in fp32, and with hidden states in bf16; in fp32 2 % of beta is more (a test)
TOLERANCES = {
    "fp32": {"loss": 2e-4, "margin": 4e-4, "logp": 1e-5, "logp rejected": 1e-5},
    "bf16": {"loss": 2e-2, "margin": 4e-2, "logp": 1e-3, "logp rejected": 1e-3},
}
NO_YARDSTICK = "nothing to check against"
MOVED = 10  # times its tolerance, which the yardstick's margin has to reach: else nothing is checked
START = math.log(2)  # of a loss whose policy is its reference

Logs = list[dict[str, float]]


@dataclass
class TrainRow(Row):
    """One trainer on one case. Times in milliseconds of a step; `peak_mib` above `resting_mib`, which is the weights,
    the reference and the optimizer's state. `error`: the largest of the checked epoch, against TRL's."""

    pairs: int = 0
    resting_mib: float = 0.0
    positions: float = 0.0  # token positions a step, padding included, through policy and reference
    host_reads: int = 0  # of a step
    batches: str = ""  # the layout that our trainer says it chose
    losses: list[float] = field(default_factory=list)  # of the checked steps
    margins: list[float] = field(default_factory=list)
    tolerance: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "entry": self.entry,
            "version": self.version,
            "error": self.error,
            "tolerance": dict(self.tolerance),
            "losses": self.losses,
            "margins": self.margins,
            **self.timings(),
            "pairs_per_s": 1e3 * self.pairs / self.median_ms,
            "best_pairs_per_s": 1e3 * self.pairs / min(self.times),
            "peak_mib": self.peak_mib,
            "resting_mib": self.resting_mib,
            "positions": self.positions,
            "host_reads": self.host_reads,
            "batches": self.batches,
        }


class Trained:
    """An entry's trainer between its turns.

    Attributes:
        logs: of each step of the first epoch, once `first_epoch` has run.
    """

    def __init__(
        self, case: TrainCase, entry: Entry, models: Models, pairs: PairRows, arguments: dict[str, Any]
    ) -> None:
        self.case, self.entry = case, entry
        policy, reference = self._models = models.policy(), models.reference()
        setup = Setup(policy, reference, models.adapter(), pairs.rows, pairs.tokenizer, arguments)
        with entry.applied():
            self.steps = StepByStep(entry.run(setup))
        self.logs = self.steps.logs

    def first_epoch(self, timer: Timer) -> TrainRow:
        """One row without its times and its errors."""
        case, device, counter = self.case, timer.device, waits(timer.device)
        peaks: list[Peak] = []

        def peak() -> Peak:
            peaks.append(Peak(device))
            return peaks[-1]

        with self.entry.applied(), positions(self._models) as seen:
            self.steps.start()
            # the optimizer makes its state in the first step
            self.steps.take(1, lambda: counter)
            resting = resting_bytes(self._models, self.steps.trainer.optimizer) / MIB
            self.steps.take(case.steps - 1, peak)
        self.steps.log_every_step = False
        timer.wait()
        row = TrainRow(case.name, self.entry.name, self.entry.version, {}, peak_mib=max(p.mib for p in peaks))
        row.pairs, row.resting_mib, row.bounded = case.pairs, resting, device != "cpu"
        row.positions, row.host_reads = sum(seen) / case.steps, counter.count
        row.batches = getattr(self.steps.trainer, "layout_description", "")
        row.losses = [log["loss"] for log in self.logs]
        row.margins = [log["rewards/margins"] for log in self.logs]
        row.tolerance = TOLERANCES[case.dtype]
        return row

    def epoch(self) -> None:
        with self.entry.applied():
            self.steps.take(self.case.steps)


def measure_training(
    case: TrainCase, entries: Mapping[str, Entry], rounds: Rounds, timer: Timer, budget: Budget
) -> tuple[list[Row], list[Missing]]:
    """One row per entry that computes what TRL's trainer does, and every entry that has none.

    rounds: all entries have the same number of them, so that they train on the same batches.
    """
    with ExitStack() as cleanup:
        cleanup.enter_context(_quiet())
        with Peak(timer.device):
            pass  # the profiler is to be started first by the thread that loaded it
        yardstick = entries.get(YARDSTICK) or make_entries(peers.FACTORIES, timer.device, [YARDSTICK]).get(YARDSTICK)
        inputs, failure = attempt(lambda: _inputs(case, timer.device))
        if inputs is None or yardstick is None:
            reason = f"no inputs: {failure}" if inputs is None else f"{NO_YARDSTICK}: {YARDSTICK} is not here"
            return [], [Missing(case.name, "", reason)]
        folder = cleanup.enter_context(tempfile.TemporaryDirectory())
        arguments = peers.arguments(case, timer.device, case.steps * (rounds.most + 2) + 1, folder)
        trained: dict[str, Trained] = {}
        missing: dict[str, str] = {}
        cleanup.callback(lambda: [trainer.steps.end() for trainer in trained.values()])
        others = [entry for entry in entries.values() if entry.name != YARDSTICK]
        # all are made before one runs: accelerate's state is one for the process, and is made anew with each
        for entry in (yardstick, *others):
            if case.entries and entry.name not in case.entries:
                missing[entry.name] = NO_ROOM
                continue
            # one run in a folder at a time, and all of them train by turns
            own = {**arguments, "output_dir": str(Path(folder, entry.name))}
            trainer, reason = attempt(partial(Trained, case, entry, *inputs, own))
            if trainer is None:
                missing[entry.name] = reason
            else:
                trained[entry.name] = trainer
        del inputs
        rows = _checked(trained, timer, budget, missing)
        if YARDSTICK not in rows:
            reason = missing.get(YARDSTICK, "")
            whole = reason if reason == NO_TIME else f"{NO_YARDSTICK}: {YARDSTICK}: {reason}"
            return [], [Missing(case.name, "", whole)]
        runs = {name: trained[name].epoch for name in entries if name in rows}
        each = Rounds(rounds.most)
        times, failed = interleaved(runs, each, timer, lambda: budget.over, warm_up=timer.device == "cuda")
        missing |= failed
        for name, taken in times.items():
            rows[name].times = [ms / case.steps for ms in taken]
            if not taken:
                missing[name] = NO_TIME
        measured: list[Row] = [rows[name] for name in entries if times.get(name)]
        return measured, [Missing(case.name, name, missing[name]) for name in entries if name in missing]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of what the trainers use."""
    shown, level = not datasets.are_progress_bars_disabled(), transformers.logging.get_verbosity()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _inputs(case: TrainCase, device: str) -> tuple[Models, PairRows]:
    pairs = make_pairs(case.inputs, case.pairs * case.steps, case.length, case.folder)
    return Models(case, device), pairs


def _checked(trained: dict[str, Trained], timer: Timer, budget: Budget, missing: dict[str, str]) -> dict[str, TrainRow]:
    """The rows of the entries that are right, and in `missing` why others have none; the yardstick stands first."""
    rows: dict[str, TrainRow] = {}
    if YARDSTICK not in trained:
        return rows
    expected = trained[YARDSTICK].logs
    for name, trainer in list(trained.items()):
        row, reason = (None, NO_TIME) if budget.over else attempt(partial(trainer.first_epoch, timer))
        if row is not None:
            reason = fault(row, trainer.logs, expected)
        if row is None or reason:
            missing[name] = reason
            trained.pop(name).steps.end()
            if name == YARDSTICK:
                break
        else:
            rows[name] = row
    return rows


def fault(row: TrainRow, logs: Logs, expected: Logs) -> str:
    """Why a trainer is not timed, or "". Its errors go into the row.

    logs, expected: its steps', and the yardstick's. The loss of the first step is that of two policies that are one.
    """
    margin = max(abs(log[COMPARED["margin"]]) for log in expected)
    if not margin >= MOVED * row.tolerance["margin"]:
        return f"its rewards moved by {margin:.1e} only"
    row.error = {
        name: max(
            _difference(log[key], right[key], name in RELATIVE) for log, right in zip(logs, expected, strict=True)
        )
        for name, key in COMPARED.items()
    }
    row.error["loss"] = max(row.error["loss"], abs(logs[0]["loss"] - START))
    # as it is written, a NaN is not within
    if all(row.error[name] <= limit for name, limit in row.tolerance.items()):
        return ""
    losses, theirs = ([round(log["loss"], 5) for log in steps] for steps in (logs, expected))
    errors = ", ".join(f"{name} {error:.1e} (at most {row.tolerance[name]:.0e})" for name, error in row.error.items())
    return f"FAULT: ({row.version}) {WRONG}, not timed: {errors}; losses {losses}, {YARDSTICK}'s {theirs}"


def _difference(value: float, expected: float, relative: bool) -> float:
    difference = abs(value - expected) / (abs(expected) or 1.0) if relative else abs(value - expected)
    return difference if math.isfinite(difference) else math.inf
