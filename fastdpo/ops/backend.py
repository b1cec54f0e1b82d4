"""Who does the work of a tile: Triton, plain torch, or the eager definition. FASTDPO_BACKEND forces one."""

import logging
import os
from importlib.util import find_spec
from typing import Literal

import torch

logger = logging.getLogger("fastdpo")

Backend = Literal["triton", "tiled", "reference"]
CHOICES = ("auto", "triton", "tiled", "reference")


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


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (it exists for Linux only); use FASTDPO_BACKEND=tiled."
    if dtype == torch.float64:
        return "the Triton kernels accumulate in float32; use FASTDPO_BACKEND=tiled for float64."
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU; set TRITON_INTERPRET=1 to interpret the kernels, or use tiled."
    if device.type not in ("cpu", "cuda"):
        return f"no Triton path for device type {device.type!r}; use FASTDPO_BACKEND=tiled."
    return None
