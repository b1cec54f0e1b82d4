"""What only a GPU can show: kernels compiled, real shapes, memory of the allocator, offsets past 2^31, equal bits.

`pytest -m gpu` runs these and nothing else: a process either compiles kernels or interprets them.
"""

import math
import os

import pytest
import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted; run pytest -m gpu"),
]

MODES = {"forward": (False, False), "frozen": (True, False), "trained": (True, True)}
HEADS = {"qwen2.5-0.5b": (896, 151936), "llama-3.2-1b": (2048, 128256), "odd": (1001, 50257)}


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
    plan = linear_logprob_plan(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert plan.fused == (gemm == "triton")
    assert plan.path == ("recompute" if keep == "0" else "kept")
    results = run(hidden, weight, labels, (True, True))
    up = torch.linspace(-1, 1, n, device="cuda", dtype=torch.float64)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = reference.linear_logprob(*wide, labels)
    truth.backward(up)
    exact = [x.grad for x in wide if x.grad is not None]
    assert float((results[0] - truth.detach()).abs().max()) <= 1e-4
    live = up.abs() > 1e-3
    rows = (results[1] - exact[0])[live].norm(dim=1) / exact[0][live].norm(dim=1)
    assert float(rows.max()) <= 1.2e-2
    columns = labels.unique()
    error = (results[2][columns] - exact[1][columns]).norm(dim=1) / exact[1][columns].norm(dim=1)
    assert float(error.max()) <= 1.2e-2
    again = run(hidden, weight, labels, (True, True))
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert torch.equal(run(hidden, weight, labels, (False, False))[0], results[0])


OPTIONS = {
    "plain": {},
    "bias, scales": {"bias": True, "temperature": 0.8, "logit_scale": 1.1},
    "softcap": {"bias": True, "softcap": 20.0},
    "lora": {"lora": True},
    "rows, ignored": {"rows": True, "ignored": True},
    "everything": {"bias": True, "softcap": 20.0, "lora": True, "rows": True, "ignored": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("keep", ["0", "2048"], ids=["recompute", "kept"])
def test_options_statistics_and_gradients_against_fp64(gemm, keep, dtype, options, monkeypatch):
    """As test_linear_logprob.py does on a CPU: every gradient, every statistic, at a size of several tiles."""
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "8")
    chosen = dict(OPTIONS[options])
    n, h, v, r = 300, 512, 20011, 8
    hidden, weight, labels = peaked(n, h, v, dtype)
    leaves = {"hidden": hidden, "weight": weight}
    if chosen.pop("bias", False):
        leaves["bias"] = (torch.randn(v, device="cuda") / 4).to(dtype)
    lora = chosen.pop("lora", False)
    if lora:
        leaves["u"] = torch.randn(n, r, device="cuda").to(dtype)
        leaves["b"] = (torch.randn(v, r, device="cuda") / 8).to(dtype)
    if chosen.pop("rows", False):
        chosen["rows"] = torch.randint(0, n, (n,), device="cuda")
    if chosen.pop("ignored", False):
        labels = labels.masked_fill(torch.rand(n, device="cuda") < 0.3, -100)
    up = torch.linspace(-1, 1, n, device="cuda")
    names = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "lse")

    def step(wide: bool):
        parts = {k: (x.double() if wide else x).detach().requires_grad_() for k, x in leaves.items()}
        extra = {**chosen, "bias": parts.get("bias")}
        if wide:
            rows = chosen.get("rows", torch.arange(n, device="cuda"))
            head = parts["weight"]
            states = parts["hidden"][rows]
            z = states @ head.T + (parts["u"][rows] @ parts["b"].T if lora else 0)
            z = z if parts.get("bias") is None else z + parts["bias"]
            z = z * chosen.get("logit_scale", 1.0)
            cap = chosen.get("softcap")
            z = (cap * torch.tanh(z / cap) if cap else z) / chosen.get("temperature", 1.0)
            scored = labels >= 0
            logprob = reference.logprob(z, labels.clamp(min=0)) * scored
            stats = {k: x * scored for k, x in reference.token_stats(z, labels.clamp(min=0)).items()}
        else:
            pair = (parts["u"], parts["b"]) if lora else None
            out = linear_logprob_stats(
                parts["hidden"], parts["weight"], labels, lora=pair, stats=names, entropy_grad=False, **extra
            )
            logprob, stats = out.logprob, {name: getattr(out, name) for name in names}
        logprob.backward(up.to(logprob.dtype))
        return logprob.detach(), stats, {k: x.grad for k, x in parts.items()}

    ours, truth = step(False), step(True)
    assert float((ours[0] - truth[0]).abs().max()) <= 1e-4
    for name in names:
        error = (ours[1][name].double() - truth[1][name].detach().double()).abs()
        if name == "is_top1":
            assert int((error > 0).sum()) <= 1  # a tie of rounded logits
        else:
            assert float(error.max()) <= 2e-4 * max(1.0, float(truth[1][name].detach().double().abs().max())), name
    bound = 1e-3 if dtype == torch.float32 else 1.2e-2
    for name, gradient in truth[2].items():
        own = ours[2][name]
        assert own is not None
        assert gradient is not None
        error = (own - gradient).norm() / gradient.norm()
        assert float(error) <= bound, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep", ["0", "2048"], ids=["recompute", "kept"])
@pytest.mark.parametrize("form", ["plain", "rows", "autocast", "autocast, rows"])
def test_peak_memory_is_as_planned(gemm, form, mode, keep, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    n = 4096
    hidden, weight, labels = peaked(n, 2048, 128256, torch.float32 if "autocast" in form else torch.bfloat16)
    options = {"rows": torch.randperm(n, device="cuda")} if "rows" in form else {}
    needs = MODES[mode]
    leaves = [x.detach().requires_grad_(k) for x, k in zip((hidden, weight), needs, strict=True)]
    autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled="autocast" in form)
    with autocast:
        plan = linear_logprob_plan(*leaves, labels, **options)
    assert plan.fused == (gemm == "triton")
    up = torch.linspace(-1, 1, n, device="cuda")

    def step():
        for x in leaves:
            x.grad = None
        with autocast:
            out = linear_logprob(*leaves, labels, **options)
        if any(needs):
            out.backward(up)
        return out

    step()  # compiles, and lets cuBLAS take its workspace
    for x in leaves:
        x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    assert 0.3 * plan.peak_bytes < peak <= plan.peak_bytes + (2 << 20), f"{peak=} {plan=}"


def test_more_than_two_to_the_31_logits_in_all(gemm):
    n, h, v = 70000, 64, 50257
    hidden, weight, labels = peaked(n, h, v)
    results = run(hidden, weight, labels, (True, False))
    for rows in (slice(0, 64), slice(n - 64, n)):
        wide = hidden[rows].double().requires_grad_()
        truth = reference.linear_logprob(wide, weight.double(), labels[rows])
        truth.backward(torch.linspace(-1, 1, n, device="cuda", dtype=torch.float64)[rows])
        assert float((results[0][rows] - truth.detach()).abs().max()) <= 1e-4
        assert wide.grad is not None
        assert float((results[1][rows] - wide.grad).norm() / wide.grad.norm()) <= 1.2e-2


def test_offsets_past_two_to_the_31_in_one_tensor(gemm, monkeypatch):
    """A weight and a kept tile of more than 2^31 elements each: wrong columns at their ends would show."""
    monkeypatch.setenv("FASTDPO_KEEP_MB", "8192")
    n, h, v = 17000, 16800, 128256
    weight = torch.empty(v, h, device="cuda").normal_(std=0.02).bfloat16().requires_grad_()
    hidden = torch.empty(n, h, device="cuda").normal_().bfloat16().requires_grad_()
    labels = torch.randint(0, v, (n,), device="cuda")
    last = slice(n - 16, n)
    labels[last] = torch.arange(v - 16, v, device="cuda")  # columns past 2^31 / h
    plan = linear_logprob_plan(hidden, weight, labels)
    assert (plan.path, plan.fused) == ("kept", gemm == "triton")
    up = torch.zeros(n, device="cuda")
    up[last] = torch.linspace(-1, 1, 16, device="cuda") + 0.1
    logps = linear_logprob(hidden, weight, labels)
    logps.backward(up)
    states = hidden.detach()[last].double()
    parts = [states @ weight.detach()[part].double().t() for part in torch.arange(v, device="cuda").split(16384)]
    z = torch.cat(parts, 1)
    assert float((logps.detach()[last] - reference.logprob(z, labels[last])).abs().max()) <= 1e-4
    d = -z.softmax(-1)
    d[torch.arange(16, device="cuda"), labels[last]] += 1
    d *= up[last, None]
    for columns in (slice(0, 16), slice(v - 16, v)):
        expected = d[:, columns].t() @ states
        assert weight.grad is not None
        assert float((weight.grad[columns].double() - expected).norm() / expected.norm()) <= 1.2e-2
    expected = sum(d[:, part] @ weight.detach()[part].double() for part in torch.arange(v, device="cuda").split(16384))
    assert hidden.grad is not None
    assert float((hidden.grad[last].double() - expected).norm() / expected.norm()) <= 1.2e-2
