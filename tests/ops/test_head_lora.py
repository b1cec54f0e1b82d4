"""A LoRA on the head: W and B side by side, never W + B A, with gradients to hidden, u = s A h, W, B and bias."""

import math
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob import prepare
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats

F64 = torch.float64
MIB = 1 << 20
NEEDS = {
    "frozen": (1, 0, 0, 1, 0),
    "adapter": (1, 0, 0, 1, 1),
    "adapter_alone": (0, 0, 0, 0, 1),
    "all": (1, 1, 1, 1, 1),
}


def inputs(n: int, h: int, v: int, r: int, dtype: torch.dtype = F64) -> tuple[list[Tensor], Tensor]:
    """hidden, weight, bias, u, B, and labels; peaked."""
    weight = torch.randn(v, h, dtype=F64) / math.sqrt(h)
    labels = torch.randint(0, v, (n,))
    hidden = torch.randn(n, h, dtype=F64) + torch.linspace(0, 8, n, dtype=F64)[:, None] * weight[labels]
    rest = torch.randn(v, dtype=F64) * 0.2, torch.randn(n, r, dtype=F64), torch.randn(v, r, dtype=F64) * 0.3
    return [x.to(dtype) for x in (hidden, weight, *rest)], labels


def grads(op, tensors: list[Tensor], needs: tuple[int, ...], up: Tensor, up_entropy: Tensor | None = None) -> list:
    leaves = [x.detach().requires_grad_(bool(k)) for x, k in zip(tensors, needs, strict=True)]
    outputs = op(*leaves)
    logp, *entropy = outputs if isinstance(outputs, tuple) else (outputs,)
    losses = [(logp * up).sum(), *((x * up_entropy).sum() for x in entropy)]
    sum(losses).backward()
    return [logp.detach(), *(x.detach() for x in entropy), *(x.grad for x in leaves)]


def defined(labels: Tensor, **options):
    def op(hidden, weight, bias, u, b):
        both = torch.cat((hidden, u), 1), torch.cat((weight, b), 1)
        return reference.linear_logprob(*both, labels, bias=bias, **options)

    return op


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_float64_is_exact(needs, keep, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "1")
    n = 23
    tensors, labels = inputs(n, 19, 2003, 5)
    labels[4] = -100
    up, up_entropy = torch.randn(n, dtype=F64), torch.randn(n, dtype=F64)
    rows = torch.randint(0, n, (n,))
    for softcap in (None, 6.0):
        options = {"softcap": softcap, "temperature": 1.2, "logit_scale": 0.9, "rows": rows}

        def ours(hidden, weight, bias, u, b, options=options):
            return linear_logprob(hidden, weight, labels, bias=bias, lora=(u, b), **options)

        def with_entropy(hidden, weight, bias, u, b, options=options):
            stats = linear_logprob_stats(hidden, weight, labels, bias=bias, lora=(u, b), stats=("entropy",), **options)
            return stats.logprob, stats.entropy

        def truth_with_entropy(hidden, weight, bias, u, b, softcap=softcap):
            both = torch.cat((hidden, u), 1), torch.cat((weight, b), 1)
            z = reference.logits(*both, bias, softcap=softcap, temperature=1.2, logit_scale=0.9)[rows]
            entropy = reference.token_stats(z, labels.clamp(min=0))["entropy"] * (labels != -100)
            return reference.logprob(z, labels), entropy

        for op, truth, ups in (
            (ours, defined(labels, **options), (up,)),
            (with_entropy, truth_with_entropy, (up, up_entropy)),
        ):
            for a, t in zip(grads(op, tensors, needs, *ups), grads(truth, tensors, needs, *ups), strict=True):
                assert (a is None) == (t is None)
                if a is not None:
                    assert float((a - t).abs().max()) <= 1e-12 * max(1.0, float(t.abs().max()))


