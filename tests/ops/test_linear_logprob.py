"""The op against float64: tiled and Triton (interpreted where no GPU is), and every path.

Error against fp64 on the same rounded operands stays within 2 x eager's own at that dtype (+ 1e-6), and, since eager
rounds its logits in bf16, within the absolute bounds of `fastdpo.ops.oracle` on rows planted with gaps of 3 to 16 nats.
"""

import pytest
import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats
from fastdpo.ops.oracle import RELATIVE_LIMIT, ROW_LIMIT, TOKEN_LIMIT, eager_limit, largest_error, worst_row

F64 = torch.float64


def assert_no_worse_than_eager(output: Tensor, by_eager: Tensor, truth: Tensor) -> None:
    ours, theirs = largest_error(output, truth), largest_error(by_eager, truth)
    assert ours <= eager_limit(theirs), f"{ours=:.3e} {theirs=:.3e}"


def assert_tokens_exact(logps: Tensor, truth: Tensor) -> None:
    assert largest_error(logps, truth) <= TOKEN_LIMIT


def assert_rows_exact(dh: Tensor, truth: Tensor, bound: float) -> None:
    """Relative error of each row."""
    worst = worst_row(dh, truth, dh.dtype)
    assert worst <= bound, f"worst row {worst:.3e}, bound {bound:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_op_against_fp64_on_planted_rows(backend, dtype, keep, monkeypatch, planted, gradients, eager):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    n, h, v = 37, 123, 1003
    hidden, weight, labels = planted(n, h, v, dtype)
    bias = (torch.randn(v) * 0.1).to(dtype)
    upstream = torch.linspace(-2, 1.5, n)
    upstream[5] = 0

    def ours(h, w, b):
        return linear_logprob(h, w, labels, bias=b)

    truth = gradients(eager(labels, F64), hidden.to(F64), weight.to(F64), bias.to(F64), upstream)
    by_eager = gradients(eager(labels, dtype), hidden, weight, bias, upstream)
    results = gradients(ours, hidden, weight, bias, upstream)
    for name, a, b, t in zip(("logp", "dh", "dw", "db"), results, by_eager, truth, strict=True):
        assert a is not None
        assert a.dtype == (torch.float32 if name == "logp" else dtype)
        assert_no_worse_than_eager(a, b, t)
    assert results[0].dtype == torch.float32
    assert_tokens_exact(results[0], truth[0])
    assert float(((results[0].to(F64) - truth[0]) / truth[0]).abs().max()) <= RELATIVE_LIMIT
    live = upstream != 0
    if dtype == torch.float16:  # the gradient that is returned underflows; what is saved does not
        live &= truth[1].abs().amax(1) > 1e-3
    assert int(live.sum()) >= 6
    assert_rows_exact(results[1][live], truth[1][live], ROW_LIMIT[dtype])
    again = gradients(ours, hidden, weight, bias, upstream)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    frozen = gradients(ours, hidden, weight, bias, upstream, (True, False, False))
    assert torch.equal(frozen[0], results[0])
    assert torch.equal(frozen[1], results[1])
    assert frozen[2] is None


def test_oracles_notice_the_three_usual_mistakes(planted, gradients, eager):
    n, h, v = 37, 96, 1003
    hidden, weight, labels = planted(n, h, v, torch.bfloat16)
    up = torch.ones(n)
    truth = gradients(eager(labels, F64), hidden.to(F64), weight.to(F64), None, up, (True, True, False))
    z = hidden.float() @ weight.float().t()
    # 1. logits rounded to bf16
    with pytest.raises(AssertionError):
        assert_tokens_exact(reference.logprob(z.bfloat16(), labels), truth[0])
    # 2. p rounded before the -1
    p = torch.softmax(z, -1).bfloat16().float()
    onehot = torch.nn.functional.one_hot(labels, v).float()
    with pytest.raises(AssertionError):
        assert_rows_exact((onehot - p) @ weight.float(), truth[1], ROW_LIMIT[torch.bfloat16])
    # 3. W[y] - A / s with the target in A
    a = torch.softmax(z, -1).bfloat16().float() @ weight.float()
    with pytest.raises(AssertionError):
        assert_rows_exact(weight[labels].float() - a, truth[1], ROW_LIMIT[torch.bfloat16])
    # and the relative oracle a value that is off by more than eager is
    good = reference.logprob(z, labels)
    with pytest.raises(AssertionError):
        assert_no_worse_than_eager(good + 1e-2, good, truth[0])


