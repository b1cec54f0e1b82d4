"""The plan: which path, which tile, and that its predictions hold for what really runs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats
from fastdpo.ops.linear_logprob.plan import Needs, Shape, make_plan, tile
from fastdpo.ops.switches import MIB


def shape(n: int = 4096, h: int = 2048, v: int = 128256, **change) -> Shape:
    base = {"compute": 2, "acc": 4, "hidden": 2, "weight": 2, "widened": False}
    return Shape(n=n, h=h, v=v, source_rows=n, **{**base, **change})


def test_path_follows_from_what_needs_a_gradient():
    s = shape()
    nhv = s.n * s.h * s.v
    for needs, keep, path, flops in (
        (Needs(), 0, "stats", 2),
        (Needs(hidden=True), 0, "one_pass", 4),
        (Needs(hidden=True, entropy=True), 0, "one_pass", 6),
        (Needs(hidden=True, weight=True), 2048 * MIB, "kept", 6),
        (Needs(hidden=True, weight=True), 64 * MIB, "recompute", 8),
        (Needs(weight=True), 2048 * MIB, "kept", 4),
        (Needs(hidden=True, bias=True), 64 * MIB, "recompute", 6),
    ):
        plan = make_plan(s, needs, 64 * MIB, keep)
        assert (plan.path, plan.flops) == (path, flops * nhv)


@pytest.mark.parametrize("n", [1, 7, 1024, 1025, 4100, 16384, 70000])
@pytest.mark.parametrize("h", [64, 896, 4096, 16384])
@pytest.mark.parametrize("v", [1, 50257, 151936, 256000])
@pytest.mark.parametrize("widened", [False, True])
def test_tile_fits_the_budget_and_has_no_tiny_tail(n, h, v, widened):
    s = shape(n, h, v, widened=widened)
    rows, cols = tile(s, 64 * MIB)
    plan = make_plan(s, Needs(hidden=True, weight=True), 64 * MIB, 0)
    assert 1 <= rows <= n
    assert 1 <= cols <= v
    least = 8 * 16 * h * 4 + 128 * h * 8  # a minimal tile may not fit a tiny budget
    assert plan.workspace <= max(64 * MIB, least)
    blocks = -(-n // rows)
    assert n - (blocks - 1) * rows >= rows - blocks, "row blocks are balanced"


def test_tile_does_not_depend_on_the_path():
    s = shape()
    kinds = (Needs(), Needs(hidden=True), Needs(hidden=True, weight=True, bias=True))
    assert len({(p.rows, p.cols) for needs in kinds for p in [make_plan(s, needs, 64 * MIB, 0)]}) == 1


def test_a_small_call_takes_a_small_workspace():
    assert make_plan(shape(n=8, h=64, v=1000), Needs(hidden=True), 64 * MIB, 0).workspace < MIB


def peak_of(run) -> int:
    """Peak bytes of torch's CPU allocator above the start, from its own allocation events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize(
    ("needs", "keep", "options"),
    [
        ((0, 0, 0), "0", {}),
        ((0, 0, 0), "0", {"stats": ("entropy", "is_top1", "mean_logit", "lse", "log_sum_sq_probs")}),
        ((1, 0, 0), "0", {}),
        ((1, 0, 0), "0", {"softcap": 20.0}),
        ((1, 1, 0), "0", {}),
        ((1, 1, 1), "1024", {}),
        ((0, 1, 1), "1024", {"softcap": 20.0}),
        ((1, 1, 0), "0", {"stats": ("entropy", "is_top1", "mean_logit", "lse", "log_sum_sq_probs")}),
    ],
    ids=["stats", "all_stats", "frozen", "softcap", "recompute", "kept", "kept_softcap", "recompute_all_stats"],
)
def test_peak_and_flops_are_as_predicted(dtype, needs, keep, options, monkeypatch):
    monkeypatch.undo()  # poisoned torch.empty would be seen as work, not as memory; keep torch as it is
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "4")
    monkeypatch.setenv("FASTDPO_BACKEND", "tiled")
    n, h, v = 700, 128, 6000
    hidden, weight, bias = torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype), torch.randn(v, dtype=dtype)
    for x, need in zip((hidden, weight, bias), needs, strict=True):
        x.requires_grad_(bool(need))
    labels = torch.randint(0, v, (n,))
    labels[::3] = -100
    plan = linear_logprob_plan(hidden, weight, labels, bias=bias, entropy_grad=False, **options)

    def step():
        out = linear_logprob_stats(hidden, weight, labels, bias=bias, entropy_grad=False, **{"stats": (), **options})
        if any(needs):
            out.logprob.sum().backward()

    step()  # warm up, and let gradients be allocated afresh below
    for x in (hidden, weight, bias):
        x.grad = None
    peak = peak_of(step)
    assert peak > 0
    assert peak <= plan.peak_bytes, f"peak {peak / MIB:.2f} MiB, predicted {plan.peak_bytes / MIB:.2f}"
    assert peak >= 0.35 * plan.peak_bytes, "the prediction is not a mere upper bound"
    for x in (hidden, weight, bias):
        x.grad = None
    with FlopCounterMode(display=False) as counter:
        step()
    extra = 2 * int((labels != -100).sum()) * h if "mean_logit" in options.get("stats", ()) else 0
    assert counter.get_total_flops() in (plan.flops, plan.flops + extra)


