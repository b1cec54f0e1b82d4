"""One benchmark from its plan to its files: JSON, figure, comparison with a baseline, and what is said at the end."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdpo.files import write_atomic

from . import baseline
from .arguments import CASES, MEMORY_MIB, UsageError
from .dpo_loss import cases as pairs
from .dpo_loss import peers as dpo_peers
from .largest import free_mib
from .linear_logprob import cases, peers, real
from .measure import conditions
from .measure.entries import Entry, Factory, found
from .measure.timing import Budget, Timer
from .record import Report
from .session import SETTINGS, Case, Settings, run_cases
from .show import plot, sentences
from .show.terminal import over_trl, summary
from .train_step import cases as train_cases

SUMMARY_TOKENS = 4096
# endings of reasons that are no failure
BENIGN = ("the default's own path", "no time left", "out of memory", train_cases.NO_ROOM)
TRAIN_ROUNDS = 5


def run(given: argparse.Namespace, before: dict[str, Any] | None, command: str) -> int:
    """Measures what is asked for; `before` is the record of --baseline. Exit code as `bench.run.main`.

    Raises:
        UsageError: it cannot be measured here, or not be compared.
    """
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if given.threads:
        torch.set_num_threads(given.threads)
    settings = SETTINGS[device]
    most = given.rounds or (3 if given.quick else settings.rounds.most)
    settings = replace(settings, rounds=replace(settings.rounds, most=most))
    if given.minutes is not None:
        settings = replace(settings, minutes=given.minutes)
    if given.tune:
        from .linear_logprob.tune import tune

        return tune(settings.rounds, Timer(device), Budget(settings.minutes), command)

    names = given.cases or ([before["case"]] if before else list(CASES))
    if before and set(names) != {before["case"]}:
        raise UsageError(f"--baseline {given.baseline} holds {before['case']}: measure that case alone with it")
    chosen = _entries(names, device, given.entries)
    planned = {name: _planned(name, device, given) for name in names}
    return max(
        _benchmark(name, planned[name], chosen[name], device, settings, given, before, command) for name in chosen
    )


def _entries(names: Sequence[str], device: str, wanted: Sequence[str] | None) -> dict[str, dict[str, Entry]]:
    """The entries of each case; of those asked for, what the case has. A case that has none of them is left out."""
    factories = {name: _factories(name) for name in names}
    known = list(dict.fromkeys(factory.name for made in factories.values() for factory in made))
    unknown = [entry for entry in wanted or () if entry not in known]
    if unknown:
        raise UsageError(f"--entries: no entry is named {unknown[0]!r}; choose from {', '.join(known)}")
    chosen = {}
    for name, made in factories.items():
        has = {factory.name for factory in made}
        asked = None if wanted is None else [entry for entry in wanted if entry in has]
        if asked is None or asked:
            chosen[name] = found(made, device, asked)
    return chosen


def _factories(name: str) -> tuple[Factory, ...]:
    if name == "train_step":
        from .train_step import peers as train_peers  # transformers and peft, only where a trainer is measured

        return train_peers.FACTORIES
    return peers.FACTORIES if name == "linear_logprob" else dpo_peers.FACTORIES


def _planned(name: str, device: str, given: argparse.Namespace) -> list[Case]:
    """The cases of a benchmark, the most important first."""
    if name == "train_step":
        from .train_step.data import kind

        try:
            return list(train_cases.train_cases(device, given.quick, given.model, kind()))
        except ValueError as reason:
            raise UsageError(f"--model {reason}") from reason
    module = cases if name == "linear_logprob" else pairs
    budget = MEMORY_MIB[device, given.quick] if given.memory_budget is None else given.memory_budget
    free = free_mib() if device == "cpu" else None
    if free is not None and budget > free / 8:
        raise UsageError(
            f"--memory_budget {budget:g}: at most an eighth of this machine's free memory, {free / 8:.0f} MiB"
        )
    extra: list[Any] = module.growth_cases(device, given.quick, budget) if budget else []
    if _wants_plot(given):
        extra += module.sweep_cases(device, given.quick)
    if name == "dpo_loss":
        return list(pairs.pair_cases(device, given.quick, extra))
    if given.real is None and device == "cuda" and real.DEFAULT.exists():
        given.real = ""
    try:
        shape = None if given.real is None else real.shape(_activations(given))
    except ValueError as reason:
        raise UsageError(f"--real: {reason}") from reason
    return list(cases.cases(device, given.quick, shape, extra))


def _activations(given: argparse.Namespace) -> Path:
    return Path(given.real) if given.real else real.DEFAULT


def _wants_plot(given: argparse.Namespace) -> bool:
    return given.quick if given.plot is None else given.plot


def _benchmark(
    name: str,
    planned: Sequence[Case],
    entries: dict[str, Entry],
    device: str,
    settings: Settings,
    given: argparse.Namespace,
    before: dict[str, Any] | None,
    command: str,
) -> int:
    environment = conditions.environment(device, command, given.commit)
    if name == "train_step":
        from .train_step.data import TOLD, kind

        environment["data"] = TOLD[kind()]
        if not (given.rounds or given.quick):
            settings = replace(settings, rounds=replace(settings.rounds, most=TRAIN_ROUNDS))
    # a quick run does not take a full one's place
    path = given.out / f"{name}_{device}{'_quick' if given.quick else ''}_{time.strftime('%Y%m%d')}.json"
    if before is not None:
        baseline.check(before, given.baseline, name, environment, [case.name for case in planned])
        if path.resolve() == given.baseline.resolve():
            raise UsageError(f"--baseline {given.baseline} is the file that this run writes: give another --out")
    report = Report(path, name, environment, planned, settings.clock)
    activations = None if given.real is None else _activations(given)
    try:
        run_cases(planned, entries, settings, Timer(device), Budget(settings.minutes), report, activations)
    finally:
        environment["load_average_at_end"] = os.getloadavg()[0]
        report.write()
    _print_end(report, device, settings)
    record = report.record()
    if _wants_plot(given) and plot.can_draw(record):
        write_atomic(path.with_suffix(".png"), plot.draw(record))
        print(f"written: {path.with_suffix('.png')}")
    failed = _failed(report)
    if before is not None:
        verdict = baseline.compare(before, record, str(given.baseline), given.threshold)
        print(verdict.text)
        failed = failed or bool(verdict.behind)
    return int(failed)


def _failed(report: Report) -> bool:
    """Whether an entry of ours, or a whole case, has no result for another reason than time or memory."""
    ours = (m for m in report.unmeasured() if not m.entry or m.entry.startswith("fastdpo"))
    return any(not m.reason.endswith(BENIGN) for m in ours)


def _print_end(report: Report, device: str, settings: Settings) -> None:
    found = summary(report)
    if device == "cpu" and found:
        base = "what is there at rest" if report.case == "train_step" else "the inputs"
        print(f"\n{report.case}: {settings.clock.removesuffix('_ms')} time and peak memory above {base}\n{found}")
    over = over_trl(report, SUMMARY_TOKENS)
    if device == "cuda" and over:
        print(f"\n{SUMMARY_TOKENS} tokens\n{over}")
    print(f"\n{sentences.conditions(report.environment)}; up to {settings.rounds.most} interleaved rounds.")
    if told := sentences.on_a_cpu(report.record()):
        print(told)
    unmeasured = [m for m in report.unmeasured() if m.reason != "the default's own path"]
    if unmeasured:
        print("\nnot measured:", *(f"  {m}" for m in unmeasured), sep="\n")
    if report.path is not None:
        print(f"written: {report.path}")
