"""How it is measured: the oracle first, then interleaved rounds; peak memory in a run of its own."""

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cases import DTYPES, Case, peaked_inputs
from bench.peers import Entry

MIB = 1 << 20


@dataclass
class Row:
    """One entry on one case. Times in milliseconds, memory in MiB above the inputs (gradients included)."""

    case: str
    entry: str
    version: str
    error: dict[str, float]  # largest absolute error against fp64 on the same operands: logp (nats), dh, dw
    times: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    tflop: float = 0.0  # of the GEMMs that the entry's algorithm needs (fastdpo: its plan)
    predicted_peak_mib: float | None = None

    def summary(self) -> dict[str, object]:
        low, high = quantile(self.times, 0.2), quantile(self.times, 0.8)
        return {
            **{k: v for k, v in vars(self).items() if k != "times"},
            "best_ms": min(self.times),
            "median_ms": statistics.median(self.times),
            "p20_ms": low,
            "p80_ms": high,
            "rounds": len(self.times),
            "tflops": self.tflop / min(self.times) * 1e3 if self.tflop else None,
        }


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def step(entry: Entry, inputs: tuple[Tensor, ...], mode: str) -> tuple[Tensor, ...]:
    """One forward (and backward), returning log-probs and gradients."""
    hidden, weight, labels = inputs
    hidden = hidden.detach().requires_grad_(mode != "forward")
    weight = weight.detach().requires_grad_(mode == "trained")
    with torch.set_grad_enabled(mode != "forward"):
        logp = entry(hidden, weight, labels)
        if mode == "forward":
            return (logp,)
        # upstream gradients as DPO's: one coefficient a sequence, of both signs
        upstream = torch.full_like(logp, 0.05)
        upstream[len(upstream) // 2 :] = -0.05
        logp.backward(upstream)
    grads = (hidden.grad, weight.grad)
    return (logp.detach(), *(g for g in grads if g is not None))


def errors(entry: Entry, case: Case, device: str, rows: int = 96) -> dict[str, float]:
    """Largest absolute errors against fp64 on the same rounded operands, on fewer rows of the case's shape."""
    inputs = peaked_inputs(min(rows, case.n), case.h, case.v, DTYPES[case.dtype], device, seed=1)
    truth = step(_definition, (inputs[0].double(), inputs[1].double(), inputs[2]), case.mode)
    found = step(entry, inputs, case.mode)
    return {
        name: float((a.double() - b).abs().max())
        for name, a, b in zip(("logp", "dh", "dw"), found, truth, strict=False)
    }


def _definition(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.t(), -1).gather(1, labels[:, None])[:, 0]


def passes(found: dict[str, float], by_eager: dict[str, float]) -> bool:
    """Within twice eager's own error at that dtype; a faster wrong answer is not reported."""
    return all(found[name] <= 2 * by_eager[name] + 1e-6 for name in by_eager)


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each run, one of each per round, after a warm-up; garbage is collected in between."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_index in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if round_index:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Peak bytes of torch's allocator above the start of the run."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, now)
    return peak / MIB


def environment(device: str, command: str) -> dict[str, object]:
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short=12", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else ""),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "load_average_at_start": os.getloadavg()[0],
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
