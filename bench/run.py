"""Measures the op against its peers: `python -m bench.run linear_logprob --device cpu`.

Each entry is checked against fp64 first and left out of the timing if it fails; then all entries run interleaved, one
of each per round, in one process. Prints a table and, with --out, writes one JSON with every number's conditions.
"""

import argparse
import functools
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch

from bench import cases, measure, peers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measures the op against its peers.")
    parser.add_argument("case", choices=["linear_logprob"], help="what is measured")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=8, help="interleaved rounds (default 8)")
    parser.add_argument("--quick", action="store_true", help="the smallest shape only, 3 rounds")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu.")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rounds = 3 if arguments.quick else arguments.rounds
    command = "python -m bench.run " + " ".join(sys.argv[1:] if argv is None else argv)
    environment = measure.environment(arguments.device, command)

    rows: list[measure.Row] = []
    refused: list[str] = []
    for case in cases.cases(arguments.device, arguments.quick):
        found, left_out = run_case(case, arguments.device, rounds)
        rows += found
        refused += left_out
        print_case(case, found)
    environment["load_average_at_end"] = os.getloadavg()[0]
    print(
        f"\n{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"load average {environment['load_average_at_start']:.1f} to {environment['load_average_at_end']:.1f}; "
        f"best of {rounds} interleaved rounds."
    )
    if arguments.device == "cpu":
        print("On a CPU the trl op folds its tiles in eager torch; on a GPU it does not: no ratio here speaks of one.")
    for line in refused:
        print(line)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"{arguments.case}_{arguments.device}_{time.strftime('%Y%m%d')}.json"
        record = {"environment": environment, "rows": [row.summary() for row in rows], "refused": refused}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written: {path}")
    return 0


def run_case(case: cases.Case, device: str, rounds: int) -> tuple[list[measure.Row], list[str]]:
    """The rows of one case, and a line for every entry that failed the oracle."""
    known = peers.entries()
    by_eager = measure.errors(known["eager"][0], case, device)
    rows: dict[str, measure.Row] = {}
    refused = []
    for name, (entry, version) in known.items():
        error = measure.errors(entry, case, device)
        if measure.passes(error, by_eager):
            rows[name] = measure.Row(case.name, name, version, error)
        else:
            refused.append(f"{case.name}: {name} ({version}) failed the oracle, not timed: {error}, eager {by_eager}")
    inputs = cases.peaked_inputs(case.n, case.h, case.v, cases.DTYPES[case.dtype], device)
    runs = {name: functools.partial(measure.step, known[name][0], inputs, case.mode) for name in rows}
    for name, times in measure.interleaved(runs, rounds, device).items():
        rows[name].times = times
        rows[name].peak_mib = measure.peak_mib(runs[name], device)
        rows[name].tflop = gemm_tflop(name, case)
    if "fastdpo" in rows:
        plan = own_plan(inputs, case.mode)
        rows["fastdpo"].tflop = plan.flops / 1e12
        rows["fastdpo"].predicted_peak_mib = plan.peak_bytes / measure.MIB
    return list(rows.values()), refused


def own_plan(inputs, mode: str):
    from fastdpo.ops.linear_logprob import linear_logprob_plan

    hidden, weight, labels = inputs
    with torch.set_grad_enabled(mode != "forward"):
        return linear_logprob_plan(
            hidden.detach().requires_grad_(mode != "forward"), weight.detach().requires_grad_(mode == "trained"), labels
        )


def gemm_tflop(name: str, case: cases.Case) -> float:
    """Units of 2NHV that the algorithm needs: eager keeps its logits, TRL makes them again in the backward."""
    products = {
        "eager": {"forward": 1, "frozen": 2, "trained": 3},
        "trl": {"forward": 1, "frozen": 3, "trained": 4},
    }
    return products.get(name, {}).get(case.mode, 0) * 2 * case.n * case.h * case.v / 1e12


def print_case(case: cases.Case, rows: list[measure.Row]) -> None:
    own = next((row for row in rows if row.entry == "fastdpo"), None)
    print(f"\n{case.name}")
    print(f"  {'':10}{'best ms':>9}{'median':>9}{'p20-p80':>15}{'peak MiB':>10}{'TF/s':>7}{'logp err':>10}  vs")
    for row in rows:
        s = row.summary()
        ratio = f"{min(row.times) / min(own.times):5.2f} x" if own and row is not own else ""
        spread = f"{s['p20_ms']:.0f}-{s['p80_ms']:.0f}"
        print(
            f"  {row.entry:10}{s['best_ms']:9.1f}{s['median_ms']:9.1f}{spread:>15}{row.peak_mib:10.1f}"
            f"{s['tflops'] or 0:7.2f}{row.error['logp']:10.1e}  {ratio}"
        )
    if own and own.predicted_peak_mib is not None:
        print(f"  predicted peak {own.predicted_peak_mib:.1f} MiB")


if __name__ == "__main__":
    raise SystemExit(main())
