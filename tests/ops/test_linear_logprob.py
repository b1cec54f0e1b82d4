"""The op against float64: tiled and Triton (interpreted where no GPU is), every path, and every edge that has bitten.

The oracle of the design: error against fp64 on the same rounded operands stays within 2 x eager's own at that dtype
(+ 1e-6), and, since eager rounds its logits in bf16, within absolute bounds: 1e-4 nats per token, and on rows planted
with gaps of 3 to 16 nats a relative error of 1e-3 of the log-prob and 1.2e-2 (bf16) or 1e-3 (fp32) of each row of dh.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob import prepare
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats

F64 = torch.float64
ROW_BOUND = {torch.float32: 1e-3, torch.bfloat16: 1.2e-2, torch.float16: 1.2e-2}
BACKENDS = ["tiled", "triton", "fused"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`fused` is triton with its own products, where a call can take them (16-bit operands)."""
    monkeypatch.setenv("FASTDPO_BACKEND", "triton" if request.param == "fused" else request.param)
    monkeypatch.setenv("FASTDPO_GEMM", "triton" if request.param == "fused" else "cublas")
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "1")  # several tiles even for tiny shapes
    return request.param


def planted(n: int, h: int, v: int, dtype: torch.dtype, gaps: tuple[float, float] = (3.0, 16.0)):
    """hidden, weight, labels as slices of NaN-filled buffers; rows' z_y - logsumexp(rest) runs over `gaps`."""
    g = torch.Generator().manual_seed(n + h + v)
    weight = torch.randn(v, h, generator=g, dtype=F64) / math.sqrt(h)
    labels = torch.randint(0, v, (n,), generator=g)
    hidden = torch.randn(n, h, generator=g, dtype=F64)
    wanted = torch.linspace(*gaps, n, dtype=F64)
    for _ in range(20):  # a few fixed-point steps towards the wanted gap
        z = hidden @ weight.t()
        zy = z.gather(1, labels[:, None])[:, 0]
        rest = z.scatter(1, labels[:, None], -math.inf).logsumexp(1) if v > 1 else zy * 0
        step = (wanted - (zy - rest)) / weight[labels].square().sum(1)
        hidden = hidden + step[:, None] * weight[labels]
    buffers = [torch.full((len(x) + 3, h + 8), math.nan, dtype=dtype) for x in (hidden, weight)]
    for buffer, x in zip(buffers, (hidden, weight), strict=True):
        buffer[1 : len(x) + 1, :h] = x.to(dtype)
    return buffers[0][1 : n + 1, :h], buffers[1][1 : v + 1, :h], labels


