"""`fastdpo doctor`: what it says of a machine and a shape, and that its self-test can fail."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.cli import main
from fastdpo.cli.command import _finite
from fastdpo.cli.doctor import command as doctor
from fastdpo.cli.doctor import machine, self_test
from fastdpo.cli.doctor import plan as doctor_plan
from fastdpo.cli.doctor import text as doctor_report
from fastdpo.ops import ahead_of_time, reference
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FASTDPO_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments): exit code, stdout and stderr of `fastdpo doctor`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["doctor", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def plan(run: Run) -> Callable[..., dict[str, Any]]:
    """plan(*arguments): the report as JSON, with one plan and no self-test."""

    def call(*arguments: str) -> dict[str, Any]:
        _, out, _ = run("--json", "--skip_self_test", "--train", "lora", *arguments)
        return json.loads(out)

    return call


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# the command


def test_help_is_fast_grouped_and_imports_no_torch():
    code = (
        "import sys; from fastdpo.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    command = [sys.executable, "-c", code, "doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5, times
    for group in ("command:", "which path:", "checks:"):
        assert f"\n{group}\n" in done.stdout
    assert set(doctor.DTYPES) <= set(re.findall(r"\w+", done.stdout))


def test_it_is_listed_with_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    assert re.search(r"^  doctor +say what is installed", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--divice", "cpu"), "there is no argument '--divice': did you mean '--device'?"),
        (("--frobnicate",), "there is no argument '--frobnicate': see fastdpo doctor --help"),
        (("model",), "'model' stands alone: arguments are --name value (see fastdpo doctor --help)"),
        (("--n", "0"), "--n: should be a whole number above 0, got '0'"),
        (("--hidden-size", "2k"), "--hidden_size: should be a whole number above 0, got '2k'"),
        (("--dtype", "int8"), "--dtype: invalid choice: 'int8' (choose from"),
        (("--kernels", "sm_70"), "--kernels: invalid choice: 'sm_70' (choose from"),
        (("--arch", "sm_80", "--device", "cpu"), "--arch names a GPU, and --device is cpu: leave one of them out"),
        (("-m", "/nowhere/model"), "no such model: the folder /nowhere/model does not exist"),
        (("-m", str(ROOT / "tests")), f"no such model: the folder {ROOT / 'tests'} holds no config.json"),
    ],
)
def test_a_mistake_gets_one_sentence(run: Run, arguments: tuple[str, ...], sentence: str):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"fastdpo doctor: error: {sentence}")
    assert err.count("\n") == 1


def test_the_default_report_is_short_and_well(run: Run):
    code, out, _ = run()
    assert code == 0, out
    lines = out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    assert lines[-1] == "all is well"
    for pattern in (
        rf"^  torch +{re.escape(torch.__version__)} \(",
        r"^  (not installed +.*)?bitsandbytes",
        r"^  CPU +\S.* cores, bf16",
        r"^N 4096, H 2048, V 128256, bfloat16 on ",
        r"^self-test on \w+ against float64, .*: passed in ",
        r"^  tiled +bfloat16 +.* yes$",
    ):
        assert re.search(pattern, out, re.M), pattern


def test_json_is_one_object_with_the_same_facts(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", "12")
    code, out, _ = run("--json", "--skip-self-test", "--n=100", "--device", "cpu")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert report["switches"]["FASTDPO_KEEP_MB"] == "12"
    assert report["torch"]["version"] == torch.__version__
    assert report["shape"]["n"] == 100
    assert [x["path"] for x in report["plans"]] == ["stats", "one_pass", "recompute"]
    assert "self_test" not in report
    assert _finite({"a": [float("nan"), 1.0]}, str) == {"a": ["nan", 1.0]}


def test_an_error_of_its_own_is_said_and_not_blamed_on_the_input(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "system", lambda: 1 / 0)
    code, out, err = run("--skip_self_test")
    assert (code, out) == (1, "")
    assert err == "fastdpo doctor: failed: ZeroDivisionError: division by zero (--debug shows the traceback)\n"


# which path


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
    found = doctor_plan.answer(doctor_plan.Question(n, h, v, dtype, "cpu", softcap=softcap), train)
    needs = doctor_plan.NEEDS[train]
    hidden = torch.zeros(n, h, dtype=getattr(torch, dtype), requires_grad=needs.hidden)
    weight = torch.zeros(v, h, dtype=hidden.dtype, requires_grad=needs.weight)
    labels, rows = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    own = linear_logprob_plan(hidden, weight, labels, rows=rows, softcap=softcap)
    assert own.fused == (gemm == "triton" and dtype == "bfloat16")
    assert (found["backend"], found["path"], found["tile"]) == (backend, own.path, [own.rows, own.cols])
    assert found["gemm"] == ("fused" if own.fused else "torch.mm")
    assert found["tflop"] == own.flops / 1e12
    assert found["peak_mib"] == own.peak_bytes / (1 << 20)
    assert found["back_tile"] == ([own.back_rows, own.back_cols] if own.path == "recompute" else None)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_planned_for_and_nothing_is_allocated(plan):
    pytest.importorskip("triton", reason="triton exists for Linux only")
    # N x V is 4 TB, the head 32 GB
    sizes = ("--n", "1_000_000", "--hidden_size", "16384", "--vocab_size", "1000000")
    report = plan("--device", "cuda", *sizes)
    (found,) = report["plans"]
    assert report["ok"]
    assert (report["shape"]["arch"], report["shape"]["here"]) == ("sm_90", False)
    assert (found["backend"], found["path"], found["gemm"]) == ("triton", "one_pass", "cuBLAS")
    assert "no run on sm_90 is in kernels/configs.py" in found["why_gemm"]
    assert found["tflop"] == 4 * 1e6 * 16384 * 1e6 / 1e12
    assert found["eager_mib"] == 1e12 * (2 + 4 + 4) / (1 << 20)


@pytest.mark.usefixtures("no_gpu")
def test_who_multiplies_and_why(plan, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="triton exists for Linux only")
    from fastdpo.kernels import configs

    def products(*arguments: str) -> tuple[str, str]:
        (found,) = plan(*arguments)["plans"]
        return found["gemm"], found["why_gemm"]

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
    (found,) = plan("--arch", "sm_90")["plans"]
    tile = configs.fold_config("sm_90")
    assert found["kernel_tile"].startswith(
        f"{tile.block_rows} x {tile.block_cols} x {tile.block_k}, {tile.warps} warps"
    )


@pytest.mark.usefixtures("no_gpu")
def test_without_triton_a_gpu_runs_the_tiled_path(plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(doctor_plan, "choose_backend", lambda *_: "tiled")  # it remembers that triton is there
    report = plan("--device", "cuda")
    (found,) = report["plans"]
    assert (found["backend"], found["why_backend"]) == ("tiled", "triton is not installed")
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
    (found,) = plan("--device", "cpu")["plans"]
    assert (found["path"], found["peak_mib"]) == ("eager", None)
    _, out, _ = run("--skip_self_test", "--device", "cpu")
    assert re.search(r"head: trained head +eager +- +6\.46 +as eager", out)


@pytest.mark.parametrize(
    ("config", "wanted"),
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
def test_a_models_folder_gives_sizes_dtype_and_logits(plan, tmp_path: Path, config: dict, wanted: dict):
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 96, "vocab_size": 3200}))
    shape = plan("-m", str(tmp_path), "--device", "cpu")["shape"]
    assert (shape["h"], shape["v"]) == (96, 3200)
    assert {name: shape[name] for name in wanted} == wanted
    given = plan("-m", str(tmp_path), "--vocab-size", "64", "--dtype", "float32", "--device", "cpu")["shape"]
    assert (given["h"], given["v"], given["dtype"]) == (96, 64, "float32")


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


# the machine


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
    found = machine.findings({**GOOD, **installed}, build, cards, wants_gpu=False)
    if text is None:
        assert found == []
        return
    (finding,) = found
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


# the self-test


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("N", 24), ("H", 40), ("V", 203)):
        monkeypatch.setattr(self_test, name, size)


def rounded_logits(hidden, weight, labels, *, bias=None, rows=None, **options):
    """The usual mistake: logits in the operands' dtype."""
    z = reference.logits(hidden.float(), weight.float(), bias, **options).bfloat16().float()
    return reference.logprob(z if rows is None else z[rows], labels)


