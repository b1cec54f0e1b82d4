"""Sweeps the tiles of the kernels that multiply by themselves, and prints rows for kernels/configs.py.

One tile serves an architecture, whatever is asked for (another tile would give other bits), so the best is that of
the smallest mean over heads and modes; where it beats the products in cuBLAS in both modes it may be the default.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from fastdpo.kernels.configs import GemmConfig, arch_of, candidates, override
from fastdpo.ops.oracle import passes, peaked_inputs

from ..measure.conditions import environment
from ..measure.entries import Entry
from ..measure.faults import attempt
from ..measure.missing import NO_TIME, WRONG
from ..measure.timing import Budget, Rounds, Timer, interleaved
from .cases import DTYPES, HEADS
from .peers import fastdpo
from .step import LogprobComparison

MODES = ("forward", "frozen")
TOKENS = 4096
SHAPES = [(TOKENS, HEADS[model].h, HEADS[model].v) for model in ("Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.1-8B")]
DTYPE = "bf16"

BLAS = Entry("fastdpo cublas", "", fastdpo, {"FASTDPO_GEMM": "cublas"})
FUSED = Entry("fastdpo triton", "", fastdpo, {"FASTDPO_GEMM": "triton"})


@dataclass
class Candidate:
    """A configuration (None: the products in cuBLAS), its median times by (hidden size, mode), or why it is out."""

    config: GemmConfig | None
    ms: dict[tuple[int, str], float] = field(default_factory=dict)
    failure: str = ""

    @property
    def mean(self) -> float:
        """Geometric, of its times; inf where one is missing."""
        logs = [math.log(ms) for ms in self.ms.values()]
        return math.exp(sum(logs) / len(logs)) if logs and not self.failure else math.inf


def tune(rounds: Rounds, timer: Timer, budget: Budget, command: str) -> int:
    arch = arch_of(torch.device(timer.device))
    tried = [Candidate(None), *(Candidate(config) for config in dict.fromkeys(candidates(arch)))]
    done = []
    for n, h, v in SHAPES:
        if budget.over:
            print(f"H {h}: {NO_TIME}")
            continue
        comparison = LogprobComparison(*peaked_inputs(n, h, v, DTYPES[DTYPE], timer.device))
        for mode in MODES:
            _measure(comparison, h, mode, tried, rounds, timer, budget)
        done.append(h)
    _print(tried, arch, done, timer.device, command)
    return int(all(candidate.failure for candidate in tried[1:]))


def _measure(
    comparison: LogprobComparison,
    h: int,
    mode: str,
    tried: list[Candidate],
    rounds: Rounds,
    timer: Timer,
    budget: Budget,
) -> None:
    """Checks each candidate that is left, then times those that pass, interleaved."""

    def step(candidate: Candidate):
        with nullcontext() if candidate.config is None else override(candidate.config):
            return comparison.step(BLAS if candidate.config is None else FUSED, mode)

    def check(candidate: Candidate) -> dict[str, float]:
        work, _ = comparison.work(FUSED, mode)
        if candidate.config is not None and (work is None or "Triton" not in work.path):
            raise RuntimeError(f"FASTDPO_GEMM=triton is not taken here: {work.path if work else ''}")
        outputs = step(candidate)
        timer.wait()
        return comparison.truth.errors(outputs)

    runs = {}
    for index, candidate in enumerate(tried):
        if candidate.failure:
            continue
        if budget.over:
            candidate.failure = NO_TIME
            continue
        error, failure = attempt(partial(check, candidate))
        if error is not None and not passes(error, comparison.eager_errors):
            failure = f"{WRONG}: {error}"
        if failure:
            candidate.failure = f"H {h}, {mode}: {failure}"
        else:
            runs[str(index)] = partial(step, candidate)
    times, failed = interleaved(runs, rounds, timer, lambda: budget.over)
    for index, candidate in enumerate(tried):
        taken = sorted(times.get(str(index), []))
        if taken:
            candidate.ms[h, mode] = taken[len(taken) // 2]
        elif not candidate.failure:
            candidate.failure = f"H {h}, {mode}: {failed.get(str(index), NO_TIME)}"


def _print(tried: list[Candidate], arch: str, sizes: list[int], device: str, command: str) -> None:
    blas, fused = tried[0], sorted(tried[1:], key=lambda candidate: candidate.mean)
    columns = [(h, mode) for h in sizes for mode in MODES]
    print("\nmedian ms  " + "".join(f"{f'{h} {mode}':>16}" for h, mode in columns))
    for candidate in [blas, *fused]:
        name = "products in cuBLAS" if candidate.config is None else repr(candidate.config)
        cells = "".join(f"{candidate.ms[c]:16.3f}" if c in candidate.ms else f"{'-':>16}" for c in columns)
        print(f"           {cells}  {name}  {candidate.failure}")
    if arch == "interpreter":
        print("interpreted on a CPU: nothing here is for kernels/configs.py")
    elif not math.isfinite(fused[0].mean):
        print("no configuration ran through: nothing for kernels/configs.py")
    else:
        where = {"gpu": environment(device, command)["device"], "date": time.strftime("%Y-%m-%d"), "command": command}
        print("\nfor kernels/configs.py:", *config_rows(blas, fused[0], arch, sizes, where), sep="\n")


def config_rows(blas: Candidate, best: Candidate, arch: str, sizes: list[int], where: dict[str, object]) -> list[str]:
    """The tile, and where it beat the products in cuBLAS in every mode."""
    faster = [h for h in sizes if all(best.ms[h, mode] < blas.ms.get((h, mode), 0.0) for mode in MODES)]
    conditions = ", ".join(f"{name}={value!r}" for name, value in where.items())
    rows = [f"FOLD[{arch!r}] = {best.config!r}"]
    rows += [f"Measured({arch!r}, {DTYPES[DTYPE]}, range({h}, {h + 1}), {conditions})" for h in faster]
    return rows + [f"# H {h}: not faster than cuBLAS in every mode, no row" for h in sizes if h not in faster]
