"""How fast training goes and how much memory it takes, for the log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor


class Stopwatch:
    """Seconds of training since the last reading; what runs inside `paused` does not count."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    def run(self) -> None:
        """Start, or go on where it runs already."""
        if self._since is None:
            self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the device first: steps that are queued belong to the time before."""
        if self._since is None:
            yield
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._seconds += time.perf_counter() - self._since
        self._since = None
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def stop(self) -> None:
        self._seconds, self._since = 0.0, None

    def lap(self) -> float:
        """The seconds since the last lap."""
        now = time.perf_counter()
        seconds = self._seconds + (0.0 if self._since is None else now - self._since)
        self._seconds, self._since = 0.0, None if self._since is None else now
        return seconds


def speed_metrics(seconds: float, tokens: int, accelerator: Accelerator) -> dict[str, float]:
    """For the log: `tokens` (of all processes) per second, and the largest peak memory of a process in GB since the
    last call."""
    device = accelerator.device
    peak = torch.tensor([peak_memory_gb(device)], dtype=torch.float32, device=device)
    memory = {"peak_memory_gb": round(cast(Tensor, accelerator.gather(peak)).max().item(), 4)}
    return {"tokens_per_second": round(tokens / seconds, 2), **memory} if seconds > 0 else memory


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process had, in GB (1e9 bytes).

    On a GPU what tensors took on `device` since the last call; where torch does not count that (CPU, MPS) the largest
    resident size of the process since it began.
    """
    memory = torch.get_device_module(device)
    if hasattr(memory, "max_memory_allocated"):
        peak = memory.max_memory_allocated(device)
        memory.reset_peak_memory_stats(device)
    elif sys.platform == "win32":
        import psutil

        peak = psutil.Process().memory_info().peak_wset
    else:
        import resource

        # in bytes on macOS, in KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak / 1e9
