"""The command: help without torch, one sentence for what is wrong, the same under both of its names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdpo.cli import main

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_needs_nothing_heavy_and_tells_the_defaults():
    code = "import sys; from fastdpo.cli import main; assert main(['bench', '--help']) == 0; "
    printed = python("-c", code + "print([m for m in ('torch', 'numpy', 'matplotlib', 'trl') if m in sys.modules])")
    assert printed.endswith("[]\n")
    assert printed.startswith("usage: fastdpo bench [CASE ...] [arguments]\n")
    said = " ".join(printed.split())
    assert "JSON and PNG (default: bench_results)" in said
    assert "fails the run (default: 1.15)" in said
    assert "(default: 512 on a CPU, 64 with --quick, 2048 on a GPU)" in said


def test_the_module_is_the_same_command():
    module, command = python("-m", "bench.run", "-h"), python("-m", "fastdpo", "bench", "-h")
    assert module.replace("python -m bench.run", "fastdpo bench") == command


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--quik"], "there is no argument '--quik': did you mean '--quick'?"),
        (["linear_logprobs"], "there is no case 'linear_logprobs': did you mean 'linear_logprob'?"),
        (["--quick", "train"], "there is no case 'train': did you mean 'train_step'?"),
        (["--quick", "sft"], "there is no case 'sft': choose from linear_logprob, dpo_loss, train_step"),
        (["--rounds", "0"], "--rounds: should be a whole number, at least 1, got '0'"),
        (["--rounds", "2.5"], "--rounds: should be a whole number, at least 1, got '2.5'"),
        (["--threshold", "0.9"], "--threshold: should be a number, at least 1, got '0.9'"),
        (["--memory-budget", "nan"], "--memory_budget: should be a number, at least 0, got 'nan'"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--out"], "--out: expected one argument"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(argv, said, capsys):
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastdpo bench: error: {said}")
    assert error.count("\n") == 1


def test_names_take_either_stroke_and_stand_in_any_order(bench):
    arguments = bench.arguments.parse(["--memory-budget=12", "dpo_loss", "--no-plot", "linear_logprob"], "p")
    assert (arguments.memory_budget, arguments.plot) == (12.0, False)
    assert arguments.benchmarks == ["dpo_loss", "linear_logprob"]


def test_an_interrupt_is_no_traceback(bench, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.benchmark, "run", interrupted)
    assert main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "fastdpo bench: interrupted; the cases that were finished are in the JSON\n"


def test_no_case_named_is_every_case_and_entries_are_each_cases_own(bench, tmp_path, capsys):
    shared = ["--device", "cpu", "--memory_budget", "0", "--out", str(tmp_path), "--rounds", "1"]
    assert main(["bench", *shared, "--entries", "fastdpo,trl"]) == 0
    written = sorted(path.name.partition("_cpu")[0] for path in tmp_path.glob("*.json"))
    assert written == ["dpo_loss", "linear_logprob", "train_step"]
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert main(["bench", *shared, "--entries", "liger eager"]) == 0
    assert [path.name.partition("_cpu")[0] for path in tmp_path.glob("*.json")] == ["dpo_loss"]
