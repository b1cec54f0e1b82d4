"""Gradients of gradients are refused, never left out, and what is saved is watched for changes in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.losses.modules import FusedLinearDPOLoss
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_stats
from fastdpo.ops.linear_logprob.settings import STATS
from fastdpo.ops.logprob import logprob
from fastdpo.ops.sequence import segment_sum, sequence_logprob

N, H, V = 12, 16, 70  # of `operands`
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def head_cases(operands: Callable[..., list[Tensor]]) -> dict[str, Callable[[Tensor], Any]]:
    """Every path whose gradient of x (N, H) is made without what it depends on, and trained ones beside."""
    _, weight, bias, labels = operands((0, 0, 0))
    trained, u, b = weight.clone().requires_grad_(), torch.randn(N, 2), torch.randn(V, 2)
    ignored = labels.clone()
    ignored[0] = -100
    pairs_of = {"ignore_index": -100, "bias": bias, "softcap": 3.0}
    return {
        "one_pass": lambda x: linear_logprob(x, weight, labels),
        "bias, softcap, ignored": lambda x: linear_logprob(x, weight, ignored, **pairs_of),
        "rows": lambda x: linear_logprob(x, weight, labels[:3], rows=torch.tensor([1, 1, 0])),
        "entropy": lambda x: linear_logprob_stats(x, weight, labels, stats=("entropy",)).entropy,
        "logged entropy": lambda x: linear_logprob_stats(x, weight, labels, stats=STATS, entropy_grad=False).logprob,
        "lora": lambda x: linear_logprob(x, weight, labels, lora=(u, b)),
        "lora's u": lambda x: linear_logprob(x.detach(), weight, labels, lora=(x[:, :2], b)),
        "lora's u and x": lambda x: linear_logprob(x, weight, labels, lora=(x[:, :2], b)),
        "trained": lambda x: linear_logprob(x, trained, labels),
        "trained bias": lambda x: linear_logprob(x, weight, labels, bias=bias.clone().requires_grad_()),
        "trained lora": lambda x: linear_logprob(x, weight, labels, lora=(u, b.clone().requires_grad_())),
        "sequence": lambda x: sequence_logprob(x[None], weight, labels[None]),
        "logprob": lambda x: logprob(x @ weight.t(), labels),
        "loss": lambda x: FusedLinearDPOLoss("simpo")(weight, x[:4].view(2, 2, -1), labels[:4].view(2, 2))[0],
    }


def test_a_second_derivative_is_refused(operands):
    hidden, weight, _, labels = operands()
    logits = torch.randn(N, V, requires_grad=True)
    for name, value, leaf in (
        ("linear_logprob", linear_logprob(hidden, weight, labels), hidden),
        ("logprob", logprob(logits, labels), logits),
    ):
        (grad,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{name} can be differentiated once"):
            grad.sum().backward()
    values = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(
        segment_sum(values, torch.tensor([0, 2, 5])).square().sum(), values, create_graph=True
    )
    grad.sum().backward()  # a sum can be differentiated for ever
    assert values.grad is not None
    assert torch.allclose(values.grad, torch.tensor([4.0, 4.0, 6.0, 6.0, 6.0]))


@pytest.mark.parametrize(
    ("backend", "keep", "compiled"),
    [("tiled", "0", False), ("tiled", "64", False), ("triton", "64", False), ("tiled", "64", True)],
    ids=["recompute", "kept", "triton", "compiled"],
)
def test_a_gradient_penalty_never_counts_for_nothing(backend, keep, compiled, monkeypatch, operands):
    monkeypatch.setenv("FASTDPO_BACKEND", backend)
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    few = compiled or backend == "triton"
    for name in ("one_pass", "entropy", "lora's u", "logprob") if few else head_cases(operands):
        op = head_cases(operands)[name]
        op = torch.compile(op, backend="eager") if compiled else op
        layer = torch.nn.Linear(H, H)

        def penalized(op=op, layer=layer) -> tuple[Tensor, Tensor, Tensor]:
            x = layer(torch.ones(N, H))
            loss = op(x).sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            return loss, grad, grad.square().sum()

        words = r"can be differentiated once.*FASTDPO_BACKEND=reference"
        loss, grad, penalty = penalized()
        with pytest.raises(RuntimeError, match=words):
            (loss + penalty).backward()
        loss, _, penalty = penalized()
        with pytest.raises(RuntimeError, match=words):  # the loss alone reaches these parameters
            torch.autograd.grad(loss + penalty, list(layer.parameters()), allow_unused=True)
        loss, grad, _ = penalized()
        loss.backward(retain_graph=True)  # a gradient that nobody differentiates is one
        assert layer.bias.grad is not None, name
        assert torch.allclose(grad.detach().sum(0), layer.bias.grad, atol=1e-5), name


def test_the_reference_backend_has_second_derivatives(monkeypatch, operands):
    monkeypatch.setenv("FASTDPO_BACKEND", "reference")
    hidden, weight, bias, labels = (x.detach().double() if x.is_floating_point() else x for x in operands())
    labels[0] = -100

    def op(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
        stats = linear_logprob_stats(x, w, labels, bias=c, softcap=3.0, stats=("entropy",))
        assert stats.entropy is not None
        return stats.logprob + stats.entropy

    leaves = [x[:3].requires_grad_() if x is hidden else x.requires_grad_() for x in (hidden, weight, bias)]
    labels = labels[:3]
    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_changes_in_place_are_noticed(operands):
    for changed in range(3):
        args = [x for x in operands() if x.dim() != 1 or x.dtype == torch.int64]
        out = linear_logprob(*args)
        with torch.no_grad():
            args[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    hidden, weight, _, labels = operands((1, 0, 0))
    out = linear_logprob(hidden, weight, labels)
    weight.zero_()  # a frozen head is not needed again
    out.sum().backward()
