"""The fused kernels on 16-bit operands: the regressions of the op again, and what only they have.

They are interpreted here; test_gpu.py runs them on a GPU. Truth is float64 on the same rounded operands.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton exists for Linux only")

from fastdpo.kernels import configs, fused_dlogits, fused_fold
from fastdpo.ops import reference
from fastdpo.ops.linear_logprob import fused_tiles, plan, settings
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats
from fastdpo.ops.linear_logprob.settings import STATS
from fastdpo.ops.oracle import largest_error

F64 = torch.float64


@pytest.fixture(autouse=True)
def fused_route(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    monkeypatch.setenv("FASTDPO_GEMM", "triton")
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "1")
    yield
    settings._plan.cache_clear()  # of plans made under other limits


def inputs(n: int, h: int, v: int, dtype: torch.dtype, strength: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels: peaked, and slices of NaN-filled buffers."""
    g = torch.Generator().manual_seed(n + h + v)
    weight = torch.randn(v, h, generator=g) / math.sqrt(h)
    labels = torch.randint(0, v, (n,), generator=g)
    hidden = torch.randn(n, h, generator=g) + torch.linspace(-1, 4, n)[:, None] * strength * weight[labels]
    buffers = [torch.full((len(x) + 3, h + 8), math.nan, dtype=dtype) for x in (hidden, weight)]
    for buffer, x in zip(buffers, (hidden, weight), strict=True):
        buffer[1 : len(x) + 1, :h] = x.to(dtype)
    return buffers[0][1 : n + 1, :h], buffers[1][1 : v + 1, :h], labels


