"""Log-probs from logits, and the per-sequence reduction, against float64 on both backends."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdpo.ops import reference, sequence
from fastdpo.ops import switches as backend_module
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
    logps, grad = run(logprob, logits, labels, up, temperature=0.7)
    truth, true_grad = run(reference.logprob, logits.to(F64), labels, up, temperature=0.7)
    assert logps.dtype == torch.float32
    assert grad.dtype == dtype
    assert bool(((logps - truth).abs() <= 1e-6 + 2e-6 * truth.abs()).all())
    assert logps[2] == 0
    assert bool((grad[2] == 0).all())
    # the entry of a confident target keeps its relative precision: 1 - p is not p - 1 rounded
    step = {torch.float32: 4e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    tiny = 6e-8 if dtype == torch.float16 else 1e-12
    assert bool(((grad - true_grad).abs() <= step * true_grad.abs() + tiny).all())


def test_float64_and_any_shape():
    logits, labels = torch.randn(2, 3, 17, dtype=F64), torch.randint(0, 17, (2, 3))
    logps, grad = run(logprob, logits, labels, torch.ones(2, 3))
    truth, true_grad = run(reference.logprob, logits, labels, torch.ones(2, 3))
    assert logps.dtype == F64
    assert torch.allclose(logps, truth, rtol=1e-14)
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
        ({"logits": torch.zeros(3, 0)}, r"logits \(3, 0\) have no vocabulary"),
        ({"temperature": -1.0}, r"temperature must be > 0 and finite, got -1.0"),
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
    for wrong, words in (
        (offsets.float(), r"offsets \(S \+ 1,\) int64"),
        (torch.tensor([0, 3000, 7, 5000]), "from 0 to 5000.* not ascending"),
        (torch.tensor([1, 5000]), "must ascend from 0 to 5000.* got 1 to 5000"),
        (torch.tensor([0, 6000]), "got 0 to 6000"),
    ):
        with pytest.raises(ValueError, match=words):
            segment_sum(values, wrong)
    with pytest.raises(TypeError, match=r"must be floating point, got torch\.int64"):
        segment_sum(offsets, torch.tensor([0, 6]))
    assert segment_sum(values[:0], torch.tensor([0, 0])).tolist() == [0.0]


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprob(backend, average):
    hidden, weight = torch.randn(3, 6, 10, requires_grad=True), torch.randn(40, 10)
    labels = torch.randint(0, 40, (3, 6))
    labels[0, :4] = -100
    labels[2] = -100
    sums = sequence_logprob(hidden, weight, labels, average=average)
    tokens = reference.linear_logprob(hidden.flatten(0, 1), weight, labels.flatten()).view(3, 6)
    expected = tokens.sum(1) / ((labels != -100).sum(1).clamp(min=1) if average else 1)
    assert torch.allclose(sums, expected, atol=1e-5)
    assert sums[2] == 0
    sums.sum().backward()
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())
    shifted = sequence_logprob(hidden, weight, labels, average=average, shift=True)
    aligned = sequence_logprob(hidden[:, :-1], weight, labels[:, 1:], average=average)
    assert torch.allclose(shifted, aligned)


def test_minus_infinity_elsewhere_is_certain(backend):
    logits = torch.full((2, 9), -math.inf)
    logits[:, 3] = 1.0
    logps, grad = run(logprob, logits, torch.tensor([3, 3]), torch.ones(2))
    assert logps.tolist() == [0.0, 0.0]
    assert bool((grad == 0).all())


def test_sums_of_long_completions_lose_nothing(backend):
    values = -torch.rand(8, 4096) * 3
    truth = values.to(F64).sum(1)
    sums = segment_sum(values.flatten(), torch.arange(0, 8 * 4096 + 1, 4096))
    assert float((sums.to(F64) - truth).abs().max()) <= 2 * float((values.sum(1).to(F64) - truth).abs().max()) + 5e-4


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has none: whatever would make one on it fails."""

    def refuse(self: Tensor) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(sequence, "widest_float", lambda device_type: torch.float32)
    monkeypatch.setattr(torch, "segment_reduce", refuse)


def test_sums_without_float64(no_float64, monkeypatch):
    monkeypatch.setenv("FASTDPO_BACKEND", "tiled")
    lengths = torch.tensor([0, 1, 2, 3, 0, 20000, 4096, 7, 8, 9, 0])
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    values = -torch.rand(int(offsets[-1])) * 3
    values[6:20006] = -0.1  # adding one by one rounds each of these the same way
    truth = torch.stack([values[a:b].to(F64).sum() for a, b in pairwise(offsets)])
    one_by_one = [np.cumsum(np.append(np.float32(0), values[a:b].numpy()))[-1] for a, b in pairwise(offsets)]
    leaf = values.clone().requires_grad_()
    sums = segment_sum(leaf, offsets)
    ours, theirs = ((x.detach().to(F64) - truth).abs() for x in (sums, torch.tensor(one_by_one)))
    assert float((ours / truth.abs().clamp(min=1)).max()) <= 2.5e-7
    assert float(theirs.max()) > 20 * float(ours.max())
    assert sums[lengths == 0].tolist() == [0.0] * 3
    up = torch.randn(len(lengths))
    sums.backward(up)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.repeat_interleave(up, lengths))
    # a sum's bits depend on its own values only
    assert torch.equal(segment_sum(values, offsets), sums)
    alone = torch.cat([segment_sum(values[a:b], torch.tensor([0, b - a])) for a, b in pairwise(offsets.tolist())])
    assert torch.equal(alone, sums)
    broken = values.clone()
    broken[[0, 4]] = torch.tensor([math.nan, -math.inf])
    assert segment_sum(broken, offsets)[1:5].isnan().tolist() == [True, False, False, False]
    assert segment_sum(broken, offsets)[3] == -math.inf
    assert torch.equal(segment_sum(broken, offsets)[5:], sums[5:])
    assert segment_sum(values[:0], torch.tensor([0, 0])).tolist() == [0.0]
    assert segment_sum(values[:0], torch.tensor([0])).tolist() == []
    assert segment_sum(values[:5].bfloat16(), torch.tensor([0, 5])).dtype == torch.bfloat16


def test_float64_is_asked_for_where_it_is():
    assert backend_module.widest_float("mps") == torch.float32
    assert backend_module.widest_float("cpu") == backend_module.widest_float("cuda") == F64


def test_unlikely_targets_and_offsets_keep_their_gradients(backend):
    logits = torch.tensor([[5.0, 4.0, -1e9, 3.0], [5.0, 4.0, -math.inf, 3.0], [1.0, 2.0, 3.0, 4.0]])
    _, grad = run(logprob, logits, torch.tensor([2, 2, 1]), torch.ones(3))
    rest = torch.softmax(logits[0, [0, 1, 3]].to(F64), 0)
    for row in grad[:2]:
        assert torch.allclose(row[[0, 1, 3]].to(F64), -rest, atol=1e-6)
        assert row[2] == 1
    logits = torch.randn(20, 500) * 3 + 8192
    labels, up = torch.randint(0, 500, (20,)), torch.ones(20)
    _, grad = run(logprob, logits, labels, up)
    _, by_eager = run(reference.logprob, logits, labels, up)
    _, truth = run(reference.logprob, logits.to(F64), labels, up)
    ours, theirs = (float((g.to(F64) - truth).abs().max()) for g in (grad, by_eager))
    assert ours <= 2 * theirs + 1e-6