def gradients(op, hidden: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor, needs=(True, True, True)):
    """(log-probs, dh, dW, db) of `op(hidden, weight, bias)` under `upstream`."""
    leaves = [
        x if x is None else x.detach().requires_grad_(need)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    out = op(*leaves)
    if any(needs):
        out.backward(upstream.to(out.dtype))
    return (out.detach(), *(x if x is None else x.grad for x in leaves))


def error(x: Tensor, truth: Tensor) -> float:
    return float((x.to(F64) - truth).abs().max()) if x.numel() else 0.0


def eager(labels: Tensor, dtype: torch.dtype, **options):
    """What a plain training loop does: logits in the operands' dtype, then an fp32 log-softmax."""

    def op(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = torch.nn.functional.linear(hidden, weight, bias)
        return reference.logprob(z.float() if dtype != F64 else z, labels, **options)

    return op


def assert_no_worse_than_eager(found: Tensor, by_eager: Tensor, truth: Tensor) -> None:
    ours, theirs = error(found, truth), error(by_eager, truth)
    assert ours <= 2 * theirs + 1e-6, f"{ours=:.3e} {theirs=:.3e}"


def assert_tokens_exact(found: Tensor, truth: Tensor) -> None:
    assert error(found, truth) <= 1e-4


def assert_rows_exact(found: Tensor, truth: Tensor, bound: float) -> None:
    """Relative error of each row."""
    worst = ((found.to(F64) - truth).norm(dim=-1) / truth.norm(dim=-1)).max()
    assert float(worst) <= bound, f"worst row {float(worst):.3e}, bound {bound:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_op_against_fp64_on_planted_rows(backend, dtype, keep, monkeypatch):
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
    found = gradients(ours, hidden, weight, bias, upstream)
    for name, a, b, t in zip(("logp", "dh", "dw", "db"), found, by_eager, truth, strict=True):
        assert a is not None
        assert a.dtype == (torch.float32 if name == "logp" else dtype)
        assert_no_worse_than_eager(a, b, t)
    assert found[0].dtype == torch.float32
    assert_tokens_exact(found[0], truth[0])
    assert float(((found[0].to(F64) - truth[0]) / truth[0]).abs().max()) <= 1e-3
    live = upstream != 0
    if dtype == torch.float16:  # the gradient that is returned underflows; what is saved does not
        live &= truth[1].abs().amax(1) > 1e-3
    assert int(live.sum()) >= 6
    assert_rows_exact(found[1][live], truth[1][live], ROW_BOUND[dtype])
    again = gradients(ours, hidden, weight, bias, upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    frozen = gradients(ours, hidden, weight, bias, upstream, (True, False, False))
    assert torch.equal(frozen[0], found[0])
    assert torch.equal(frozen[1], found[1])
    assert frozen[2] is None


def test_oracles_notice_the_three_usual_mistakes():
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
        assert_rows_exact((onehot - p) @ weight.float(), truth[1], ROW_BOUND[torch.bfloat16])
    # 3. W[y] - A / s with the target in A
    a = torch.softmax(z, -1).bfloat16().float() @ weight.float()
    with pytest.raises(AssertionError):
        assert_rows_exact(weight[labels].float() - a, truth[1], ROW_BOUND[torch.bfloat16])
    # and the relative oracle a value that is off by more than eager is
    good = reference.logprob(z, labels)
    with pytest.raises(AssertionError):
        assert_no_worse_than_eager(good + 1e-2, good, truth[0])


def test_float64_is_exact_on_every_path(monkeypatch):
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
                        assert error(a, b) <= 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_statistics(backend, softcap):
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
        found = getattr(stats, name)
        if name == "is_top1":
            assert found.dtype == torch.bool
            assert torch.equal(found, expected)
        else:
            assert error(found, expected) <= 2e-5, name
    only = linear_logprob_stats(hidden, weight, labels, stats=("lse",))
    assert only.entropy is None
    assert only.mean_logit is None


def test_entropy_gradient(backend):
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
        found = gradients(ours, hidden, weight, None, up, needs)
        assert error(found[0], truth[0]) <= 1e-5
        assert_rows_exact(found[1], truth[1], 1e-4)
        if found[2] is not None:
            assert error(found[2], truth[2]) <= 1e-5
    detached = linear_logprob_stats(
        hidden.detach().requires_grad_(), weight, labels, stats=("entropy",), entropy_grad=False
    )
    assert detached.entropy is not None
    assert not detached.entropy.requires_grad


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
def test_edges_are_finite_and_right(backend, edge, v):
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
    found = gradients(lambda h, w, b: linear_logprob(h, w, labels, bias=b), hidden, weight, bias, up)
    for a, b, t in zip(found, by_eager, truth, strict=True):
        assert bool(torch.isfinite(a).all())
        scale = max(1.0, float(t.abs().max()))
        assert error(a, t) <= 2 * error(b, t) + 1e-6 * scale
    entropy = linear_logprob_stats(hidden, weight, labels, bias=bias, stats=("entropy",)).entropy
    assert entropy is not None
    assert bool(torch.isfinite(entropy).all())


def test_entropy_under_a_common_offset(backend):
    hidden, weight, labels = planted(12, 33, 700, torch.float32, (-1.0, 4.0))
    found = linear_logprob_stats(
        hidden, weight, labels, bias=torch.full((700,), 1e4), stats=("entropy", "log_sum_sq_probs")
    )
    truth = reference.token_stats(reference.logits(hidden.to(F64), weight.to(F64)), labels)
    assert found.entropy is not None
    assert found.log_sum_sq_probs is not None
    # fp32 logits at 1e4 are 1e-3 apart
    assert error(found.entropy, truth["entropy"]) <= 2e-3
    assert error(found.log_sum_sq_probs, truth["log_sum_sq_probs"]) <= 2e-3


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


def test_rows_may_repeat_and_shift_aligns(backend):
    h, v = 16, 211
    hidden = torch.randn(2, 5, h, requires_grad=True)
    weight = torch.randn(v, h, requires_grad=True)
    rows = torch.tensor([3, 3, 0, 9, 3])
    labels = torch.tensor([1, 2, 210, 0, -100])
    up = torch.tensor([1.0, -2.0, 0.5, 3.0, 7.0])
    linear_logprob(hidden, weight, labels, rows=rows).backward(up)
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    reference.linear_logprob(hidden.flatten(0, 1), weight, labels, rows=rows).backward(up)
    for a, b in zip(found, (hidden.grad, weight.grad), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)

    ids = torch.randint(0, v, (2, 5))
    ids[0, 2] = -100
    shifted = linear_logprob(hidden, weight, ids, shift=True)
    plain = linear_logprob(hidden[:, :-1], weight, ids[:, 1:])
    assert torch.equal(shifted[:, :-1], plain)
    assert bool((shifted[:, -1] == 0).all())


def test_upstream_gradients_of_every_kind(backend):
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


def test_policy_and_reference_give_equal_bits(backend, monkeypatch):
    # wide enough for the workspace to set the tile, which the statistics must not change
    hidden, weight, labels = planted(12, 768, 1003, torch.bfloat16)
    for keep in ("0", "64"):
        monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
        with torch.no_grad():
            stats = linear_logprob(hidden, weight, labels)
        for needs_weight in (False, True):
            h = hidden.detach().requires_grad_()
            w = weight.detach().requires_grad_(needs_weight)
            assert torch.equal(linear_logprob(h, w, labels).detach(), stats)
            for names in (("entropy",), ("mean_logit", "is_top1"), ("entropy", "log_sum_sq_probs", "lse")):
                found = linear_logprob_stats(h, w, labels, stats=names, entropy_grad=False)
                assert torch.equal(found.logprob.detach(), stats)


def test_autocast_rounds_operands_and_nothing_else(backend):
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
    assert error(linear_logprob(hidden, weight, labels), truth[0]) > 1e-4


def test_several_row_blocks_in_float64(monkeypatch):
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
        found = gradients(
            lambda h, w, b: linear_logprob(h, w, labels, bias=b, rows=rows, softcap=6.0), hidden, weight, bias, up
        )
        for a, b in zip(found, truth, strict=True):
            assert error(a, b) <= 1e-11


@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_several_row_blocks_in_bf16(backend, keep, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    n = 96
    hidden, weight, labels = planted(n, 1024, 300, torch.bfloat16)
    up = torch.linspace(-1, 1, n)
    truth = gradients(eager(labels, F64), hidden.to(F64), weight.to(F64), None, up, (True, True, False))
    by_eager = gradients(eager(labels, torch.bfloat16), hidden, weight, None, up, (True, True, False))
    # the fused route's tile is another one (tests/test_fused.py)
    assert linear_logprob_plan(hidden, weight, labels).rows < n or backend == "fused"
    found = gradients(lambda h, w, _: linear_logprob(h, w, labels), hidden, weight, None, up, (True, True, False))
    for a, b, t in zip(found[:3], by_eager[:3], truth[:3], strict=True):
        assert_no_worse_than_eager(a, b, t)
    assert_rows_exact(found[1], truth[1], ROW_BOUND[torch.bfloat16])


@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_ignored_tokens_among_the_scored_ones(backend, keep, monkeypatch):
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
            found = linear_logprob_stats(h, w, labels, stats=stats)
            loss = (found.logprob * up).sum() + (found.entropy.sum() if stats else 0.0)
            loss.backward()
            results.append((found.logprob.detach(), h.grad, w.grad))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert bool((results[0][1][::3] == 0).all())


def test_a_first_tile_without_any_possible_token(backend, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", "64")
    n, h, v = 20, 64, 5000
    hidden, weight = torch.randn(n, h) * 0.1, torch.randn(v, h)
    bias = torch.full((v,), -200.0)
    bias[:4096] = -math.inf
    labels, up = torch.randint(4096, v, (n,)), torch.ones(n)
    found = gradients(lambda h, w, b: linear_logprob(h, w, labels, bias=b), hidden, weight, bias, up)
    truth = gradients(eager(labels, F64), hidden.to(F64), weight.to(F64), bias.to(F64), up)
    for a, t in zip(found, truth, strict=True):
        assert error(a, t) <= 1e-4


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
    assert error(stats.lse, truth["lse"]) <= 1e-5
    assert error(stats.entropy, truth["entropy"]) <= 1e-5
    hidden[1] = math.nan
    broken = linear_logprob_stats(hidden, weight, torch.full((3,), 7), stats=("entropy", "lse", "mean_logit"))
    for x in (broken.logprob, broken.entropy, broken.lse, broken.mean_logit):
        assert torch.isnan(x).tolist() == [False, True, False]


def test_a_bias_of_any_stride(backend):
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
    found = linear_logprob(hidden, weight, labels)
    found.sum().backward()
    some = torch.cat((torch.arange(8), torch.arange(n - 8, n)))
    wide = hidden.detach()[some].to(F64).requires_grad_()
    truth = reference.linear_logprob(wide, weight.to(F64), labels[some])
    truth.sum().backward()
    assert error(found.detach()[some], truth.detach()) <= 1e-5
    assert error(hidden.grad[some], wide.grad) <= 1e-4  # an fp32 sum of 33000 terms


def test_mean_logit_follows_the_weight():
    hidden, weight = torch.randn(4, 8), torch.nn.Parameter(torch.randn(30, 8), requires_grad=False)
    for _ in range(2):
        found = linear_logprob_stats(hidden, weight, torch.arange(4), stats=("mean_logit",)).mean_logit
        assert torch.allclose(found, (hidden @ weight.t()).mean(1), atol=1e-5)
        weight.data.mul_(0.4).add_(torch.randn(30, 8))


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


def test_reference_backend_gives_the_same_statistics(monkeypatch):
    hidden, weight, labels = planted(9, 16, 300, torch.float32)
    labels[2] = -100
    rows, names = torch.randperm(9), ("entropy", "mean_logit", "is_top1", "lse", "log_sum_sq_probs")
    tiled = linear_logprob_stats(hidden, weight, labels, rows=rows, stats=names)
    monkeypatch.setenv("FASTDPO_BACKEND", "reference")
    eagerly = linear_logprob_stats(hidden, weight, labels, rows=rows, stats=names)
    for a, b in zip(tiled, eagerly, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-4)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_impossible_tokens_cost_no_statistic(backend, softcap, monkeypatch):
    """A bias of -inf takes tokens out: every backend, the reference too, has the values and gradients of fp64."""
    names = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "lse")
    some, alone = torch.zeros(300, dtype=F64), torch.full((300,), -math.inf, dtype=F64)
    some[[0, 3, 200]], alone[7] = -math.inf, 0.0
    hidden, weight = torch.randn(6, 16, dtype=F64), torch.randn(300, 16, dtype=F64) / 4
    sort = {"fused": torch.bfloat16}.get(backend, torch.float32)
    hidden, weight = hidden.to(sort).to(F64), weight.to(sort).to(F64)

    def run(bias: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight, bias)]
        found = linear_logprob_stats(*leaves[:2], labels, bias=leaves[2], stats=names, softcap=softcap)
        # an impossible target's log-prob is -inf, and has no gradient to compare
        (found.logprob[labels != 3].sum() + found.entropy.sum()).backward()
        return [x.detach().to(F64) for x in (*found, *(leaf.grad for leaf in leaves))]

    for bias, labels in ((some, torch.tensor([9, 3, 8, 250, -100, 11])), (alone, torch.tensor([7, 7, 7, -100, 7, 7]))):
        found = {sort: run(bias, labels, sort)}
        monkeypatch.setenv("FASTDPO_BACKEND", "reference")
        found |= {dtype: run(bias, labels, dtype) for dtype in (torch.float32, F64)}
        wide = found.pop(F64)
        assert not any(bool(x.isnan().any()) for x in wide)
        for dtype, values in found.items():
            for name, a, b in zip((*("logprob", *names), "dh", "dw", "db"), values, wide, strict=True):
                bound = 0.05 if dtype == torch.bfloat16 else 1e-4
                assert torch.allclose(a, b, atol=bound, rtol=bound), (dtype, name)


def test_the_triton_backend_runs_triton(monkeypatch):
    from fastdpo.kernels import fold
    from fastdpo.ops.linear_logprob import triton_tiles

    launched = []
    monkeypatch.setattr(triton_tiles, "fold_tile", lambda *a, **k: (launched.append("fold"), fold.fold_tile(*a, **k)))
    monkeypatch.setattr(
        triton_tiles, "dlogits_tile", lambda *a, **k: (launched.append("dlogits"), fold.dlogits_tile(*a, **k))
    )
    hidden, weight, labels = torch.randn(5, 8), torch.randn(40, 8).requires_grad_(), torch.arange(5)
    linear_logprob(hidden, weight, labels).sum().backward()
    assert launched == []
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    linear_logprob(hidden, weight, labels).sum().backward()
    assert launched == ["fold", "dlogits"]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_inside_a_checkpoint(backend, trained, reentrant):
    """What is saved is unpacked once: a second time a non-reentrant checkpoint refuses."""
    hidden, weight, labels = planted(9, 16, 60, torch.float32)

    def run(wrap) -> list[Tensor]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)]
        out = wrap(lambda h: linear_logprob(h, leaves[1], labels), leaves[0])
        out.sum().backward()
        return [x.grad for x in leaves if x.grad is not None]

    plain = run(lambda op, h: op(h))
    found = run(lambda op, h: checkpoint(op, h, use_reentrant=reentrant))
    assert len(found) == 1 + trained
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_precision_switches_are_left_as_they_were_found():
    """An inherited value goes on being inherited, one set by hand stays."""
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if switch is None or not hasattr(switch, "fp32_precision"):
        pytest.skip(f"torch {torch.__version__} has no such switch")
    arguments = planted(9, 64, 300, torch.float32)
    try:
        torch.backends.fp32_precision = "tf32"
        linear_logprob(*arguments)
        assert switch.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert switch.fp32_precision == "ieee"
        switch.fp32_precision = "bf16"
        linear_logprob(*arguments)
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = torch.backends.fp32_precision = "none"


def test_fp32_stays_fp32_whatever_the_global_precision(backend):
    hidden, weight, labels = planted(9, 64, 300, torch.float32)
    exact = linear_logprob(hidden, weight, labels)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(linear_logprob(hidden, weight, labels), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.randn(9, 5)}, r"weight must be \(V, 4\) to match hidden \(3, 4\), got \(9, 5\)"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, r"labels must be \(3,\) .* got \(2,\); pass `rows`"),
        ({"labels": torch.zeros(3)}, r"labels must be int64, got torch.float32; call .long\(\)"),
        ({"labels": torch.tensor([0, 9, 1])}, r"label 9 is outside the vocabulary \[0, 9\)"),
        ({"labels": torch.tensor([0, -1, 1])}, r"label -1 is outside .* ignore_index=-100"),
        ({"hidden": torch.randn(3, 4).bfloat16()}, r"hidden is torch.bfloat16 and weight torch.float32; cast one"),
        ({"weight": torch.zeros(9, 4, dtype=torch.uint8)}, r"weight must be .* got torch.uint8; dequantize"),
        ({"bias": torch.randn(4)}, r"bias must be \(9,\) to match weight, got \(4,\)"),
        ({"rows": torch.tensor([0, 1, 3])}, r"rows must be in \[0, 3\), got values from 0 to 3"),
        ({"rows": torch.tensor([0, 1])}, r"labels and rows must both be \(M,\)"),
        ({"temperature": 0.0}, r"temperature must be > 0 and finite, got 0.0"),
        ({"softcap": -1.0}, r"softcap must be > 0 and finite, or None, got -1.0"),
        ({"softcap": math.inf}, r"softcap must be > 0 and finite, or None, got inf"),
        ({"logit_scale": math.nan}, r"logit_scale must be finite, got nan"),
        ({"hidden": torch.randn(3, 0), "weight": torch.randn(9, 0)}, r"hidden \(3, 0\) has no features"),
        ({"rows": torch.tensor([0, 1, 2]), "shift": True}, r"shift=True and rows exclude each other"),
    ],
)
def test_bad_arguments_get_one_sentence(change, words):
    arguments = {"hidden": torch.randn(3, 4), "weight": torch.randn(9, 4), "labels": torch.tensor([0, 1, 2]), **change}
    with pytest.raises((TypeError, ValueError), match=words):
        linear_logprob(**arguments)