@pytest.mark.parametrize("backend", ["tiled", "triton", "fused"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["fp32_adapter", "bf16_adapter"])
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_bf16_head(backend, adapter, keep, monkeypatch):
    monkeypatch.setenv("FASTDPO_BACKEND", "tiled" if backend == "tiled" else "triton")
    monkeypatch.setenv("FASTDPO_GEMM", "triton" if backend == "fused" else "cublas")
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    n = 21
    tensors, labels = inputs(n, 24, 203, 4, torch.bfloat16)
    tensors[3:] = [x.to(adapter) + (1e-3 if adapter == torch.float32 else 0.0) for x in tensors[3:]]
    up = torch.linspace(-1, 1, n)

    def ours(hidden, weight, bias, u, b):
        plan = linear_logprob_plan(hidden, weight, labels, bias=bias, lora=(u, b))
        assert plan.fused == (backend == "fused" and adapter == torch.bfloat16)
        return linear_logprob(hidden, weight, labels, bias=bias, lora=(u, b))

    truth = grads(defined(labels), [x.to(F64) for x in tensors], NEEDS["all"], up.to(F64))
    results = grads(ours, tensors, NEEDS["all"], up)
    assert float((results[0] - truth[0]).abs().max()) <= 1e-5
    for a, t, x in zip(results[1:], truth[1:], tensors, strict=True):
        assert a.dtype == x.dtype
        assert float((a.to(F64) - t).abs().max()) <= 1.2e-2 * float(t.abs().max())
    again = grads(ours, tensors, NEEDS["all"], up)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    # the control: without the adapter other numbers come out
    without = linear_logprob(tensors[0], tensors[1], labels, bias=tensors[2])
    assert float((without - truth[0]).abs().max()) > 1e-2


def test_an_adapter_that_adds_nothing_changes_no_bit():
    """B = 0, as a LoRA starts: policy and reference (the adapter switched off) agree to the last bit."""
    tensors, labels = inputs(30, 64, 700, 4, torch.bfloat16)
    hidden, weight, bias, u, b = tensors
    b = torch.zeros_like(b).requires_grad_()
    with torch.no_grad():
        reference_logps = linear_logprob(hidden, weight, labels, bias=bias)
    policy = linear_logprob(hidden.requires_grad_(), weight, labels, bias=bias, lora=(u, b))
    assert torch.equal(policy.detach(), reference_logps)
    policy.sum().backward()
    assert float(b.grad.abs().max()) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_peft_s_own_layer_on_the_head_gives_the_same(dropout):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(16, 101, bias=False, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(x)

    model = get_peft_model(Model(), LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["lm_head"]))
    model = model.double()
    layer = cast(Any, model.base_model).model.lm_head
    nn.init.normal_(layer.lora_B["default"].weight)
    hidden, labels = torch.randn(12, 16, dtype=F64, requires_grad=True), torch.randint(0, 101, (12,))
    adapter = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    by_route = []
    for fused in (False, True):
        torch.manual_seed(1)
        if fused:
            dropped = layer.lora_dropout["default"](hidden)
            u = layer.scaling["default"] * dropped @ adapter[0].t()
            logp = linear_logprob(hidden, layer.base_layer.weight, labels, lora=(u, adapter[1]))
        else:
            logp = torch.log_softmax(model(hidden), -1).gather(1, labels[:, None])[:, 0]
        by_route.append((logp.detach(), *torch.autograd.grad((logp * torch.arange(12)).sum(), (hidden, *adapter))))
    for a, b in zip(*by_route, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", ["0", "1024"], ids=["recompute", "kept"])
def test_cost_is_as_planned_and_nothing_is_concatenated(keep, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "4")
    tensors, labels = inputs(300, 256, 12000, 8, torch.float32)
    hidden, weight, bias, u, b = tensors
    for x in (hidden, u, b):
        x.requires_grad_()
    plan = linear_logprob_plan(hidden, weight, labels, bias=bias, lora=(u, b))

    def step() -> None:
        for x in (hidden, u, b):
            x.grad = None
        linear_logprob(hidden, weight, labels, bias=bias, lora=(u, b)).sum().backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 0 < peak <= plan.peak_bytes
    if keep == "0":
        assert plan.peak_bytes < weight.numel() * 4, "less than a copy of W"
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == plan.flops


def test_it_compiles(monkeypatch):
    tensors, labels = inputs(12, 16, 300, 4, torch.float32)
    monkeypatch.setattr(prepare, "reads_are_free", lambda _: False)

    def op(hidden, weight, bias, u, b):
        return linear_logprob(hidden, weight, labels, bias=bias, lora=(u, b))

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    up = torch.ones(12)
    for needs in NEEDS.values():
        pairs = zip(grads(op, tensors, needs, up), grads(compiled, tensors, needs, up), strict=True)
        assert all(a is b or torch.equal(a, b) for a, b in pairs)


def test_bad_pairs_get_one_sentence():
    tensors, labels = inputs(6, 8, 40, 2, torch.float32)
    hidden, weight, _, u, b = tensors
    for lora, words in (
        ((u, b[:-1]), r"lora must be of shapes \(6, r\) and \(40, r\), got \(6, 2\) and \(39, 2\)"),
        ((u[:3], b), r"got \(3, 2\)"),
        ((u, b, b), r"must be the pair \(s \* A h, B\), got 3 values"),
        ((u[:, :0], b[:, :0]), "has rank 0; leave it out"),
        ((u, b.bfloat16()), r"s \* A h is torch.float32 and B torch.bfloat16; cast one"),
        ((u.double(), b.double()), "float64 goes with float64 only"),
        ((u.long(), b), "must be float32, bfloat16, float16 or float64, got torch.int64"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            linear_logprob(hidden, weight, labels, lora=lora)