def scaled_gradient(*args, **options):
    out = linear_logprob(*args, **options)
    return out if not out.requires_grad else out.detach() + 1.05 * (out - out.detach())


calls = [0]


def other_bits_each_time(*args, **options):
    calls[0] += 1
    return linear_logprob(*args, **options) * (1 + 1e-6 * calls[0])


def without_gradient(*args, **options):
    return linear_logprob(*args, **options).detach()


def raises(*args, **options):
    raise RuntimeError("no kernel image is available")


def not_a_number(*args, **options):
    return linear_logprob(*args, **options) * float("nan")


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (rounded_logits, r"bfloat16 on cpu, plain: stats: error of a log-prob in nats \S+, limit 1\.0e-04"),
        (scaled_gradient, r"float32 on cpu, plain: one_pass: relative error of a row of d hidden 5\.\d+e-02, limit 1"),
        (scaled_gradient, r"float32 on cpu, plain: kept: error of d weight over its limit \S+, limit 1\.0e\+00"),
        (other_bits_each_time, r"float32 on cpu, plain: stats: a second run gives other bits"),
        (other_bits_each_time, r"bfloat16 on cpu, .*recompute: log-probs are not the bits of the reference pass"),
        (without_gradient, r"float32 on cpu, plain: one_pass: gives logp and not dh, logp"),
        (raises, r"float32 on cpu, plain: RuntimeError: no kernel image is available"),
        (not_a_number, r"float32 on cpu, plain: stats: error of a log-prob in nats nan, limit 1\.0e-04"),
    ],
)
@pytest.mark.usefixtures("small")
def test_the_self_test_sees_a_wrong_op(run: Run, monkeypatch: pytest.MonkeyPatch, wrong: Callable, line: str):
    monkeypatch.setattr(self_test, "linear_logprob", wrong)
    code, out, _ = run("--device", "cpu")
    assert code == 1
    assert re.search(rf"^FAILED: self-test: tiled {line}", out, re.M), out
    assert re.search(r"^self-test on cpu .*: FAILED in ", out, re.M)
    assert out.endswith("not all is well: see the lines above\n")


