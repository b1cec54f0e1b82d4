"""The self-test of `fastdpo doctor` can fail, and leaves the environment as it was."""

import os
import re
import sys
from collections.abc import Callable

import pytest
import torch

from fastdpo.cli.doctor import self_test
from fastdpo.ops import reference
from fastdpo.ops.linear_logprob.api import linear_logprob

Run = Callable[..., tuple[int, str, str]]


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
