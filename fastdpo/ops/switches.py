"""Every FASTDPO_ variable that the ops read, each at the moment of a call.

FASTDPO_BACKEND       who does the work of a tile: auto, triton, tiled (plain torch) or reference (the definition)
FASTDPO_GEMM          who multiplies within Triton: auto, cublas (around the fold kernel) or triton (fused kernels)
FASTDPO_WORKSPACE_MB  MiB that a tile and its operands' copies may take; 64
FASTDPO_KEEP_MB       MiB of exponentials that a trained head may keep for backward; 1024, 0 never keeps
FASTDPO_CHECK         1: labels and rows are checked on a GPU too, which waits for it
"""

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

logger = logging.getLogger("fastdpo")

Backend = Literal["triton", "tiled", "reference"]
CHOICES = ("auto", "triton", "tiled", "reference")
GEMM_CHOICES = ("auto", "cublas", "triton")
MIB = 1 << 20


def backend_choice() -> str:
    """FASTDPO_BACKEND; raises ValueError for what is none of `CHOICES`."""
    return _one_of("FASTDPO_BACKEND", CHOICES)


def gemm_choice() -> str:
    """FASTDPO_GEMM; raises ValueError for what is none of `GEMM_CHOICES`."""
    return _one_of("FASTDPO_GEMM", GEMM_CHOICES)


def workspace_bytes() -> int:
    """The budget of a tile's workspace, in bytes; raises ValueError for what is no whole number above 0."""
    return _megabytes("FASTDPO_WORKSPACE_MB", default=64, least=1)


def keep_bytes() -> int:
    """The budget of kept exponentials, in bytes; raises ValueError for what is no whole number."""
    return _megabytes("FASTDPO_KEEP_MB", default=1024, least=0)


def checks_wait() -> bool:
    """Values are checked even where reading them waits for a device."""
    return os.environ.get("FASTDPO_CHECK") == "1"


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for tensors of that device and compute dtype.

    auto is triton on a CUDA (or ROCm) device, tiled elsewhere and for float64.

    Raises:
        ValueError: FASTDPO_BACKEND is none of auto, triton, tiled, reference.
        RuntimeError: FASTDPO_BACKEND=triton where it cannot run.
    """
    choice = backend_choice()
    if choice == "tiled" or choice == "reference":
        return choice
    obstacle = _triton_obstacle(device, dtype)
    if choice == "triton":
        if obstacle:
            raise RuntimeError(f"FASTDPO_BACKEND=triton cannot run here: {obstacle}")
        return "triton"
    if obstacle is None and device.type == "cuda":
        return "triton"
    if device.type == "cuda":
        logger.debug("tiled path: %s", obstacle)
    return "tiled"


def fuses(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    entropy_grad: bool = False,
    lora_dtype: torch.dtype | None = None,
) -> bool:
    """Whether product and fold are one kernel.

    FASTDPO_GEMM: auto (the fused kernels where `fastdpo.kernels.configs.MEASURED` lists them, else cuBLAS), cublas,
    or triton (the fused kernels; a warning says why where a call cannot take them).

    Raises:
        ValueError: FASTDPO_GEMM is none of these.
    """
    choice = gemm_choice()
    if choice == "cublas":
        return False
    obstacle = None
    if backend != "triton":
        obstacle = f"the backend is {backend}"
    elif dtype not in (torch.bfloat16, torch.float16):
        obstacle = f"the operands are {str(dtype).removeprefix('torch.')}, and the fused kernels take 16-bit ones"
    elif entropy_grad:
        obstacle = "the entropy's gradient needs a second tile"
    elif lora_dtype not in (None, dtype):
        obstacle = f"the LoRA on the head is {str(lora_dtype).removeprefix('torch.')}"
    if choice == "triton":
        if obstacle:
            _warn_once(f"FASTDPO_GEMM=triton is not taken: {obstacle}.")
        return obstacle is None
    if obstacle:
        return False
    from fastdpo.kernels import configs  # imports triton

    return configs.fused_by_default(configs.arch_of(device), dtype, hidden_size)


def block_cols(device: torch.device, softcap: bool) -> int:
    """Columns of the vocabulary that the fused kernel folds into one partial result."""
    from fastdpo.kernels import configs  # imports triton

    return configs.fold_config(configs.arch_of(device), softcap).block_cols


def _one_of(name: str, choices: tuple[str, ...]) -> str:
    choice = os.environ.get(name) or "auto"
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}.")
    return choice


def _megabytes(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, "")
    try:
        size = int(text) if text else default
    except ValueError:
        size = -1
    if size < least:
        raise ValueError(f"{name} must be a whole number of MiB, got {text!r}; unset it for {default}.")
    return size * MIB


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def widest_float(device_type: str) -> torch.dtype:
    """float64 where the device has it: Apple's GPUs do not, nor do some of Intel's."""
    if device_type == "xpu":
        return torch.float64 if torch.xpu.get_device_capability().get("has_fp64") else torch.float32
    return torch.float32 if device_type == "mps" else torch.float64


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _triton_is_installed():
        return "triton is not installed (it exists for Linux only); use FASTDPO_BACKEND=tiled."
    if dtype == torch.float64:
        return "the Triton kernels accumulate in float32; use FASTDPO_BACKEND=tiled for float64."
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU; set TRITON_INTERPRET=1 to interpret the kernels, or use tiled."
    if device.type not in ("cpu", "cuda"):
        return f"no Triton path for device type {device.type!r}; use FASTDPO_BACKEND=tiled."
    return None
