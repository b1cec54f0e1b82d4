"""What `fastdpo doctor` finds on this machine: versions, processor, memory, GPUs, switches, and what cannot work."""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

# name -> the distributions that provide it
PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"),
    "transformers": ("transformers",),
    "peft": ("peft",),
    "accelerate": ("accelerate",),
    "datasets": ("datasets",),
    "trl": ("trl",),
    "bitsandbytes": ("bitsandbytes",),
    "liger-kernel": ("liger-kernel", "liger-kernel-nightly"),
    "flash-attn": ("flash-attn", "flash-attn-3"),
}
# pyproject.toml's lower bounds of what is above; metadata has them only where fastdpo is installed
MINIMUM = {
    "torch": "2.8",
    "triton": "3.4",
    "transformers": "5.8",
    "peft": "0.18",
    "accelerate": "1.1",
    "datasets": "3.0",
}
SWITCHES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
BF16_FLAGS = {"avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX", "bf16": "BF16 (Arm)"}
NVIDIA = Path("/proc/driver/nvidia/version")
OLDEST_ARCH = (8, 0)


class Finding(NamedTuple):
    """Something that does not work and why; `fatal` where it was asked for, or nothing works without it."""

    text: str
    fatal: bool


def versions() -> dict[str, str | None]:
    """name -> version, None where it is not installed; nothing is imported."""
    return {name: next(filter(None, map(_version, names)), None) for name, names in PACKAGES.items()}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def system() -> dict[str, Any]:
    """Python, OS, processor (model, cores, bf16 units) and memory in GiB; None where it cannot be told."""
    model, units = _processor()
    total, available = _memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": model,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "bf16_units": units,
        "ram_gib": total,
        "ram_available_gib": available,
    }


def _processor() -> tuple[str, list[str] | None]:
    """Model, and the units that multiply bf16 (None where only the OS knows)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        brand = _output("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else ""
        return brand or platform.processor() or platform.machine(), None
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    has = set(flags[1].split()) if flags else set()
    return model[1] if model else platform.machine(), [name for flag, name in BF16_FLAGS.items() if flag in has]


def _memory() -> tuple[float | None, float | None]:
    try:
        import psutil
    except ImportError:
        return None, None
    memory = psutil.virtual_memory()
    return memory.total / (1 << 30), memory.available / (1 << 30)


def torch_build() -> dict[str, Any]:
    """What the installed torch was built for and sees. Raises ImportError or OSError where it cannot be imported."""
    import torch

    gpu = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    return {
        "version": torch.__version__,
        "build": f"ROCm {torch.version.hip}" if torch.version.hip else gpu or "CPU only",
        "sees_gpu": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }


def gpus() -> list[dict[str, Any]]:
    """Every GPU that torch sees: name, architecture, memory in GiB, driver."""
    import torch

    cards = []
    driver = nvidia_driver() if torch.version.cuda else None
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        arch = properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{major}{minor}"
        cards.append(
            {
                "index": index,
                "name": properties.name,
                "arch": arch,
                "memory_gib": total / (1 << 30),
                "free_gib": free / (1 << 30),
                "driver": driver,
                "too_old": not torch.version.hip and (major, minor) < OLDEST_ARCH,
            }
        )
    return cards


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, "unknown" where one is there and does not say, None without one."""
    if NVIDIA.is_file():
        version = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", NVIDIA.read_text(encoding="utf-8", errors="replace"))
        return version[1] if version else "unknown"
    if shutil.which("nvidia-smi") is None:
        return None
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None


def switches() -> dict[str, str]:
    """The environment variables that are set and change what runs."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTDPO_") or k in SWITCHES}


def findings(
    installed: dict[str, str | None], build: dict[str, Any] | None, cards: list[dict[str, Any]], wants_gpu: bool
) -> list[Finding]:
    """What cannot work with these versions and devices; `build` is None where torch cannot be imported."""
    problems = []
    for name, least in MINIMUM.items():
        have = installed[name]
        if have is None and name == "triton":
            if sys.platform == "linux":
                runs = "the GPU runs the tiled path in plain torch" if cards else "a GPU would run the tiled path"
                text = f"triton is not installed, so {runs}; pip install 'triton>={least}'"
                problems.append(Finding(text, wants_gpu))
        elif have is None:
            problems.append(Finding(f"{name} is not installed; pip install '{name}>={least}'", True))
        elif _numbers(have) < _numbers(least):
            fix = f"fastdpo needs {least} or newer; pip install -U '{name}>={least}'"
            problems.append(Finding(f"{name} {have} is installed and {fix}", True))
    if cards and os.environ.get("TRITON_INTERPRET") == "1":
        text = "TRITON_INTERPRET=1 is set, so Triton kernels do not run on the GPU; unset it"
        problems.append(Finding(text, wants_gpu))
    if build is None or build["sees_gpu"]:
        for card in cards:
            if card["too_old"]:
                text = f"{card['name']} is {card['arch']}, and the Triton kernels are made for sm_80 and newer"
                problems.append(Finding(text, wants_gpu))
        return problems
    driver = nvidia_driver()
    if driver and build["build"] == "CPU only":
        text = f"torch {build['version']} is a CPU-only build, and this machine has NVIDIA driver {driver}"
        problems.append(Finding(f"{text}; install a CUDA build of torch to use the GPU", wants_gpu))
    elif driver and build["build"].startswith("CUDA"):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "its driver may be too old for it" if hidden is None else f"CUDA_VISIBLE_DEVICES is {hidden!r}"
        text = f"torch is built for {build['build']} and sees no GPU, though NVIDIA driver {driver} is there: {why}"
        problems.append(Finding(text, wants_gpu))
    return problems


def _numbers(text: str) -> list[int]:
    """A version's leading numbers: vendors' builds ("2.8.0a0+nv25.05") count as the release they are made from."""
    leading = re.match(r"\d+(?:\.\d+)*", text)
    return [int(part) for part in leading[0].split(".")] if leading else []


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
