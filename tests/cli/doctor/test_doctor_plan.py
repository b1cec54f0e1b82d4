"""Which path `fastdpo doctor` says the op takes for a shape, and why."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdpo.cli.doctor import command as doctor
from fastdpo.cli.doctor import plan as doctor_plan
from fastdpo.ops.linear_logprob.api import linear_logprob_plan

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("train", doctor.TRAIN)
@pytest.mark.parametrize(
    ("dtype", "backend", "gemm"),
    [
        ("float32", "tiled", "auto"),
        ("bfloat16", "tiled", "auto"),
        ("float64", "tiled", "auto"),
        ("bfloat16", "triton", "cublas"),
        ("bfloat16", "triton", "triton"),
        ("float32", "triton", "triton"),
    ],
)
def test_the_plan_is_the_ops_own(dtype, backend, gemm, train, softcap, monkeypatch: pytest.MonkeyPatch):
    if backend == "triton":
        pytest.importorskip("triton", reason="triton exists for Linux only")
    monkeypatch.setenv("FASTDPO_BACKEND", backend)
    monkeypatch.setenv("FASTDPO_GEMM", gemm)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FASTDPO_KEEP_MB", "8")
    n, h, v = 300, 64, 20000
    answer = doctor_plan.answer(doctor_plan.Question(n, h, v, dtype, "cpu", softcap=softcap), train)
    needs = doctor_plan.NEEDS[train]
    hidden = torch.zeros(n, h, dtype=getattr(torch, dtype), requires_grad=needs.hidden)
    weight = torch.zeros(v, h, dtype=hidden.dtype, requires_grad=needs.weight)
    labels, rows = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    own = linear_logprob_plan(hidden, weight, labels, rows=rows, softcap=softcap)
    assert own.fused == (gemm == "triton" and dtype == "bfloat16")
    assert (answer["backend"], answer["path"], answer["tile"]) == (backend, own.path, [own.rows, own.cols])
    assert answer["gemm"] == ("fused" if own.fused else "torch.mm")
    assert answer["tflop"] == own.flops / 1e12
    assert answer["peak_mib"] == own.peak_bytes / (1 << 20)
    assert answer["back_tile"] == ([own.back_rows, own.back_cols] if own.path == "recompute" else None)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_planned_for_and_nothing_is_allocated(plan):
    pytest.importorskip("triton", reason="triton exists for Linux only")
    # N x V is 4 TB, the head 32 GB
    sizes = ("--n", "1_000_000", "--hidden_size", "16384", "--vocab_size", "1000000")
    report = plan("--device", "cuda", *sizes)
    (answer,) = report["plans"]
    assert report["ok"]
    assert (report["shape"]["arch"], report["shape"]["here"]) == ("sm_90", False)
    assert (answer["backend"], answer["path"], answer["gemm"]) == ("triton", "one_pass", "cuBLAS")
    assert "no run on sm_90 is in kernels/configs.py" in answer["why_gemm"]
    assert answer["tflop"] == 4 * 1e6 * 16384 * 1e6 / 1e12
    assert answer["eager_mib"] == 1e12 * (2 + 4 + 4) / (1 << 20)


@pytest.mark.usefixtures("no_gpu")
def test_who_multiplies_and_why(plan, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="triton exists for Linux only")
    from fastdpo.kernels import configs

    def products(*arguments: str) -> tuple[str, str]:
        (answer,) = plan(*arguments)["plans"]
        return answer["gemm"], answer["why_gemm"]

    measured = configs.Measured("sm_80", torch.bfloat16, range(1024, 4096), "a GPU", "2026-11-21", "a command")
    monkeypatch.setattr(configs, "MEASURED", (measured,))
    assert products("--arch", "sm_80") == ("fused", "measured on a GPU, 2026-11-21: a command")
    assert products("--arch", "sm_80", "--hidden_size", "4096")[0] == "cuBLAS"
    assert products("--arch", "sm_80", "--dtype", "float16")[0] == "cuBLAS"
    assert products("--arch", "gfx942")[0] == "hipBLAS"
    monkeypatch.setenv("FASTDPO_GEMM", "cublas")
    assert products("--arch", "sm_80") == ("cuBLAS", "FASTDPO_GEMM=cublas")
    monkeypatch.setenv("FASTDPO_GEMM", "triton")
    assert products("--arch", "sm_100") == ("fused", "FASTDPO_GEMM=triton")
    refused = "FASTDPO_GEMM=triton is not taken: the operands are float32, and the fused kernels take 16-bit ones"
    assert products("--arch", "sm_100", "--dtype", "float32") == ("cuBLAS", refused)
    (answer,) = plan("--arch", "sm_90")["plans"]
    tile = configs.fold_config("sm_90")
    assert answer["kernel_tile"].startswith(
        f"{tile.block_rows} x {tile.block_cols} x {tile.block_k}, {tile.warps} warps"
    )


@pytest.mark.usefixtures("no_gpu")
def test_without_triton_a_gpu_runs_the_tiled_path(plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(doctor_plan, "choose_backend", lambda *_: "tiled")  # it remembers that triton is there
    report = plan("--device", "cuda")
    (answer,) = report["plans"]
    assert (answer["backend"], answer["why_backend"]) == ("tiled", "triton is not installed")
    assert report["shape"]["arch"] is None


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("FASTDPO_BACKEND", "cuda", "FASTDPO_BACKEND must be one of auto, triton, tiled, reference, got 'cuda'."),
        ("FASTDPO_GEMM", "cuda", "FASTDPO_GEMM must be one of auto, cublas, triton, got 'cuda'."),
        ("FASTDPO_KEEP_MB", "much", "FASTDPO_KEEP_MB must be a whole number of MiB, got 'much'; unset it for 1024."),
        ("FASTDPO_BACKEND", "triton", "FASTDPO_BACKEND=triton cannot run here: the tensors are on the CPU"),
    ],
)
def test_a_switch_that_cannot_work_fails_the_report(run: Run, monkeypatch, name: str, value: str, sentence: str):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv(name, value)
    code, out, _ = run("--skip_self_test", "--device", "cpu")
    assert code == 1
    assert f"\nFAILED: {sentence}" in out
    assert out.endswith("not all is well: see the lines above\n")


def test_the_reference_backend_has_eagers_peak(plan, run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTDPO_BACKEND", "reference")
    (answer,) = plan("--device", "cpu")["plans"]
    assert (answer["path"], answer["peak_mib"]) == ("eager", None)
    _, out, _ = run("--skip_self_test", "--device", "cpu")
    assert re.search(r"head: trained head +eager +- +6\.46 +as eager", out)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"model_type": "gemma2", "final_logit_softcapping": 30.0, "dtype": "bfloat16"},
            {"softcap": 30.0, "logit_scale": 1.0, "dtype": "bfloat16"},
        ),
        ({"model_type": "cohere", "logit_scale": 0.0625, "dtype": "float16"}, {"logit_scale": 0.0625, "softcap": None}),
        ({"model_type": "granite", "logits_scaling": 8.0}, {"logit_scale": 0.125, "dtype": "bfloat16"}),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_a_models_folder_gives_sizes_dtype_and_logits(plan, tmp_path: Path, config: dict, expected: dict):
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 96, "vocab_size": 3200}))
    shape = plan("-m", str(tmp_path), "--device", "cpu")["shape"]
    assert (shape["h"], shape["v"]) == (96, 3200)
    assert {name: shape[name] for name in expected} == expected
    named = plan("-m", str(tmp_path), "--vocab-size", "64", "--dtype", "float32", "--device", "cpu")["shape"]
    assert (named["h"], named["v"], named["dtype"]) == (96, 64, "float32")


def test_a_model_that_cannot_be_trained_or_read(run: Run, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 64, "vocab_size": 100}))
    code, out, _ = run("-m", str(tmp_path), "--skip_self_test")
    assert code == 1
    assert f"FAILED: {tmp_path} is an encoder-decoder model; fastdpo trains causal language models" in out
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    code, out, err = run("-m", str(tmp_path), "--skip_self_test")
    assert (code, out) == (2, "")
    assert err.startswith(f"fastdpo doctor: error: the config.json of {tmp_path} cannot be read: ")
    assert err.count("\n") == 1
