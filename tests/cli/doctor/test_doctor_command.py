"""`fastdpo doctor`: its help, its report as text and as JSON, and how it ends."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdpo.cli import main
from fastdpo.cli.command import _finite
from fastdpo.cli.doctor import command as doctor
from fastdpo.cli.doctor import machine

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., tuple[int, str, str]]


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
