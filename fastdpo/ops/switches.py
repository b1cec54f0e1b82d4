"""Who does the work of a tile: Triton, plain torch, or the eager definition. FASTDPO_BACKEND forces one.

Within Triton FASTDPO_GEMM says who multiplies: cuBLAS around the fold kernel, or the fused kernels.
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


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for tensors of that device and compute dtype.

    auto is triton on a CUDA (or ROCm) device, tiled elsewhere and for float64.

    Raises:
        ValueError: FASTDPO_BACKEND is none of auto, triton, tiled, reference.
        RuntimeError: FASTDPO_BACKEND=triton where it cannot run.
    """
    wanted = os.environ.get("FASTDPO_BACKEND", "auto") or "auto"
    if wanted not in CHOICES:
        raise ValueError(f"FASTDPO_BACKEND must be one of {', '.join(CHOICES)}, got {wanted!r}.")
    if wanted == "tiled" or wanted == "reference":
        return wanted
    obstacle = _triton_obstacle(device, dtype)
    if wanted == "triton":
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
    wanted = os.environ.get("FASTDPO_GEMM", "auto") or "auto"
    if wanted not in GEMM_CHOICES:
        raise ValueError(f"FASTDPO_GEMM must be one of {', '.join(GEMM_CHOICES)}, got {wanted!r}.")
    if wanted == "cublas":
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
    if wanted == "triton":
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