def run(op, hidden: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, needs=(True, True, True)) -> list:
    leaves = [x.detach().requires_grad_(k) for x, k in zip((hidden, weight, bias), needs, strict=True)]
    out = op(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


# each id is a bug that a peer has shipped
EDGES = {
    "plain": lambda h, w, b: (h, w, b),
    "all_logits_below_minus_120": lambda h, w, b: (h, w, b - 200),
    "common_offset_1e4": lambda h, w, b: (h, w, b + 8192),
    "logits_beyond_fp16": lambda h, w, b: (h * 2e4, w, b),
    "blocks_far_above_the_first": lambda h, w, b: (h, w, b + torch.arange(len(b)) // 32 * 16),
    "one_column_far_above": lambda h, w, b: (h, w, b + 400 * (torch.arange(len(b)) == len(b) - 1)),
    "bias_minus_inf_in_the_first_block": lambda h, w, b: (h, w, b.masked_fill(torch.arange(len(b)) < 40, -math.inf)),
    "bias_minus_inf_elsewhere": lambda h, w, b: (h, w, torch.full_like(b, -math.inf)),
}


@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
@pytest.mark.parametrize("v", [1, 2, 31, 33, 301])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, v, keep, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    n, h, dtype = 9, 24, torch.bfloat16
    hidden, weight, labels = inputs(n, h, v, dtype)
    labels[0], labels[1] = v - 1, 0
    hidden, weight, bias = EDGES[edge](hidden.clone(), weight.clone(), torch.randn(v) * 0.1)
    bias = bias.to(dtype)
    if edge == "bias_minus_inf_elsewhere":
        labels = labels * 0 + v // 2
        bias[v // 2] = 0.5
    if edge == "bias_minus_inf_in_the_first_block":
        labels = labels * 0 + v - 1
        bias[v - 1] = 0.5
    up = torch.linspace(-1, 1, n)

    def defined(h, w, b):
        return reference.linear_logprob(h, w, labels, bias=b)

    truth = run(defined, hidden.to(F64), weight.to(F64), bias.to(F64), up)
    results = run(lambda h, w, b: linear_logprob(h, w, labels, bias=b), hidden, weight, bias, up)
    # an fp32 logit of this size is so far from its neighbours; weights of exponentials move by as much
    step = 2.0**-23 * float((hidden.to(F64) @ weight.to(F64).t() + bias.to(F64).clamp(min=-1e9)).abs().max())
    assert largest_error(results[0], truth[0]) <= 1e-5 + 4 * step
    for a, t in zip(results[1:], truth[1:], strict=True):
        assert bool(torch.isfinite(a).all())
        # bf16 exponentials and results: 2^-9 of the largest term, a few times
        size = max(float(weight.abs().max()) if a.shape == hidden.shape else float(hidden.abs().max()), 1.0)
        assert largest_error(a, t) <= (2.0**-8 + 4 * step) * size * 2
    stats = linear_logprob_stats(hidden, weight, labels, bias=bias, stats=STATS)
    exact = reference.token_stats(reference.logits(hidden.to(F64), weight.to(F64), bias.to(F64)), labels)
    assert bool(torch.isfinite(stats.entropy).all())
    for name in ("entropy", "log_sum_sq_probs", "lse"):
        if bool(torch.isfinite(exact[name]).all()):
            assert largest_error(getattr(stats, name), exact[name]) <= 2e-5 + 8 * step, name


def test_edges_notice_a_wrong_offset(monkeypatch):
    """The control: without bringing flagged blocks to one offset, gradients are wrong, and the test above sees it."""
    monkeypatch.setattr(fused_tiles.fused_offsets, "rebase", lambda *a: None)
    with pytest.raises(AssertionError):
        test_edges("blocks_far_above_the_first", 301, "0", monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_softcap_scales_and_statistics(dtype, softcap):
    n, h, v = 19, 40, 301
    hidden, weight, labels = inputs(n, h, v, dtype)
    bias = (torch.randn(v) * 0.3).to(dtype)
    options = {"softcap": softcap, "temperature": 0.8, "logit_scale": 1.1}
    wide = hidden.to(F64), weight.to(F64), bias.to(F64)
    up = torch.linspace(-1, 1, n)
    truth = run(lambda h, w, b: reference.linear_logprob(h, w, labels, bias=b, **options), *wide, up)
    results = run(lambda h, w, b: linear_logprob(h, w, labels, bias=b, **options), hidden, weight, bias, up)
    assert largest_error(results[0], truth[0]) <= 1e-5
    for a, t in zip(results[1:], truth[1:], strict=True):
        assert largest_error(a, t) <= 1.2e-2 * max(1.0, float(t.abs().max()))
    exact = reference.token_stats(reference.logits(*wide, **options), labels)
    stats = linear_logprob_stats(hidden, weight, labels, bias=bias, stats=STATS, **options)
    assert torch.equal(stats.is_top1, exact["is_top1"])
    assert 0 < int(stats.is_top1.sum()) < n
    for name in ("entropy", "log_sum_sq_probs", "mean_logit", "lse"):
        assert largest_error(getattr(stats, name), exact[name]) <= 2e-5, name


TILES = {
    "pointers": configs.GemmConfig(16, 32, 16, 2, 1, 1, tma=False, branch=True),
    "descriptors": configs.GemmConfig(16, 32, 16, 2, 1, 1, tma=True, branch=True),
    "no_branches": configs.GemmConfig(16, 32, 16, 2, 1, 1, tma=False, branch=False),
    "wide": configs.GemmConfig(32, 64, 32, 8, 1, 1, tma=True, branch=False),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("h", "v"), [(24, 203), (24, 208), (37, 203)], ids=["aligned", "aligned, whole blocks", "odd"])
def test_every_form_of_the_kernel(tile, h, v, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", "0")
    n = 37
    hidden, weight, labels = (x.clone() for x in inputs(n, h, v, torch.bfloat16))
    bias, up = torch.zeros(v).bfloat16(), torch.linspace(-1, 1, n)
    launched = {"fold": set(), "dlogits": set()}
    prepare = fused_fold.operands

    def spy(name):
        def operands(*arguments, **options):
            launch = prepare(*arguments, **options)
            launched[name].add(launch.constants["TMA"])
            return launch

        return operands

    monkeypatch.setattr(fused_fold, "operands", spy("fold"))
    monkeypatch.setattr(fused_dlogits, "operands", spy("dlogits"))
    with configs.override(TILES[tile]):
        results = run(lambda h, w, b: linear_logprob(h, w, labels, bias=b), hidden, weight, bias, up)
    # rows of an odd length do not start at multiples of 16 bytes: no descriptors for them
    assert launched == {name: {TILES[tile].tma and h % 8 == 0} for name in launched}
    truth = run(
        lambda h, w, b: reference.linear_logprob(h, w, labels, bias=b),
        hidden.to(F64),
        weight.to(F64),
        bias.to(F64),
        up,
    )
    assert largest_error(results[0], truth[0]) <= 1e-5
    for a, t in zip(results[1:], truth[1:], strict=True):
        assert largest_error(a, t) <= 1.2e-2 * float(t.abs().max())


def test_operands_of_any_stride(monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", "0")
    hidden, weight, labels = (x.clone() for x in inputs(9, 24, 101, torch.bfloat16))
    bias, up = torch.zeros(101).bfloat16(), torch.linspace(-1, 1, 9)

    def op(h, w, b):
        return linear_logprob(h, w, labels, bias=b)

    def strided(h, w, b):
        return linear_logprob(h.t().contiguous().t(), w.t().contiguous().t(), labels, bias=b)

    pairs = zip(run(op, hidden, weight, bias, up), run(strided, hidden, weight, bias, up), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bits_depend_on_neither_tile_nor_path(monkeypatch):
    """Chunks of the vocabulary, what is asked for and whether exponentials are written leave log-probs as they are."""
    hidden, weight, labels = (x.clone() for x in inputs(21, 24, 301, torch.bfloat16))
    seen, tiles = [], set()
    for most_rows, most_cols in ((1024, 4096), (16, 128)):
        monkeypatch.setattr(plan, "MAX_ROWS", most_rows)
        monkeypatch.setattr(plan, "MAX_COLS_FUSED", most_cols)
        settings._plan.cache_clear()
        for needs in ((False, False), (True, False), (True, True)):
            for keep in ("0", "64"):
                monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
                leaves = [x.clone().requires_grad_(k) for x, k in zip((hidden, weight), needs, strict=True)]
                chosen = linear_logprob_plan(*leaves, labels)
                assert chosen.fused
                tiles.add((chosen.path, chosen.rows, chosen.cols))
                names = ("entropy", "mean_logit") if keep == "0" else ()
                stats = linear_logprob_stats(*leaves, labels, stats=names, entropy_grad=False)
                seen.append(stats.logprob.detach())
    assert len(tiles) == 8, tiles
    assert all(torch.equal(x, seen[0]) for x in seen)


@pytest.mark.parametrize("trained", [False, True])
def test_a_call_launches_what_its_path_says(trained, monkeypatch):
    """By name and number, so that a path that falls back is seen."""
    monkeypatch.setenv("FASTDPO_KEEP_MB", "0")
    launches: list[str] = []
    for module, name in (
        (fused_tiles, "fused_fold"),
        (fused_tiles, "fused_dlogits"),
        (fused_tiles.fused_offsets, "advance"),
        (fused_tiles.fused_offsets, "rebase"),
        (fused_tiles.fused_offsets, "merge"),
        (fused_tiles.fused_offsets, "rescale"),
    ):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=whole, **k: (launches.append(n), f(*a, **k))[1])
    monkeypatch.setattr(plan, "MAX_COLS_FUSED", 128)
    settings._plan.cache_clear()
    hidden, weight, labels = (x.clone() for x in inputs(9, 24, 301, torch.bfloat16))
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    chosen = linear_logprob_plan(hidden, weight, labels)
    blocks = -(-301 // chosen.cols)
    assert blocks == 3
    linear_logprob(hidden, weight, labels).sum().backward()
    counts = {name: launches.count(name) for name in set(launches)}
    expected = {"fused_fold": blocks + 1, "advance": blocks, "rebase": blocks, "merge": 1, "rescale": blocks - 1}
    if trained:
        expected["fused_dlogits"] = -(-301 // chosen.back_cols)
    assert counts == expected
    launches.clear()
    with torch.no_grad():
        linear_logprob(hidden, weight, labels)
    assert launches == ["fused_fold", "merge"]


def test_what_the_fused_kernels_cannot_take_is_said_once(caplog):
    from fastdpo.ops import switches

    switches._warn_once.cache_clear()
    hidden, weight, labels = inputs(4, 16, 50, torch.float32)
    for _ in range(2):
        assert not linear_logprob_plan(hidden, weight, labels).fused
    said = [record.getMessage() for record in caplog.records if record.name == "fastdpo"]
    reason = "the operands are float32, and the fused kernels take 16-bit ones"
    assert said == [f"FASTDPO_GEMM=triton is not taken: {reason}."]


def test_no_fused_kernel_is_a_default_where_it_has_not_run(monkeypatch):
    monkeypatch.delenv("FASTDPO_GEMM")
    hidden, weight, labels = inputs(4, 16, 50, torch.bfloat16)
    assert not linear_logprob_plan(hidden, weight, labels).fused
    measured = configs.Measured("interpreter", torch.bfloat16, range(8, 64), "a test", "2026-11-21", "pytest")
    monkeypatch.setattr(configs, "MEASURED", (measured,))
    assert linear_logprob_plan(hidden, weight, labels).fused
    assert not linear_logprob_plan(*inputs(4, 72, 50, torch.bfloat16)).fused
    for row in configs.MEASURED:
        assert row.gpu
        assert row.command
    monkeypatch.setenv("FASTDPO_GEMM", "cuda")
    with pytest.raises(ValueError, match="FASTDPO_GEMM must be one of auto, cublas, triton, got 'cuda'"):
        linear_logprob(hidden, weight, labels)
