"""Tiles of the kernels that multiply by themselves, per architecture, and where they are the default.

The tiles compile without spills for their targets, with every option of the kernels (tests/ops/test_kernel_gates.py).
That says nothing of speed: `MEASURED` lists what a GPU has shown, and what is not in it is no default: there the
products are cuBLAS's (hipBLAS's), and the fused kernels run where FASTDPO_GEMM=triton asks for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class GemmConfig:
    """A tile of `block_rows` tokens and `block_cols` columns of the vocabulary, `block_k` of the hidden size a step."""

    block_rows: int
    block_cols: int
    block_k: int
    group: int  # column blocks that are kept in L2 while all row blocks pass
    warps: int
    stages: int
    tma: bool  # tensor descriptors, where strides and addresses are multiples of 16 bytes; else pointers
    branch: bool  # rare work behind scalar branches


# one tile whatever is asked for: another one would give other bits, and policy and reference ask for different things
FOLD = {
    "sm_80": GemmConfig(128, 128, 32, 8, 8, 3, tma=False, branch=True),
    "sm_90": GemmConfig(128, 128, 64, 8, 8, 4, tma=True, branch=True),
    "sm_100": GemmConfig(128, 128, 64, 8, 8, 4, tma=True, branch=True),
    "gfx942": GemmConfig(128, 128, 64, 8, 8, 2, tma=False, branch=True),
    "interpreter": GemmConfig(16, 32, 16, 2, 1, 1, tma=False, branch=True),
}
# a softcap's epilogue needs more registers; both policy and reference have it
FOLD_SOFTCAP = {**FOLD, "sm_80": GemmConfig(128, 64, 32, 8, 4, 3, tma=False, branch=True)}
DLOGITS = FOLD


@dataclass(frozen=True)
class Measured:
    """A run on a GPU after which the fused kernels are the default for a range of hidden sizes."""

    arch: str
    dtype: torch.dtype
    hidden_sizes: range
    gpu: str
    date: str
    command: str


MEASURED: tuple[Measured, ...] = ()

_forced: GemmConfig | None = None


def arch_of(device: torch.device) -> str:
    """The row of the tables above for a device; GPUs without one of their own take the nearest that fits them."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # consumer Blackwell (12.x) has neither wgmma nor tcgen05, and 99 KiB of shared memory, as Ada
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def fold_config(arch: str, softcap: bool = False) -> GemmConfig:
    return _forced or (FOLD_SOFTCAP if softcap else FOLD)[arch]


def dlogits_config(arch: str) -> GemmConfig:
    return _forced or DLOGITS[arch]


def fused_by_default(arch: str, dtype: torch.dtype, hidden_size: int) -> bool:
    return any(row.arch == arch and row.dtype == dtype and hidden_size in row.hidden_sizes for row in MEASURED)


def candidates(arch: str) -> list[GemmConfig]:
    """What is worth timing on an architecture, the table's own tile first."""
    own = FOLD[arch]
    if arch == "sm_80":
        tiles = [(128, 128, 32, 8, 4), (128, 128, 32, 4, 3), (128, 256, 32, 8, 3), (64, 128, 64, 4, 3)]
    elif arch == "sm_90":
        tiles = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 3)]
    elif arch == "sm_100":
        tiles = [(256, 128, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 4)]
    else:
        tiles = [(256, 128, 64, 8, 2), (128, 128, 32, 4, 2)]
    others = [
        replace(own, block_rows=rows, block_cols=cols, block_k=k, warps=warps, stages=stages)
        for rows, cols, k, warps, stages in tiles
    ]
    others += [replace(own, group=group) for group in (4, 16)]
    if own.tma:
        others.append(replace(own, tma=False))
    return [own, *others]


@contextmanager
def override(config: GemmConfig) -> Iterator[None]:
    """Forces one tile, for tuning and tests."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before