def test_float64_is_exact_on_every_path(monkeypatch, planted):
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "1")
    n, h, v = 41, 33, 1003
    hidden, weight, labels = planted(n, h, v, F64, (-3.0, 6.0))
    labels[7] = -100
    bias = torch.randn(v, dtype=F64)
    up, up_entropy = torch.randn(n, dtype=F64), torch.randn(n, dtype=F64)
    options = {"temperature": 1.3, "logit_scale": 0.7}

    def run(op, needs):
        leaves = [x.detach().requires_grad_(bool(k)) for x, k in zip((hidden, weight, bias), needs, strict=True)]
        logp, entropy = op(*leaves)
        if any(needs):
            torch.autograd.backward((logp, entropy), (up, up_entropy))
        return [logp.detach(), entropy.detach(), *(x.grad for x in leaves)]

    for softcap in (None, 4.0):

        def ours(h, w, b, softcap=softcap):
            s = linear_logprob_stats(h, w, labels, bias=b, softcap=softcap, stats=("entropy",), **options)
            return s.logprob, s.entropy

        def defined(h, w, b, softcap=softcap):
            z = reference.logits(h, w, b, softcap=softcap, **options)
            entropy = reference.token_stats(z, labels.clamp(min=0))["entropy"]
            return reference.logprob(z, labels), entropy * (labels != -100)

        for keep in ("0", "64"):
            monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
            for needs in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)):
                for a, b in zip(run(ours, needs), run(defined, needs), strict=True):
                    if a is None or b is None:
                        assert a is b
                    else:
                        assert a.dtype == F64
                        assert largest_error(a, b) <= 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_statistics(backend, softcap, planted):
    n, h, v = 29, 40, 517
    hidden, weight, labels = planted(n, h, v, torch.float32, (-4.0, 8.0))
    bias = torch.randn(v) * 0.3
    options = {"softcap": softcap, "temperature": 0.8, "logit_scale": 1.1}
    z = reference.logits(hidden.to(F64), weight.to(F64), bias.to(F64), **options)
    truth = reference.token_stats(z, labels)
    stats = linear_logprob_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        stats=("entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "lse"),
        **options,
    )
    assert 0 < int(truth["is_top1"].sum()) < n
    for name, expected in truth.items():
        statistic = getattr(stats, name)
        if name == "is_top1":
            assert statistic.dtype == torch.bool
            assert torch.equal(statistic, expected)
        else:
            assert largest_error(statistic, expected) <= 2e-5, name
    only = linear_logprob_stats(hidden, weight, labels, stats=("lse",))
    assert only.entropy is None
    assert only.mean_logit is None


def test_entropy_gradient(backend, planted, gradients):
    n, h, v = 21, 24, 301
    hidden, weight, labels = planted(n, h, v, torch.float32, (-2.0, 3.0))
    up = torch.linspace(-1, 1, n)

    def entropy(h, w, _):
        z = reference.logits(h, w)
        return reference.token_stats(z, labels)["entropy"]

    def ours(h, w, _):
        return linear_logprob_stats(h, w, labels, stats=("entropy",)).entropy

    truth = gradients(entropy, hidden.to(F64), weight.to(F64), None, up, (True, True, False))
    for needs in ((True, False, False), (True, True, False)):
        results = gradients(ours, hidden, weight, None, up, needs)
        assert largest_error(results[0], truth[0]) <= 1e-5
        assert_rows_exact(results[1], truth[1], 1e-4)
        if results[2] is not None:
            assert largest_error(results[2], truth[2]) <= 1e-5
    detached = linear_logprob_stats(
        hidden.detach().requires_grad_(), weight, labels, stats=("entropy",), entropy_grad=False
    )
    assert detached.entropy is not None
    assert not detached.entropy.requires_grad