@pytest.mark.parametrize(
    ("n", "h", "v", "workspace", "rows", "dtype", "trained"),
    [
        (800, 128, 3000, "4", True, torch.float32, True),
        (3000, 64, 2000, "4", False, torch.bfloat16, True),
        (300, 2048, 3000, "1", False, torch.bfloat16, True),
        (300, 2048, 3000, "1", False, torch.bfloat16, False),
        (600, 128, 3000, "4", "slice", torch.float32, False),
    ],
    ids=["rows", "row_blocks", "small_budget", "small_budget_frozen", "view"],
)
@pytest.mark.parametrize("keep", ["0", "1024"], ids=["recompute", "kept"])
def test_peak_is_as_predicted_in_odd_cases(n, h, v, workspace, rows, dtype, trained, keep, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", workspace)
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    hidden = torch.randn(2, n // 2 + 1, h, dtype=dtype)[:, :-1] if rows == "slice" else torch.randn(n, h, dtype=dtype)
    hidden.requires_grad_()
    weight = torch.randn(v, h, dtype=dtype, requires_grad=trained)
    labels = torch.randint(0, v, hidden.shape[:-1])
    options = {"rows": torch.randint(0, n, (n,))} if rows is True else {}
    plan = linear_logprob_plan(hidden, weight, labels, **options)

    def step():
        leaf = hidden.detach().requires_grad_()
        linear_logprob(leaf, weight, labels, **options).sum().backward()

    step()
    weight.grad = None
    peak = peak_of(step)
    assert peak <= plan.peak_bytes, f"peak {peak / MIB:.2f} MiB, predicted {plan.peak_bytes / MIB:.2f}"


@pytest.mark.parametrize("keep", ["0", "1024"], ids=["recompute", "kept"])
@pytest.mark.parametrize("rows", [False, True], ids=["all", "rows"])
def test_peak_under_autocast_is_as_predicted(keep, rows, monkeypatch):
    """fp32 parameters in 16-bit products: one rounded copy of each operand's block, not two."""
    monkeypatch.undo()
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "1")
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    hidden, weight = torch.randn(96, 256), torch.randn(1500, 256, requires_grad=True)
    labels = torch.randint(0, 1500, (96,))
    options = {"rows": torch.randperm(96)} if rows else {}

    def step():
        leaf = hidden.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear_logprob(leaf, weight, labels, **options).sum().backward()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = linear_logprob_plan(hidden.requires_grad_(), weight, labels, **options)
    step()
    weight.grad = None
    peak = peak_of(step)
    assert peak <= plan.peak_bytes, f"peak {peak / MIB:.2f} MiB, predicted {plan.peak_bytes / MIB:.2f}"


def test_peak_where_only_a_lora_is_trained(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "2")
    hidden, weight = torch.randn(300, 256).bfloat16(), torch.randn(3000, 256).bfloat16()
    u, b = torch.randn(300, 8, requires_grad=True), torch.randn(3000, 8)
    labels = torch.randint(0, 3000, (300,))
    plan = linear_logprob_plan(hidden, weight, labels, lora=(u, b))

    def step():
        u.grad = None
        linear_logprob(hidden, weight, labels, lora=(u, b)).sum().backward()

    step()
    u.grad = None
    peak = peak_of(step)
    assert peak <= plan.peak_bytes, f"peak {peak / MIB:.2f} MiB, predicted {plan.peak_bytes / MIB:.2f}"


def test_a_torch_that_cannot_add_in_its_product_takes_one_more_block():
    wide, spare = (make_plan(shape(spare=x), Needs(hidden=True, weight=True), 64 * MIB, 0) for x in (False, True))
    assert spare.flops == wide.flops
    assert spare.workspace <= 64 * MIB
    assert spare.cols <= wide.cols


def test_many_picked_rows_come_in_parts_and_are_counted():
    """What a trained head takes on top of the budget: one copy of the picked or rounded rows, in the compute dtype."""
    s = {"n": 16384, "h": 4096}
    on_top = s["n"] * s["h"] * 2
    for change in ({"gathered": True}, {"hidden": 4, "weight": 4}, {"gathered": True, "hidden": 4, "weight": 4}):
        plan = make_plan(shape(**s, **change), Needs(hidden=True, weight=True), 64 * MIB, 0)
        assert plan.back_rows == s["n"]
        assert plan.workspace <= 64 * MIB + on_top + 48 * MIB, change


def test_budgets_come_from_the_environment(monkeypatch):
    arguments = torch.randn(300, 64, requires_grad=True), torch.randn(9000, 64), torch.randint(0, 9000, (300,))
    wide, before = linear_logprob_plan(*arguments), linear_logprob(*arguments)
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "1")
    narrow = linear_logprob_plan(*arguments)
    assert narrow.workspace <= MIB < wide.workspace
    assert torch.allclose(linear_logprob(*arguments), before, atol=1e-5)
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "lots")
    with pytest.raises(ValueError, match="FASTDPO_WORKSPACE_MB must be a whole number of MiB, got 'lots'"):
        linear_logprob(*arguments)
