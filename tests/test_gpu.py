"""What only a GPU can show: real shapes, memory of the allocator, offsets past 2^31, bits from run to run."""

import math

import pytest
import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob import linear_logprob, linear_logprob_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODES = {"forward": (False, False), "frozen": (True, False), "trained": (True, True)}
HEADS = {"qwen2.5-0.5b": (896, 151936), "llama-3.2-1b": (2048, 128256), "odd": (1000, 50257)}


@pytest.fixture(params=["cublas", "triton"])
def gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.undo()  # a poisoned torch.empty is no work of ours
    monkeypatch.setenv("FASTDPO_GEMM", request.param)
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    return request.param


def peaked(n: int, h: int, v: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(v, h, device="cuda") / math.sqrt(h)
    labels = torch.randint(0, v, (n,), device="cuda")
    hidden = torch.randn(n, h, device="cuda")
    hidden += (math.log(v) + torch.linspace(-6, 12, n, device="cuda"))[:, None] * weight[labels]
    return hidden.to(dtype), weight.to(dtype), labels


def run(hidden: Tensor, weight: Tensor, labels: Tensor, needs: tuple[bool, bool]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(k) for x, k in zip((hidden, weight), needs, strict=True)]
    out = linear_logprob(*leaves, labels)
    if any(needs):
        out.backward(torch.linspace(-1, 1, len(out), device="cuda"))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("keep", ["0", "2048"], ids=["recompute", "kept"])
@pytest.mark.parametrize("head", HEADS)
def test_real_heads_against_fp64(gemm, head, keep, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    h, v = HEADS[head]
    n = 600
    hidden, weight, labels = peaked(n, h, v)
    found = run(hidden, weight, labels, (True, True))
    up = torch.linspace(-1, 1, n, device="cuda", dtype=torch.float64)
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    truth = reference.linear_logprob(*wide, labels)
    truth.backward(up)
    exact = [x.grad for x in wide if x.grad is not None]
    assert float((found[0] - truth.detach()).abs().max()) <= 1e-4
    live = up.abs() > 1e-3
    rows = (found[1] - exact[0])[live].norm(dim=1) / exact[0][live].norm(dim=1)
    assert float(rows.max()) <= 1.2e-2
    columns = labels.unique()
    error = (found[2][columns] - exact[1][columns]).norm(dim=1) / exact[1][columns].norm(dim=1)
    assert float(error.max()) <= 1.2e-2
    again = run(hidden, weight, labels, (True, True))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(run(hidden, weight, labels, (False, False))[0], found[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep", ["0", "2048"], ids=["recompute", "kept"])
def test_peak_memory_is_as_planned(gemm, mode, keep, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    hidden, weight, labels = peaked(4096, 2048, 128256)
    needs = MODES[mode]
    leaves = [x.detach().requires_grad_(k) for x, k in zip((hidden, weight), needs, strict=True)]
    plan = linear_logprob_plan(*leaves, labels)
    run(hidden, weight, labels, needs)  # compiles, and lets cuBLAS take its workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run(hidden, weight, labels, needs)
    peak = torch.cuda.max_memory_allocated() - before
    del results
    assert 0 < peak <= plan.peak_bytes + (2 << 20), f"{peak=} {plan=}"


def test_more_than_two_to_the_31_logits(gemm):
    n, h, v = 70000, 64, 50257
    hidden, weight, labels = peaked(n, h, v)
    found = run(hidden, weight, labels, (True, False))
    for rows in (slice(0, 64), slice(n - 64, n)):
        wide = hidden[rows].double().requires_grad_()
        truth = reference.linear_logprob(wide, weight.double(), labels[rows])
        truth.backward(torch.linspace(-1, 1, n, device="cuda", dtype=torch.float64)[rows])
        assert float((found[0][rows] - truth.detach()).abs().max()) <= 1e-4
        assert wide.grad is not None
        assert float((found[1][rows] - wide.grad).norm() / wide.grad.norm()) <= 1.2e-2


def test_offsets_past_two_to_the_31_in_one_tensor(gemm, monkeypatch):
    """A weight and a kept tile of more than 2^31 elements each."""
    monkeypatch.setenv("FASTDPO_KEEP_MB", "8192")
    n, h, v = 17000, 16800, 128256
    hidden, weight = torch.randn(n, h, device="cuda").bfloat16(), torch.empty(v, h, device="cuda").normal_().bfloat16()
    labels = torch.randint(0, v, (n,), device="cuda")
    hidden /= 100
    found = linear_logprob(hidden.requires_grad_(), weight, labels)
    found.sum().backward()
    rows = slice(n - 16, n)
    z = hidden.detach()[rows].float() @ weight.float().t()
    assert float((found.detach()[rows] - reference.logprob(z, labels[rows])).abs().max()) <= 1e-3
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad[rows]).all())
