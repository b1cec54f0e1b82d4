"""Every edge that has bitten: logits far away, impossible and certain tokens, nothing to score, very many tokens."""

import math

import pytest
import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_stats
from fastdpo.ops.oracle import largest_error

F64 = torch.float64


# the regressions that peers have shipped; each id is one of them
EDGES = {
    "all_logits_below_minus_120": lambda h, w, b: (h, w, b - 200),
    "common_offset_1e4": lambda h, w, b: (h, w, b + 1e4),
    "logits_beyond_fp16": lambda h, w, b: (h * 3e4, w, b),
    "bias_minus_inf_elsewhere": lambda h, w, b: (h, w, torch.full_like(b, -math.inf)),
    "plain": lambda h, w, b: (h, w, b),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("v", [1, 2, 257, 1003])
def test_edges_are_finite_and_right(backend, edge, v, planted, gradients, eager):
    n, h = 9, 17
    hidden, weight, labels = planted(n, h, v, torch.float32)
    if v > 1:
        labels[0], labels[1] = v - 1, 0
    hidden, weight, bias = EDGES[edge](hidden.clone(), weight.clone(), torch.randn(v) * 0.1)
    if edge == "bias_minus_inf_elsewhere":
        labels = labels * 0 + v // 2
        bias[v // 2] = 0.5
    up = torch.linspace(-1, 1, n)
    truth = gradients(eager(labels, F64), hidden.to(F64), weight.to(F64), bias.to(F64), up)
    by_eager = gradients(eager(labels, torch.float32), hidden, weight, bias, up)
    results = gradients(lambda h, w, b: linear_logprob(h, w, labels, bias=b), hidden, weight, bias, up)
    for a, b, t in zip(results, by_eager, truth, strict=True):
        assert bool(torch.isfinite(a).all())
        scale = max(1.0, float(t.abs().max()))
        assert largest_error(a, t) <= 2 * largest_error(b, t) + 1e-6 * scale
    entropy = linear_logprob_stats(hidden, weight, labels, bias=bias, stats=("entropy",)).entropy
    assert entropy is not None
    assert bool(torch.isfinite(entropy).all())


def test_entropy_under_a_common_offset(backend, planted):
    hidden, weight, labels = planted(12, 33, 700, torch.float32, (-1.0, 4.0))
    stats = linear_logprob_stats(
        hidden, weight, labels, bias=torch.full((700,), 1e4), stats=("entropy", "log_sum_sq_probs")
    )
    truth = reference.token_stats(reference.logits(hidden.to(F64), weight.to(F64)), labels)
    assert stats.entropy is not None
    assert stats.log_sum_sq_probs is not None
    # fp32 logits at 1e4 are 1e-3 apart
    assert largest_error(stats.entropy, truth["entropy"]) <= 2e-3
    assert largest_error(stats.log_sum_sq_probs, truth["log_sum_sq_probs"]) <= 2e-3


@pytest.mark.parametrize("labels_of", ["none", "all_ignored", "one_sequence_ignored"])
def test_nothing_to_score(backend, labels_of):
    n = 0 if labels_of == "none" else 6
    hidden = torch.randn(2, n // 2, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.full((2, n // 2), -100)
    if labels_of == "one_sequence_ignored":
        labels[1] = 3
    out = linear_logprob(hidden, weight, labels)
    assert out.shape == labels.shape
    assert bool((out[labels == -100] == 0).all())
    out.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bool(torch.isfinite(weight.grad).all())
    assert bool((hidden.grad[labels == -100] == 0).all())
    if labels_of == "one_sequence_ignored":
        assert bool((hidden.grad[1] != 0).any())
        assert bool((weight.grad != 0).any())


def test_a_first_tile_without_any_possible_token(backend, monkeypatch, gradients, eager):
    monkeypatch.setenv("FASTDPO_KEEP_MB", "64")
    n, h, v = 20, 64, 5000
    hidden, weight = torch.randn(n, h) * 0.1, torch.randn(v, h)
    bias = torch.full((v,), -200.0)
    bias[:4096] = -math.inf
    labels, up = torch.randint(4096, v, (n,)), torch.ones(n)
    results = gradients(lambda h, w, b: linear_logprob(h, w, labels, bias=b), hidden, weight, bias, up)
    truth = gradients(eager(labels, F64), hidden.to(F64), weight.to(F64), bias.to(F64), up)
    for a, t in zip(results, truth, strict=True):
        assert largest_error(a, t) <= 1e-4


def test_certain_tokens_keep_finite_entropy_gradients(backend):
    weight = torch.randn(50, 8)
    hidden = torch.stack([weight[3] * 100, weight[4] * 0.1]).requires_grad_()
    weight.requires_grad_()
    entropy = linear_logprob_stats(hidden, weight, torch.tensor([3, 4]), stats=("entropy",)).entropy
    entropy.sum().backward()
    assert bool(torch.isfinite(weight.grad).all())
    assert bool(torch.isfinite(hidden.grad).all())


def test_unlikely_targets_and_broken_states_show_as_they_are(backend):
    hidden, weight = torch.randn(3, 8), torch.randn(60, 8)
    bias = torch.zeros(60)
    bias[7] = -1e6
    stats = linear_logprob_stats(hidden, weight, torch.full((3,), 7), bias=bias, stats=("lse", "entropy"))
    truth = reference.token_stats(reference.logits(hidden.to(F64), weight.to(F64), bias.to(F64)), torch.full((3,), 7))
    assert largest_error(stats.lse, truth["lse"]) <= 1e-5
    assert largest_error(stats.entropy, truth["entropy"]) <= 1e-5
    hidden[1] = math.nan
    broken = linear_logprob_stats(hidden, weight, torch.full((3,), 7), stats=("entropy", "lse", "mean_logit"))
    for x in (broken.logprob, broken.entropy, broken.lse, broken.mean_logit):
        assert torch.isnan(x).tolist() == [False, True, False]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_impossible_tokens_cost_no_statistic(backend, softcap, monkeypatch):
    """A bias of -inf takes tokens out: every backend, the reference too, has the values and gradients of fp64."""
    names = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "lse")
    few, alone = torch.zeros(300, dtype=F64), torch.full((300,), -math.inf, dtype=F64)
    few[[0, 3, 200]], alone[7] = -math.inf, 0.0
    hidden, weight = torch.randn(6, 16, dtype=F64), torch.randn(300, 16, dtype=F64) / 4
    sort = {"fused": torch.bfloat16}.get(backend, torch.float32)
    hidden, weight = hidden.to(sort).to(F64), weight.to(sort).to(F64)

    def run(bias: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight, bias)]
        results = linear_logprob_stats(*leaves[:2], labels, bias=leaves[2], stats=names, softcap=softcap)
        # an impossible target's log-prob is -inf, and has no gradient to compare
        (results.logprob[labels != 3].sum() + results.entropy.sum()).backward()
        return [x.detach().to(F64) for x in (*results, *(leaf.grad for leaf in leaves))]

    for bias, labels in ((few, torch.tensor([9, 3, 8, 250, -100, 11])), (alone, torch.tensor([7, 7, 7, -100, 7, 7]))):
        results = {sort: run(bias, labels, sort)}
        monkeypatch.setenv("FASTDPO_BACKEND", "reference")
        results |= {dtype: run(bias, labels, dtype) for dtype in (torch.float32, F64)}
        wide = results.pop(F64)
        assert not any(bool(x.isnan().any()) for x in wide)
        for dtype, values in results.items():
            for name, a, b in zip((*("logprob", *names), "dh", "dw", "db"), values, wide, strict=True):
                bound = 0.05 if dtype == torch.bfloat16 else 1e-4
                assert torch.allclose(a, b, atol=bound, rtol=bound), (dtype, name)


def test_a_bias_of_any_stride(backend, planted):
    hidden, weight, labels = planted(9, 16, 300, torch.float32)
    column = torch.randn(300, 2)[:, 0]
    assert torch.equal(
        linear_logprob(hidden, weight, labels, bias=column),
        linear_logprob(hidden, weight, labels, bias=column.contiguous()),
    )


def test_more_tokens_and_logits_than_16_and_31_bits_count(monkeypatch):
    n, v = 66000, 33000
    assert n > 1 << 16
    assert n * v > 1 << 31
    monkeypatch.undo()
    hidden, weight = torch.randn(n, 4).requires_grad_(), torch.randn(v, 4)
    labels = torch.randint(0, v, (n,))
    logps = linear_logprob(hidden, weight, labels)
    logps.sum().backward()
    ends = torch.cat((torch.arange(8), torch.arange(n - 8, n)))
    wide = hidden.detach()[ends].to(F64).requires_grad_()
    truth = reference.linear_logprob(wide, weight.to(F64), labels[ends])
    truth.sum().backward()
    assert largest_error(logps.detach()[ends], truth.detach()) <= 1e-5
    assert largest_error(hidden.grad[ends], wide.grad) <= 1e-4  # an fp32 sum of 33000 terms
