"""What a training step does beside taking time: tokens that go through the models, and reads that wait for a device."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TORCH = str(Path(torch.__file__).parent)
GUARD = "reads_are_free"
_READ = torch.ops.aten._local_scalar_dense.default


class HostReads(TorchDispatchMode):
    """Counts while it is entered, backward included: `.item()`, `bool(tensor)` and what else reads one number.

    On a GPU each of them makes the host wait for everything before it. On a CPU nothing waits, and the count says what
    would: reads in a function that asks `reads_are_free` first, which is what fastdpo's checks on a CPU do, are no part
    of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ and GUARD not in _reader().co_names:
            self.count += 1
        return func(*args, **(kwargs or {}))


def _reader() -> CodeType:
    """Of the innermost function on the stack that is neither torch's nor this module's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    return frame.f_code


class DeviceWaits:
    """Counts while it is entered: every operation that makes the host wait for the CUDA device, as CUDA's own check
    sees it."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "DeviceWaits":
        self._before = torch.cuda.get_sync_debug_mode()
        self._watch = warnings.catch_warnings(record=True)
        self._seen = self._watch.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *reason: Any) -> None:
        torch.cuda.set_sync_debug_mode(self._before)
        self._watch.__exit__(*reason)
        self.count += sum("synchronizing CUDA operation" in str(warning.message) for warning in self._seen or ())


def waits(device: str) -> "HostReads | DeviceWaits":
    return DeviceWaits() if device == "cuda" else HostReads()


@contextmanager
def positions(models: Iterable[nn.Module | None]) -> Iterator[list[int]]:
    """The sizes of the batches of token positions (padding included) that the models embed while it is entered."""
    seen: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output.shape[:-1].numel())

    handles = [m.get_input_embeddings().register_forward_hook(count) for m in models if m is not None]  # pyright: ignore[reportCallIssue] of transformers' models
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def resting_bytes(models: Iterable[nn.Module | None], optimizer: Any) -> int:
    """Of weights, buffers and the optimizer's state, each storage once: what is there between two steps."""
    tensors: list[Tensor] = []
    for model in models:
        if model is not None:
            tensors += [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
