"""Which labels are scored, and which state predicts each: rows, shift, ignored ones."""

import math

import pytest
import torch

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob import prepare
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_stats


def test_rows_may_repeat_and_shift_aligns(backend):
    h, v = 16, 211
    hidden = torch.randn(2, 5, h, requires_grad=True)
    weight = torch.randn(v, h, requires_grad=True)
    rows = torch.tensor([3, 3, 0, 9, 3])
    labels = torch.tensor([1, 2, 210, 0, -100])
    up = torch.tensor([1.0, -2.0, 0.5, 3.0, 7.0])
    linear_logprob(hidden, weight, labels, rows=rows).backward(up)
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    reference.linear_logprob(hidden.flatten(0, 1), weight, labels, rows=rows).backward(up)
    for a, b in zip(grads, (hidden.grad, weight.grad), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)

    ids = torch.randint(0, v, (2, 5))
    ids[0, 2] = -100
    shifted = linear_logprob(hidden, weight, ids, shift=True)
    plain = linear_logprob(hidden[:, :-1], weight, ids[:, 1:])
    assert torch.equal(shifted[:, :-1], plain)
    assert bool((shifted[:, -1] == 0).all())


@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_ignored_tokens_among_the_scored_ones(backend, keep, monkeypatch, planted):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    hidden, weight, labels = planted(20, 24, 301, torch.float32, (-2.0, 6.0))
    labels[::3] = -100
    dirty = hidden.clone()
    dirty[::3] = math.nan  # as attention leaves fully masked positions
    up = torch.linspace(-1, 1, 20)
    for stats in ((), ("entropy",)):
        results = []
        for compacted, states in ((False, dirty), (True, hidden)):
            # False: as on a GPU, where ignored labels are not taken out first
            monkeypatch.setattr(prepare, "reads_are_free", lambda _, free=compacted: free)
            h, w = states.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
            token_stats = linear_logprob_stats(h, w, labels, stats=stats)
            loss = (token_stats.logprob * up).sum() + (token_stats.entropy.sum() if stats else 0.0)
            loss.backward()
            results.append((token_stats.logprob.detach(), h.grad, w.grad))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert bool((results[0][1][::3] == 0).all())


def test_rows_changed_in_place_are_noticed():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    rows = torch.tensor([0, 1])
    out = linear_logprob(hidden, weight, torch.tensor([1, 2]), rows=rows)
    rows.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_labels_on_request_are_checked_anywhere(monkeypatch):
    monkeypatch.setenv("FASTDPO_CHECK", "1")
    with pytest.raises(ValueError, match="label 9 is outside"):
        linear_logprob(torch.randn(1, 4), torch.randn(9, 4), torch.tensor([9]))