@pytest.mark.usefixtures("small")
def test_the_self_test_sees_another_path_than_the_one_meant(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(self_test.PATHS, "kept", ((True, True), "0"))
    result = self_test.self_test(torch.device("cpu"))
    assert not result["passed"]
    assert result["rows"][0]["failures"][0].startswith("plain: kept: the plan is recompute: tiles of ")


def test_the_environment_is_as_it_was_after_a_self_test(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", "77")
    before = dict(os.environ)
    with self_test._settings("fused", "0"):
        assert os.environ["FASTDPO_GEMM"] == "triton"
    assert dict(os.environ) == before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("fused", torch.bfloat16), ("fused", torch.float16)],
)
def test_the_backends_of_a_gpu_pass_it_too(backend: str, dtype: torch.dtype):
    """Interpreted where no GPU is."""
    pytest.importorskip("triton", reason="triton exists for Linux only")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems = {name: self_test._problem(dtype, device, options) for name, options in self_test.CASES.items()}
    row = self_test._row(backend, dtype, problems)
    assert row["failures"] == []
    assert set(row["errors"]) == {"logp", "relative", "dh", "dw", "db"}


def test_which_backends_are_tested_where(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="triton exists for Linux only")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    backends = self_test._backends
    assert backends(cpu, torch.bfloat16) == ["tiled"]  # interpreted kernels are no test of the device
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends(cuda, torch.bfloat16) == ["tiled"]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backends(cuda, torch.bfloat16) == ["tiled", "triton", "fused"]
    assert backends(cuda, torch.float32) == ["tiled", "triton"]
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backends(cuda, torch.bfloat16) == ["tiled"]


# the kernels


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
