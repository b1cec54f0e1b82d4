"""`fastdpo doctor --kernels`: what each kernel takes of a GPU, and which limits it exceeds."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fastdpo.ops import ahead_of_time

Run = Callable[..., tuple[int, str, str]]


def compiled(kernel: str, target: str, **change: Any) -> dict[str, Any]:
    row = {"kernel": kernel, "target": target, "registers": 198, "spills": 0, "shared": 131072, "matrix": "wgmma"}
    return {**row, "async": "TMA", "tf32": False, "atomics": False, "serialized": False, **change}


@pytest.mark.parametrize(
    ("change", "over"),
    [
        ({}, ""),
        ({"registers": 256}, "256 registers"),
        ({"spills": 8}, "spills 8"),
        ({"shared": 228 << 10}, "shared 228 of 227 KiB"),
        ({"tf32": True, "atomics": True, "serialized": True}, "TF32, atomics, serialized wgmma"),
    ],
)
def test_the_kernel_table_names_what_exceeds_a_limit(run: Run, monkeypatch, change: dict, over: str):
    pytest.importorskip("triton", reason="triton exists for Linux only")
    table = {
        "sm_90": [compiled("fold", "sm_90", matrix="", **{"async": ""}), compiled("fused_fold", "sm_90", **change)],
        "sm_80": [compiled("fused_fold", "sm_80", matrix="mma.sync", **{"async": "cp.async"})],
    }
    monkeypatch.setattr(ahead_of_time, "resources", table.__getitem__)
    code, out, err = run("--skip_self_test", "--kernels", "sm_90", "sm_80")
    assert code == (1 if over else 0)
    shared = f"{table['sm_90'][1]['shared'] / 1024:.1f}"
    last = f"EXCEEDED: {over}" if over else "ok"
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "sm_90 registers spills shared KiB matrix copies limits" in rows
    assert "fold 198 0 128.0 - - ok" in rows
    row = table["sm_90"][1]
    assert f"fused_fold {row['registers']} {row['spills']} {shared} wgmma TMA {last}" in rows
    assert "fused_fold 198 0 128.0 mma.sync cp.async ok" in rows
    assert (f"FAILED: fused_fold on sm_90: {over}" in rows) == bool(over)
    assert "compiling every kernel for sm_80 ..." in err


def test_all_targets_are_compiled_unless_some_are_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="triton exists for Linux only")

    def resources(target: str) -> list[dict[str, Any]]:
        if target == "gfx942":
            raise RuntimeError("a kernel does not compile for gfx942:\n no LLVM")
        return [compiled("fold", target)]

    monkeypatch.setattr(ahead_of_time, "resources", resources)
    code, out, _ = run("--skip_self_test", "--json", "--kernels")
    report = json.loads(out)
    assert code == 1
    assert [row["target"] for row in report["kernels"]] == ["sm_80", "sm_90", "sm_100"]
    (finding,) = report["findings"]
    assert finding["text"] == "--kernels gfx942: a kernel does not compile for gfx942: no LLVM"


def test_kernels_need_triton(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    code, out, _ = run("--skip_self_test", "--device", "cpu", "--kernels", "sm_90")
    assert code == 1
    assert "FAILED: --kernels needs triton, which is not installed (it exists for Linux only)" in out.splitlines()


@pytest.mark.slow
def test_the_kernel_table_is_what_the_compiler_says(run: Run):
    pytest.importorskip("triton", reason="triton exists for Linux only")
    code, out, _ = run("--skip_self_test", "--kernels", "sm_80")
    assert code == 0, out
    rows = [line for line in out.splitlines() if re.search(r" (mma\.sync) +cp\.async +ok$", line)]
    assert len([line for line in rows if line.startswith("fused_")]) == len(rows) >= 5