def test_upstream_gradients_of_every_kind(backend, planted):
    hidden, weight, labels = planted(10, 12, 300, torch.float32)
    hidden = hidden.detach().requires_grad_()
    out = linear_logprob(hidden, weight, labels)
    (first,) = torch.autograd.grad(out.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), hidden, retain_graph=True)
    assert torch.equal(first, second)
    (scaled,) = torch.autograd.grad((out * -3).sum(), hidden, retain_graph=True)
    assert torch.allclose(scaled, -3 * first)
    stats = linear_logprob_stats(hidden, weight, labels, stats=("entropy", "lse"))
    assert stats.entropy is not None
    (only_entropy,) = torch.autograd.grad(stats.entropy.sum(), hidden)
    assert bool(torch.isfinite(only_entropy).all())
    assert stats.lse is not None
    assert not stats.lse.requires_grad
    scale = torch.ones(10, requires_grad=True)
    (g,) = torch.autograd.grad((linear_logprob(hidden, weight, labels) * scale).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob can be differentiated once"):
        g.sum().backward()


def test_what_is_not_wanted_is_not_computed(backend):
    hidden, weight, labels = torch.randn(8, 6), torch.randn(40, 6), torch.randint(0, 40, (8,))
    for frozen_hidden, frozen_weight, path in ((1, 1, "stats"), (0, 1, "one_pass"), (0, 0, "kept"), (1, 0, "kept")):
        h = hidden.clone().requires_grad_(not frozen_hidden)
        w = weight.clone().requires_grad_(not frozen_weight)
        assert linear_logprob_plan(h, w, labels).path == path
        out = linear_logprob(h, w, labels)
        assert out.requires_grad == (path != "stats")
        if out.requires_grad:
            out.sum().backward()
        assert (h.grad is None) == bool(frozen_hidden)
        assert (w.grad is None) == bool(frozen_weight)
    with torch.no_grad():
        assert linear_logprob_plan(h, w, labels).path == "stats"
        assert not linear_logprob(h, w.requires_grad_(), labels).requires_grad


def test_policy_and_reference_give_equal_bits(backend, monkeypatch, planted):
    # wide enough for the workspace to set the tile, which the statistics must not change
    hidden, weight, labels = planted(12, 768, 1003, torch.bfloat16)
    for keep in ("0", "64"):
        monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
        with torch.no_grad():
            stats = linear_logprob(hidden, weight, labels)
        for needs_weight, names in ((False, ("mean_logit", "is_top1")), (True, ("entropy", "log_sum_sq_probs", "lse"))):
            h = hidden.detach().requires_grad_()
            w = weight.detach().requires_grad_(needs_weight)
            assert torch.equal(linear_logprob(h, w, labels).detach(), stats)
            with_others = linear_logprob_stats(h, w, labels, stats=names, entropy_grad=False)
            assert torch.equal(with_others.logprob.detach(), stats)


def test_autocast_rounds_operands_and_nothing_else(backend, planted, gradients, eager):
    hidden, weight, labels = planted(17, 64, 517, torch.float32)
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprob(h, w, labels)
    out.sum().backward()
    truth = gradients(
        eager(labels, F64),
        hidden.bfloat16().to(F64),
        weight.bfloat16().to(F64),
        None,
        torch.ones(17),
        (True, True, False),
    )
    assert out.dtype == torch.float32
    assert_tokens_exact(out.detach(), truth[0])
    assert h.grad is not None
    assert w.grad is not None
    assert h.grad.dtype == w.grad.dtype == torch.float32
    assert_rows_exact(h.grad, truth[1], 1.2e-2)
    # the control: unrounded operands give other numbers
    assert largest_error(linear_logprob(hidden, weight, labels), truth[0]) > 1e-4


def test_several_row_blocks_in_float64(monkeypatch, planted, gradients):
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "1")
    n, h, v = 300, 256, 400
    hidden, weight, labels = planted(n, h, v, F64, (-3.0, 6.0))
    labels[::7] = -100
    rows = torch.randint(0, n, (n,))
    bias, up = torch.randn(v, dtype=F64), torch.randn(n, dtype=F64)

    def defined(h, w, b):
        return reference.linear_logprob(h, w, labels, bias=b, rows=rows, softcap=6.0)

    truth = gradients(defined, hidden, weight, bias, up)
    for keep in ("0", "64"):
        monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
        plan = linear_logprob_plan(hidden, weight.clone().requires_grad_(), labels, rows=rows, softcap=6.0)
        assert plan.rows < 100
        results = gradients(
            lambda h, w, b: linear_logprob(h, w, labels, bias=b, rows=rows, softcap=6.0), hidden, weight, bias, up
        )
        for a, b in zip(results, truth, strict=True):
            assert largest_error(a, b) <= 1e-11


@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_several_row_blocks_in_bf16(backend, keep, monkeypatch, planted, gradients, eager):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    n = 96
    hidden, weight, labels = planted(n, 1024, 300, torch.bfloat16)
    up = torch.linspace(-1, 1, n)
    truth = gradients(eager(labels, F64), hidden.to(F64), weight.to(F64), None, up, (True, True, False))
    by_eager = gradients(eager(labels, torch.bfloat16), hidden, weight, None, up, (True, True, False))
    # the fused route's tile is another one (test_fused.py)
    assert linear_logprob_plan(hidden, weight, labels).rows < n or backend == "fused"
    results = gradients(lambda h, w, _: linear_logprob(h, w, labels), hidden, weight, None, up, (True, True, False))
    for a, b, t in zip(results[:3], by_eager[:3], truth[:3], strict=True):
        assert_no_worse_than_eager(a, b, t)
    assert_rows_exact(results[1], truth[1], ROW_LIMIT[torch.bfloat16])


def test_reference_backend_gives_the_same_statistics(monkeypatch, planted):
    hidden, weight, labels = planted(9, 16, 300, torch.float32)
    labels[2] = -100
    rows, names = torch.randperm(9), ("entropy", "mean_logit", "is_top1", "lse", "log_sum_sq_probs")
    tiled = linear_logprob_stats(hidden, weight, labels, rows=rows, stats=names)
    monkeypatch.setenv("FASTDPO_BACKEND", "reference")
    eagerly = linear_logprob_stats(hidden, weight, labels, rows=rows, stats=names)
    for a, b in zip(tiled, eagerly, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4)


def test_mean_logit_follows_the_weight():
    hidden, weight = torch.randn(4, 8), torch.nn.Parameter(torch.randn(30, 8), requires_grad=False)
    for _ in range(2):
        means = linear_logprob_stats(hidden, weight, torch.arange(4), stats=("mean_logit",)).mean_logit
        assert torch.allclose(means, (hidden @ weight.t()).mean(1), atol=1e-5)
        weight.data.mul_(0.4).add_(torch.randn(30, 8))
