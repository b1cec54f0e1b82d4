"""What stands for TRL's `_ChunkedLogProbFunction`: its results and their gradients, against float64."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.integrations import trl_head
from fastdpo.integrations.trl import patch_trl

pytest.importorskip("trl")
utils: Any = importlib.import_module("trl.trainer.utils")
F64 = torch.float64
ALL = ("log_probs", *trl_head.OUTPUTS)


# its contract: (hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)


def operands(n: int, h: int = 24, v: int = 203, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """hidden (n, h), weight (v, h), bias (v,), peaked like a trained model's, and targets (n,)."""
    targets = torch.randint(0, v, (n,))
    weight, bias = torch.randn(v, h), torch.randn(v)
    hidden = 0.4 * torch.randn(n, h) + torch.rand(n, 1) * 0.3 * weight[targets]
    return [x.to(dtype) for x in (hidden, weight, bias)], targets


def through_the_patch(tensors: list[Tensor], targets: Tensor, options: dict[str, Any], outputs: Any = ALL) -> Any:
    hidden, weight, bias = tensors
    values = [options.get(name, value) for name, value in (("temperature", 1.0), ("softcap", None), ("scale", 1.0))]
    return utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias if options.get("bias", True) else None, targets, values[0], 64, *values[1:], outputs
    )


def defined(tensors: list[Tensor], targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    hidden, weight, bias = (x.to(F64) for x in tensors)
    z = (hidden @ weight.t() + (bias if options.get("bias", True) else 0.0)) * options.get("scale", 1.0)
    cap = options.get("softcap")
    z = (z if cap is None else cap * torch.tanh(z / cap)) / options.get("temperature", 1.0)
    p = z.softmax(-1)
    return {
        "log_probs": z.log_softmax(-1).gather(1, targets[:, None])[:, 0],
        "entropy": -(p * z.log_softmax(-1)).sum(1),
        "log_sum_sq_probs": (p**2).sum(1).log(),
        "mean_logits": z.mean(1),
        "is_top1": z.argmax(1) == targets,
    }


OPTIONS = {
    "plain": {"bias": False},
    "bias": {},
    "temperature": {"temperature": 0.7, "bias": False},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "all": {"softcap": 5.0, "scale": 1.5, "temperature": 1.3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_outputs_and_gradients_are_those_of_float64(options, dtype):
    tensors, targets = operands(41, dtype=dtype)
    up, up_entropy = torch.randn(41), torch.randn(41)
    exact = [x.to(F64).requires_grad_() for x in tensors]
    truth = defined(exact, targets, options)
    loss = (truth["log_probs"] * up).sum() + (truth["entropy"] * up_entropy).sum()
    used = exact if options.get("bias", True) else exact[:2]
    true_grads = torch.autograd.grad(loss, used)
    with patch_trl():
        for asked_before in (False, True):
            assert trl_head.EntropyOnDemand.asked_for is asked_before
            leaves = [x.clone().requires_grad_() for x in tensors]
            results = dict(zip(ALL, through_the_patch(leaves, targets, options), strict=True))
            for name, x in results.items():
                assert x.shape == (41,)
                assert x.dtype == (torch.bool if name == "is_top1" else torch.float32)
                assert x.requires_grad == (name in ("log_probs", "entropy"))
                assert float((x.detach().to(F64) - truth[name].detach().to(F64)).abs().max()) <= 2e-5, name
            assert 0 < int(results["is_top1"].sum()) < 41
            ((results["log_probs"] * up).sum() + (results["entropy"] * up_entropy).sum()).backward()
            for leaf, t in zip(leaves, true_grads, strict=False):
                assert leaf.grad.dtype == dtype
                limit = (2e-5 if dtype == torch.float32 else 1.2e-2) * float(t.abs().max())
                assert float((leaf.grad.to(F64) - t).abs().max()) <= limit


def test_a_wrong_scale_would_be_seen():
    tensors, targets = operands(41)
    with patch_trl():
        logps = through_the_patch(tensors, targets, {"scale": 1.01})[0]
    assert float((logps - defined(tensors, targets, {})["log_probs"]).abs().max()) > 1e-3


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "is_top1"), ("mean_logits", "log_sum_sq_probs"), ()])
def test_only_the_outputs_that_are_asked_for(outputs):
    tensors, targets = operands(5)
    with patch_trl():
        results = dict(zip(ALL, through_the_patch(tensors, targets, {}, outputs), strict=True))
    assert {name for name, x in results.items() if x is not None} == {"log_probs", *outputs}


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 1)], ids=["hidden", "weight", "bias", "hidden, weight"])
@pytest.mark.parametrize("asked_before", [False, True], ids=["on demand", "at once"])
def test_the_entropy_alone_is_differentiated(needs, asked_before, monkeypatch):
    tensors, targets = operands(17, dtype=F64)
    with patch_trl():
        monkeypatch.setattr(trl_head.EntropyOnDemand, "asked_for", asked_before)
        leaves = [x.requires_grad_(i in needs) for i, x in enumerate(tensors)]
        inputs = [leaves[i] for i in needs]
        gradients = torch.autograd.grad((through_the_patch(leaves, targets, {})[1] ** 2).sum(), inputs)
    truth = torch.autograd.grad((defined(leaves, targets, {})["entropy"] ** 2).sum(), inputs)
    for a, t in zip(gradients, truth, strict=True):
        assert float((a - t).abs().max()) <= 1e-10


def test_an_entropy_that_is_only_logged_costs_no_gradient(monkeypatch):
    asked = []
    run = trl_head.linear_logprob_stats
    monkeypatch.setattr(
        trl_head, "linear_logprob_stats", lambda *a, **k: asked.append(k["entropy_grad"]) or run(*a, **k)
    )
    tensors, targets = operands(9)
    tensors[0].requires_grad_()
    with patch_trl():
        for _ in range(2):
            logps, entropy, *_ = through_the_patch(tensors, targets, {})
            (logps.sum() + entropy.detach().sum()).backward()
        assert asked == [False, False]
        through_the_patch(tensors, targets, {})[1].sum().backward()
        through_the_patch(tensors, targets, {})
        assert asked == [False] * 3 + [True, True]
    with patch_trl():  # another run starts anew
        through_the_patch(tensors, targets, {})
    assert asked[-1] is False


def test_under_autocast_the_entropy_s_gradient_is_that_of_the_rounded_operands():
    tensors, targets = operands(33)
    rounded = [x.bfloat16() for x in tensors[:2]]
    exact = [*(x.to(F64).requires_grad_() for x in rounded), tensors[2].to(F64)]
    truth = torch.autograd.grad(defined(exact, targets, {})["entropy"].sum(), exact[:2])
    gradients = []
    with patch_trl():
        for _ in ("on demand", "at once"):
            leaves = [x.clone().requires_grad_() for x in tensors]
            with torch.autocast("cpu", torch.bfloat16):
                entropy = through_the_patch(leaves, targets, {})[1]
            entropy.sum().backward()
            gradients.append([x.grad for x in leaves])
            for grad, t in zip(gradients[-1], truth, strict=False):
                assert grad.dtype == torch.float32
                assert float((grad - t).abs().max()) <= 1.2e-2 * float(t.abs().max())
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_of_equal_logits_every_one_is_the_largest():
    weight = torch.ones(5, 3)
    with patch_trl():
        results = utils._ChunkedLogProbFunction.apply(torch.ones(5, 3), weight, None, torch.arange(5), 1.0, 64)
    assert results[4].all()
