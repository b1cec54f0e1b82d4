"""One benchmark from its plan to its files: JSON, figure, comparison with a baseline, and what is said at the end."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastdpo.files import write_atomic

from . import baseline
from .arguments import BENCHMARKS, MEMORY_MIB, UsageError
from .dpo_loss.cases import pair_cases
from .largest import free_mib
from .linear_logprob import real
from .linear_logprob.cases import logprob_cases
from .measure import conditions
from .measure.entries import Entry, Factory, make_entries
from .measure.missing import BENIGN, SAME_PATH
from .measure.timing import Budget, Timer
from .record import RunRecord
from .session import SETTINGS, Case, Settings, run_cases
from .show import plot, sentences
from .show.terminal import over_trl, summary
from .train_step.cases import train_cases

SUMMARY_TOKENS = 4096
QUICK_ROUNDS = 3
TRAIN_ROUNDS = 5


def run(arguments: argparse.Namespace, before: dict[str, Any] | None, command: str) -> int:
    """Measures what is asked for; `before` is the record of --baseline. Exit code as `bench.run.main`.

    Raises:
        UsageError: it cannot be measured here, or not be compared.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.tune:
        from .linear_logprob.tune import tune

        settings = _settings(SETTINGS[device].rounds.most, device, arguments)
        return tune(settings.rounds, Timer(device), Budget(settings.minutes), command)

    benchmarks = arguments.benchmarks or ([before["case"]] if before else list(BENCHMARKS))
    if before and set(benchmarks) != {before["case"]}:
        raise UsageError(f"--baseline {arguments.baseline} holds {before['case']}: measure that case alone with it")
    entries = _entries(benchmarks, device, arguments.entries)
    planned = {name: _planned(name, device, arguments) for name in benchmarks}
    return max(_measure(name, planned[name], entries[name], device, arguments, before, command) for name in entries)


def _settings(rounds: int, device: str, arguments: argparse.Namespace) -> Settings:
    """The device's, with the rounds and minutes that are asked for; `rounds`: the most of a run that is not quick."""
    settings = SETTINGS[device]
    most = arguments.rounds or (QUICK_ROUNDS if arguments.quick else rounds)
    minutes = settings.minutes if arguments.minutes is None else arguments.minutes
    return replace(settings, rounds=replace(settings.rounds, most=most), minutes=minutes)


def _entries(benchmarks: Sequence[str], device: str, names: Sequence[str] | None) -> dict[str, dict[str, Entry]]:
    """The entries of each benchmark; of those named, what it has. A benchmark that has none of them is left out."""
    factories = {benchmark: _factories(benchmark) for benchmark in benchmarks}
    known = list(dict.fromkeys(factory.name for peers in factories.values() for factory in peers))
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise UsageError(f"--entries: no entry is named {unknown[0]!r}; choose from {', '.join(known)}")
    entries = {}
    for benchmark, peers in factories.items():
        here = {factory.name for factory in peers}
        chosen = None if names is None else [name for name in names if name in here]
        if chosen is None or chosen:
            entries[benchmark] = make_entries(peers, device, chosen)
    return entries


def _factories(benchmark: str) -> tuple[Factory, ...]:
    # imported where it is measured: those of train_step need transformers and peft
    return import_module(f".{benchmark}.peers", __package__).FACTORIES


def _planned(benchmark: str, device: str, arguments: argparse.Namespace) -> list[Case]:
    """Its cases, the most important first."""
    if benchmark == "train_step":
        from .train_step.data import kind

        try:
            return list(train_cases(device, arguments.quick, arguments.model, kind()))
        except ValueError as reason:
            raise UsageError(f"--model {reason}") from reason
    budget, sweep = _memory_budget(device, arguments), _wants_plot(arguments)
    if benchmark == "dpo_loss":
        return list(pair_cases(device, arguments.quick, budget, sweep))
    activations = _activations(device, arguments)
    try:
        shape = None if activations is None else real.shape(activations)
    except ValueError as reason:
        raise UsageError(f"--real: {reason}") from reason
    return list(logprob_cases(device, arguments.quick, budget, sweep, shape))


