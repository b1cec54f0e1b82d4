"""Measures the op against its peers, in one command:

    python -m bench.run linear_logprob --device cuda --out DIR
    python -m bench.run dpo_loss --device cuda --out DIR
    python -m bench.run linear_logprob --device cuda --tune

Each entry is checked against fp64 first and left out of the timing if it fails; then all entries run interleaved, one
of each per round, in one process. Cases run in order of importance until the time is used up; what was not measured
is named. Prints a table per case and, with --out, writes one JSON after every case, with every number's conditions.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import cases, conditions, dpo_peers, pairs, peers, real
from bench.entries import found
from bench.report import Report, over_trl
from bench.session import SETTINGS, Case, run_cases
from bench.timing import Budget, Timer

SUMMARY_TOKENS = 4096
# endings of reasons that are no failure
BENIGN = ("the default's own path", "no time left", "out of memory")


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu.")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds: at least 1, got {arguments.rounds}.")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = SETTINGS[arguments.device]
    most = 3 if arguments.quick else arguments.rounds or settings.rounds.most
    settings = replace(settings, rounds=replace(settings.rounds, most=most))
    budget = Budget(settings.minutes if arguments.minutes is None else arguments.minutes)
    command = "python -m bench.run " + " ".join(sys.argv[1:] if argv is None else argv)
    if arguments.tune:
        from bench.tune import tune

        return tune(settings.rounds, Timer(arguments.device), budget, command)

    factories = peers.FACTORIES if arguments.case == "linear_logprob" else dpo_peers.FACTORIES
    try:
        planned = _planned(arguments)
        entries = found(factories, arguments.device, arguments.entries)
    except ValueError as reason:
        parser.error(str(reason))
    environment = conditions.environment(arguments.device, command, arguments.commit)
    path = None
    if arguments.out:
        path = arguments.out / f"{arguments.case}_{arguments.device}_{time.strftime('%Y%m%d')}.json"
    report = Report(path, arguments.case, environment, planned)
    try:
        run_cases(planned, entries, settings, Timer(arguments.device), budget, report, arguments.real)
    finally:
        environment["load_average_at_end"] = os.getloadavg()[0]
        report.write()
    _print_end(report, arguments.device, settings.clock, most)
    return int(_failed(report))


def _failed(report: Report) -> bool:
    """Whether an entry of ours, or a whole case, has no result for another reason than time or memory."""
    ours = (m for m in report.unmeasured() if not m.entry or m.entry.startswith("fastdpo"))
    return any(not m.reason.endswith(BENIGN) for m in ours)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measures the op against its peers.")
    parser.add_argument("case", choices=["linear_logprob", "dpo_loss"], help="what is measured")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 8 on a CPU, up to 20 on a GPU)")
    parser.add_argument(
        "--minutes", type=float, help="no new work after that long (default 8 on a GPU, no limit on a CPU)"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest shape only, 3 rounds")
    parser.add_argument("--entries", type=lambda text: text.split(","), help="only these, comma-separated")
    parser.add_argument(
        "--real", type=Path, nargs="?", const=real.DEFAULT, help="activations stored by bench.real, as one more case"
    )
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    parser.add_argument("--tune", action="store_true", help="sweep the Triton GEMM's configurations instead")
    return parser


def _planned(arguments: argparse.Namespace) -> Sequence[Case]:
    if arguments.case == "dpo_loss":
        return pairs.pair_cases(arguments.device, arguments.quick)
    if arguments.real is None and arguments.device == "cuda" and real.DEFAULT.exists():
        arguments.real = real.DEFAULT
    shape = None if arguments.real is None else real.shape(arguments.real)
    return cases.cases(arguments.device, arguments.quick, shape)


def _print_end(report: Report, device: str, clock: str, rounds: int) -> None:
    env = report.environment
    print(
        f"\n{env['device']}, {env['threads']} threads, torch {env['torch']}, "
        f"load average {env['load_average_at_start']:.1f} to {env['load_average_at_end']:.1f}; "
        f"{clock.removesuffix('_ms')} of up to {rounds} interleaved rounds."
    )
    if device == "cpu":
        print("On a CPU the trl op folds its tiles in eager torch; on a GPU it does not: no ratio here speaks of one.")
    summary = over_trl(report, SUMMARY_TOKENS)
    if device == "cuda" and summary:
        print(f"\n{SUMMARY_TOKENS} tokens\n{summary}")
    unmeasured = [m for m in report.unmeasured() if m.reason != "the default's own path"]
    if unmeasured:
        print("\nnot measured:", *(f"  {m}" for m in unmeasured), sep="\n")
    if report.path is not None:
        print(f"written: {report.path}")


if __name__ == "__main__":
    raise SystemExit(main())