def test_bad_names_get_one_sentence():
    some = torch.randn(1, 2), torch.randn(3, 2), torch.tensor([0])
    with pytest.raises(ValueError, match="unknown name 'entropi'; choose from entropy"):
        linear_logprob_stats(*some, stats=("entropi",))
    assert linear_logprob_stats(*some, stats="lse").lse is not None
    with pytest.raises(TypeError, match="unexpected keyword argument 'sofcap'"):
        linear_logprob_plan(*some, sofcap=3.0)


def test_backend_switch_refuses_with_words(monkeypatch):
    arguments = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 2])
    monkeypatch.setenv("FASTDPO_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of auto, triton, tiled, reference, got 'cuda'"):
        linear_logprob(*arguments)
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="float64"):
        linear_logprob(arguments[0].double(), arguments[1].double(), arguments[2])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        linear_logprob(*arguments)
    monkeypatch.setenv("FASTDPO_BACKEND", "reference")
    by_reference = linear_logprob(*arguments)
    monkeypatch.setenv("FASTDPO_BACKEND", "auto")
    assert torch.allclose(linear_logprob(*arguments), by_reference, atol=1e-6)


def test_the_path_taken_is_logged(caplog):
    with caplog.at_level("DEBUG", "fastdpo"):
        linear_logprob(torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 1, 2]))
    assert "tiled backend, stats: tiles of 3 x 9" in caplog.text
