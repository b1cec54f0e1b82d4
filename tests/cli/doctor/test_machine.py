"""What `fastdpo doctor` finds on a machine, and what cannot work there."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli.doctor import machine
from fastdpo.cli.doctor import text as doctor_report

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., tuple[int, str, str]]


def test_lower_bounds_are_pyprojects():
    text = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', required[1]))
    assert {name: bounds.get(name) for name in machine.MINIMUM} == machine.MINIMUM
    assert set(bounds) & set(machine.PACKAGES) == set(machine.MINIMUM)


GOOD = {**dict.fromkeys(machine.PACKAGES), **machine.MINIMUM}
CPU = {"version": "2.9.0+cpu", "build": "CPU only", "sees_gpu": False, "threads": 2}
CUDA = {**CPU, "version": "2.9.0", "build": "CUDA 12.8"}
CARD = {
    "index": 0,
    "name": "A100",
    "arch": "sm_80",
    "memory_gib": 80,
    "free_gib": 79,
    "driver": "570",
    "too_old": False,
}


@pytest.mark.parametrize(
    ("installed", "build", "cards", "driver", "text"),
    [
        ({}, CPU, [], None, None),
        ({"torch": "2.8.0a0+nv25.05", "triton": "3.10"}, CUDA | {"sees_gpu": True}, [CARD], "570", None),
        ({"torch": "2.7.1"}, CPU, [], None, "torch 2.7.1 is installed and fastdpo needs 2.8 or newer"),
        ({"triton": "3.3.1"}, CPU, [], None, "triton 3.3.1 is installed and fastdpo needs 3.4 or newer"),
        ({"peft": None}, CPU, [], None, "peft is not installed; pip install 'peft>=0.18'"),
        ({"triton": None}, CUDA | {"sees_gpu": True}, [CARD], "570", "triton is not installed, so the GPU runs the"),
        ({"triton": None}, CPU, [], None, "triton is not installed, so a GPU would run the tiled path"),
        ({}, CPU, [], "570.86", "torch 2.9.0+cpu is a CPU-only build, and this machine has NVIDIA driver 570.86"),
        ({}, CUDA, [], "450.1", "torch is built for CUDA 12.8 and sees no GPU, though NVIDIA driver 450.1 is there"),
        (
            {},
            CUDA | {"sees_gpu": True},
            [CARD | {"name": "T4", "arch": "sm_75", "too_old": True}],
            "570",
            "T4 is sm_75, and the Triton kernels are made for sm_80 and newer",
        ),
    ],
)
def test_what_cannot_work_is_said_with_its_reason(installed, build, cards, driver, text, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "nvidia_driver", lambda: driver)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problems = machine.findings({**GOOD, **installed}, build, cards, wants_gpu=False)
    if text is None:
        assert problems == []
        return
    (finding,) = problems
    assert finding.text.startswith(text)
    # nothing works with such versions; a GPU that is not used was not asked for
    required = any(have != machine.MINIMUM.get(name) for name, have in installed.items() if name != "triton")
    assert finding.fatal == (required or "older" in text or installed.get("triton") == "3.3.1")
    asked_for = machine.findings({**GOOD, **installed}, build, cards, wants_gpu=True)
    assert asked_for[0].fatal


def test_a_torch_that_does_not_import_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch):
    def broken() -> dict[str, Any]:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(machine, "torch_build", broken)
    code, out, _ = run()
    assert code == 1
    assert "FAILED: torch is installed and does not work: libcudart.so.12: cannot open shared object file" in out
    assert "self-test" not in out


def test_gpus_and_switches_are_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("FASTDPO_GEMM", "triton")
    report = {"gpus": [CARD], "system": machine.system(), "switches": machine.switches()}
    lines = doctor_report._system(report)
    assert "  GPU 0          A100, sm_80, 80.0 GiB, 79.0 free, driver 570" in lines
    assert re.search(r"CUDA_VISIBLE_DEVICES=1 FASTDPO_GEMM=triton", lines[-1])