def _memory_budget(device: str, arguments: argparse.Namespace) -> float:
    """MiB, 0 for none."""
    budget = arguments.memory_budget
    if budget is None:
        budget = MEMORY_MIB[device, arguments.quick]
    free = free_mib() if device == "cpu" else None
    if free is not None and budget > free / 8:
        raise UsageError(
            f"--memory_budget {budget:g}: at most an eighth of this machine's free memory, {free / 8:.0f} MiB"
        )
    return budget


def _activations(device: str, arguments: argparse.Namespace) -> Path | None:
    """The file of a model's own: on a GPU also unasked, where it is in its place."""
    if arguments.real is None:
        return real.DEFAULT if device == "cuda" and real.DEFAULT.exists() else None
    return Path(arguments.real) if arguments.real else real.DEFAULT


def _wants_plot(arguments: argparse.Namespace) -> bool:
    return arguments.quick if arguments.plot is None else arguments.plot


def _measure(
    benchmark: str,
    planned: Sequence[Case],
    entries: dict[str, Entry],
    device: str,
    arguments: argparse.Namespace,
    before: dict[str, Any] | None,
    command: str,
) -> int:
    environment = conditions.environment(device, command, arguments.commit)
    rounds = SETTINGS[device].rounds.most
    if benchmark == "train_step":
        from .train_step.data import DESCRIPTIONS, kind

        environment["data"] = DESCRIPTIONS[kind()]
        rounds = TRAIN_ROUNDS
    settings = _settings(rounds, device, arguments)
    # a quick run does not take a full one's place
    path = arguments.out / f"{benchmark}_{device}{'_quick' if arguments.quick else ''}_{time.strftime('%Y%m%d')}.json"
    if before is not None:
        baseline.check(before, arguments.baseline, benchmark, environment, [case.name for case in planned])
        if path.resolve() == arguments.baseline.resolve():
            raise UsageError(f"--baseline {arguments.baseline} is the file that this run writes: give another --out")
    record = RunRecord(path, benchmark, environment, planned, settings.clock)
    activations = _activations(device, arguments)
    try:
        run_cases(planned, entries, settings, Timer(device), Budget(settings.minutes), record, activations)
    finally:
        environment["load_average_at_end"] = os.getloadavg()[0]
        record.write()
    _print_end(record, device, settings)
    now = record.as_dict()
    if _wants_plot(arguments) and plot.can_draw(now):
        write_atomic(path.with_suffix(".png"), plot.draw(now))
        print(f"written: {path.with_suffix('.png')}")
    failed = _failed(record)
    if before is not None:
        verdict = baseline.compare(before, now, str(arguments.baseline), arguments.threshold)
        print(verdict.text)
        failed = failed or bool(verdict.behind)
    return int(failed)


def _failed(record: RunRecord) -> bool:
    """Whether an entry of ours, or a whole case, has no result for another reason than time or memory."""
    ours = (m for m in record.unmeasured() if not m.entry or m.entry.startswith("fastdpo"))
    return any(not m.reason.endswith(BENIGN) for m in ours)


def _print_end(record: RunRecord, device: str, settings: Settings) -> None:
    lines = summary(record)
    if device == "cpu" and lines:
        base = "weights, reference and optimizer" if record.benchmark == "train_step" else "the inputs"
        print(f"\n{record.benchmark}: {settings.clock.removesuffix('_ms')} time and peak memory above {base}\n{lines}")
    over = over_trl(record, SUMMARY_TOKENS)
    if device == "cuda" and over:
        print(f"\n{SUMMARY_TOKENS} tokens\n{over}")
    print(f"\n{sentences.conditions(record.environment)}; up to {settings.rounds.most} interleaved rounds.")
    if sentence := sentences.on_a_cpu(record.as_dict()):
        print(sentence)
    unmeasured = [m for m in record.unmeasured() if m.reason != SAME_PATH]
    if unmeasured:
        print("\nnot measured:", *(f"  {m}" for m in unmeasured), sep="\n")
    if record.path is not None:
        print(f"written: {record.path}")
