"""Log-probs from logits, and the per-sequence reduction, against float64 on both backends."""

import math
from itertools import pairwise

import pytest
import torch

from fastdpo.ops import reference
from fastdpo.ops.logprob import logprob
from fastdpo.ops.sequence import segment_sum, sequence_logprob

F64 = torch.float64


@pytest.fixture(params=["tiled", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTDPO_BACKEND", request.param)
    return request.param


def run(op, logits, labels, up, **options):
    leaf = logits.detach().requires_grad_()
    out = op(leaf, labels, **options)
    out.backward(up.to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("v", [1, 2, 1003, 5000])
def test_against_fp64(backend, dtype, v):
    labels = torch.randint(0, v, (11,))
    labels[2] = -100
    logits = torch.randn(11, v) * 3
    logits[torch.arange(11), labels.clamp(min=0)] += torch.linspace(0, 18, 11)
    logits[4] -= 150
    logits = logits.to(dtype)
    up = torch.linspace(-1, 2, 11)
    found, grad = run(logprob, logits, labels, up, temperature=0.7)
    truth, true_grad = run(reference.logprob, logits.to(F64), labels, up, temperature=0.7)
    assert found.dtype == torch.float32
    assert grad.dtype == dtype
    assert bool(((found - truth).abs() <= 1e-6 + 2e-6 * truth.abs()).all())
    assert found[2] == 0
    assert bool((grad[2] == 0).all())
    # the entry of a confident target keeps its relative precision: 1 - p is not p - 1 rounded
    step = {torch.float32: 4e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    tiny = 6e-8 if dtype == torch.float16 else 1e-12
    assert bool(((grad - true_grad).abs() <= step * true_grad.abs() + tiny).all())


def test_float64_and_any_shape():
    logits, labels = torch.randn(2, 3, 17, dtype=F64), torch.randint(0, 17, (2, 3))
    found, grad = run(logprob, logits, labels, torch.ones(2, 3))
    truth, true_grad = run(reference.logprob, logits, labels, torch.ones(2, 3))
    assert found.dtype == F64
    assert torch.allclose(found, truth, rtol=1e-14)
    assert torch.allclose(grad, true_grad, rtol=1e-12, atol=1e-15)
    transposed = torch.randn(17, 6).t()
    assert torch.allclose(logprob(transposed, labels.view(-1)), reference.logprob(transposed, labels.view(-1)))


def test_bad_arguments_get_one_sentence():
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for change, words in (
        ({"labels": labels[:2]}, r"labels must be \(3,\) to match logits \(3, 5\), got \(2,\)"),
        ({"labels": torch.tensor([0, 5, 1])}, r"label 5 is outside the vocabulary \[0, 5\)"),
        ({"labels": labels.float()}, r"labels must be int64, got torch.float32"),
        ({"logits": logits.long()}, r"logits must be float32.* got torch.int64"),
        ({"temperature": -1.0}, r"temperature must be > 0, got -1.0"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            logprob(**{"logits": logits, "labels": labels, **change})


def test_segment_sum(backend):
    values = torch.randn(5000, requires_grad=True)
    offsets = torch.tensor([0, 0, 7, 7, 3000, 5000])
    out = segment_sum(values, offsets)
    exact = [values[a:b].detach().to(F64).sum() for a, b in pairwise(offsets)]
    assert torch.allclose(out.detach().to(F64), torch.stack(exact), atol=1e-4)
    assert out[0] == 0
    assert out[2] == 0
    assert torch.equal(out, segment_sum(values, offsets))
    up = torch.tensor([9.0, 1.0, 9.0, -2.0, 0.5])
    out.backward(up)
    assert values.grad is not None
    assert torch.equal(values.grad, torch.repeat_interleave(up, offsets.diff()))
    with pytest.raises(ValueError, match=r"offsets \(S \+ 1,\) int64"):
        segment_sum(values, offsets.float())
    assert segment_sum(values[:0], torch.tensor([0, 0])).tolist() == [0.0]


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprob(backend, average):
    hidden, weight = torch.randn(3, 6, 10, requires_grad=True), torch.randn(40, 10)
    labels = torch.randint(0, 40, (3, 6))
    labels[0, :4] = -100
    labels[2] = -100
    found = sequence_logprob(hidden, weight, labels, average=average)
    tokens = reference.linear_logprob(hidden.flatten(0, 1), weight, labels.flatten()).view(3, 6)
    expected = tokens.sum(1) / ((labels != -100).sum(1).clamp(min=1) if average else 1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert found[2] == 0
    found.sum().backward()
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())
    shifted = sequence_logprob(hidden, weight, labels, average=average, shift=True)
    aligned = sequence_logprob(hidden[:, :-1], weight, labels[:, 1:], average=average)
    assert torch.allclose(shifted, aligned)


def test_minus_infinity_elsewhere_is_certain(backend):
    logits = torch.full((2, 9), -math.inf)
    logits[:, 3] = 1.0
    found, grad = run(logprob, logits, torch.tensor([3, 3]), torch.ones(2))
    assert found.tolist() == [0.0, 0.0]
    assert bool((grad == 0).all())
