"""What a number needs beside it: device, driver, versions, commit, command, date."""

import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# what a number depends on, new files included
MEASURED = ("fastdpo", "kernels", "bench", "pyproject.toml", ":!bench/results", ":!bench/README.md")
PACKAGES = ("triton", "trl", "liger-kernel", "cut-cross-entropy", "verl", "transformers", "nvidia-cutlass-dsl")
PACKAGES += ("peft", "accelerate")


def environment(device: str, command: str, commit: str | None = None) -> dict[str, object]:
    """Taken before the run; `commit` where the tree is a copy without its history."""
    conditions: dict[str, object] = {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": _versions(),
        "settings": {name: value for name, value in os.environ.items() if name.startswith("FASTDPO_")},
        "commit": commit or _commit(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "load_average_at_start": os.getloadavg()[0],
    }
    return conditions | _cuda() if device == "cuda" else conditions


def _cuda() -> dict[str, object]:
    properties = torch.cuda.get_device_properties("cuda")
    major, minor = torch.cuda.get_device_capability("cuda")
    return {
        "device": torch.cuda.get_device_name("cuda"),
        "capability": f"{major}.{minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / (1 << 30),
        "l2_mib": properties.L2_cache_size / (1 << 20),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda or f"hip {torch.version.hip}",
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _commit() -> str:
    """Of the checkout that this file is in; an installed package has none, whatever repository lies around it."""
    if not (ROOT / ".git").exists():
        return ""
    changed = "+dirty" if _output("git", "status", "--porcelain", "--", *MEASURED) else ""
    return _output("git", "rev-parse", "--short=12", "HEAD") + changed


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
