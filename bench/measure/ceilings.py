"""The rates that a device reaches here and now: what a path could do at best is counted with them."""

import torch
from torch import Tensor

from .faults import attempt
from .timing import MIB, Run, Timer


def rate(work: float, run: Run, timer: Timer, rounds: int = 7) -> float | None:
    """`work` per millisecond; None where it does not run here.

    At the median of some rounds, or on a CPU, where other work makes some of them slow, at the best.
    """
    at = 0 if timer.device == "cpu" else rounds // 2
    took, _ = attempt(lambda: sorted(timer.once(run) for _ in range(rounds + 1))[at])
    return None if not took else work / took


def copy_gbs(timer: Timer) -> float | None:
    """Device copy rate in GB/s, bytes read and bytes written counted: 1 GiB, or 64 MiB on a CPU."""
    size = (1024 if timer.device == "cuda" else 64) * MIB
    source = torch.ones(size, dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    per_ms = rate(2 * size, lambda: target.copy_(source), timer)
    return None if per_ms is None else per_ms / 1e6


def gemm_tflops(hidden: Tensor, weight: Tensor, timer: Timer) -> dict[str, float | None]:
    """TFLOP/s of one product N x H x V in the operands' dtype, and with an fp32 result where torch has that.

    It writes over one result, which is there before: what a new one costs on a CPU (pages) is no arithmetic.
    """
    flops = 2.0 * len(hidden) * weight.numel()
    results = {"gemm_tflops": {}, "gemm_fp32_out_tflops": {"out_dtype": torch.float32}}
    rates: dict[str, float | None] = {}
    for name, options in results.items():
        out, _ = attempt(lambda options=options: torch.mm(hidden, weight.t(), **options))
        if out is None:
            rates[name] = None
            continue
        per_ms = rate(flops, lambda options=options, out=out: torch.mm(hidden, weight.t(), out=out, **options), timer)
        rates[name] = None if per_ms is None else per_ms / 1e9
    return rates
