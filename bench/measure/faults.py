"""Failures of an entry that the run survives: out of memory, an error, a device that is lost."""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from .missing import OUT_OF_MEMORY

T = TypeVar("T")


def attempt(run: Callable[[], T]) -> tuple[T | None, str]:
    """What `run` gives, or None and why not. What it held is freed."""
    try:
        return run(), ""
    except Exception as reason:
        failure = out_of_memory(reason) or f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a lost device says no to this too
            torch.cuda.empty_cache()
    return None, failure


def out_of_memory(reason: BaseException) -> str | None:
    """`OUT_OF_MEMORY` if that is what it says: torch's own error, a driver's as Triton words it, or a CPU's."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    is_it = isinstance(reason, torch.OutOfMemoryError | MemoryError) or any(word in str(reason) for word in words)
    return OUT_OF_MEMORY if is_it else None


def device_lost(device: str) -> str | None:
    """What the device says where nothing can run on it any more (a kernel read memory that is not its own)."""
    if device != "cuda":
        return None
    _, failure = attempt(lambda: torch.ones(1, device="cuda").item())
    return failure or None
