"""The operations as custom operators: opcheck, torch.compile without graph breaks, no read of a device's values."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdpo.losses import PairLogps, preference_loss
from fastdpo.losses.modules import DPOLoss, FusedLinearDPOLoss
from fastdpo.ops import logprob as logprob_module
from fastdpo.ops import sequence
from fastdpo.ops.linear_logprob import arguments, operator, prepare, settings
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats
from fastdpo.ops.logprob import logprob
from fastdpo.ops.sequence import segment_sum, sequence_logprob

STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "lse")
N, H, V = 12, 16, 70
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked at: ignored labels stay among the labels, and no range is checked."""
    for module in (arguments, prepare, logprob_module, sequence):
        monkeypatch.setattr(module, "reads_are_free", lambda _: False)


def operands(needs=(1, 1, 1), dtype=torch.float32, ignored=False, n=N) -> list[Tensor]:
    """hidden (n, H), weight (V, H), bias (V,), labels (n,)."""
    shapes = ((n, H), (V, H), (V,))
    leaves = [torch.randn(s, dtype=dtype).requires_grad_(bool(k)) for s, k in zip(shapes, needs, strict=True)]
    labels = torch.randint(0, V, (n,))
    if ignored:
        labels[::3] = -100
    return [*leaves, labels]


def results_of(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """Outputs, whether each is differentiable, and the gradients of fresh copies of `args` under fixed upstreams."""
    args = tuple(x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args)
    outputs = [x for x in tree_leaves(fn(*args)) if isinstance(x, Tensor)]
    live = [x for x in outputs if x.requires_grad]
    if live:
        torch.autograd.backward(live, [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in live])
    grads = [x.grad for x in args if isinstance(x, Tensor) and x.grad is not None]
    return [*(x.detach() for x in outputs), *(x.requires_grad for x in outputs), *grads]


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y
        for x, y in zip(a, b, strict=True)
    )


class Recorded(TorchDispatchMode):
    """The arguments of each of our operators that is called, by its name; what it does inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastdpo":
            self.calls[func.name()] = tree_map_only(Tensor, Tensor.detach, args)
        return func(*args, **(kwargs or {}))


def op_arguments(
    rows: Tensor | None = None, stats=(), softcap: float | None = None, rank: int = 0, **options
) -> tuple[Any, ...]:
    hidden, weight, bias, labels = operands(**options)
    u, b = (torch.randn(len(x), rank, dtype=x.dtype).requires_grad_() for x in (hidden, weight))
    pair = (u, b) if rank else None
    call = prepare.PreparedCall.of(
        hidden,
        weight,
        labels,
        bias=bias,
        rows=rows,
        temperature=1.1,
        logit_scale=0.9,
        softcap=softcap,
        ignore_index=-100,
        shift=False,
        lora=pair,
        stats=stats,
        entropy_grad=True,
    )
    return hidden, weight, bias, *(pair or (None, None)), call.operands.labels, call.operands.rows, *call.settings


CASES = {
    "stats": ("stats", {"needs": (0, 0, 0), "stats": STATS}),
    "one_pass": ("one_pass", {"needs": (1, 0, 0), "ignored": True}),
    "one_pass_entropy": ("one_pass", {"needs": (1, 0, 0), "stats": STATS}),
    "kept": ("kept", {"softcap": 3.0}),
    "kept_ignored": ("kept", {"needs": (1, 1, 0), "ignored": True}),
    "kept_bias_only": ("kept", {"needs": (0, 0, 1)}),
    "recompute": ("recompute", {"ignored": True, "softcap": 3.0}),
    "recompute_entropy": ("recompute", {"stats": STATS, "softcap": 3.0, "needs": (1, 1, 0)}),
    "lora": ("kept", {"needs": (1, 0, 0), "rank": 3}),
    "lora_entropy": ("recompute", {"needs": (1, 0, 0), "rank": 3, "stats": STATS}),
    "rows": ("kept", {"n": 7, "rows": torch.tensor([1, 1, 0, 6, 2, 3, 3])}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck_and_both_routes(case, dtype, monkeypatch, as_on_a_gpu):
    path, options = CASES[case]
    monkeypatch.setenv("FASTDPO_KEEP_MB", "0" if path == "recompute" else "64")
    args = op_arguments(dtype=dtype, **options)
    op = torch.ops.fastdpo.linear_logprob.default
    with Recorded() as record:
        as_operator = results_of(op, args)
        as_function = results_of(operator.run, args)
    assert equal(as_operator, as_function)
    assert len([x for x in as_operator if x is True]) == (path != "stats") + ("entropy" in case) + (path == "one_pass")
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}
    if path != "stats":
        backward = torch.ops.fastdpo.linear_logprob_backward.default
        assert set(torch.library.opcheck(backward, record.calls[backward.name()]).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", ["kept", "one_pass", "stats"])
def test_opcheck_of_the_fused_kernels(case, monkeypatch, as_on_a_gpu):
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    monkeypatch.setenv("FASTDPO_GEMM", "triton")
    args = op_arguments(dtype=torch.bfloat16, **CASES[case][1])
    assert settings.Settings(*args[7:]).fused > 0
    op = torch.ops.fastdpo.linear_logprob.default
    assert equal(results_of(op, args), results_of(operator.run, args))
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_opcheck_notices_a_wrong_shape(monkeypatch):
    args, right = op_arguments(), operator._outputs

    def wrong(*args):
        return {**right(*args), "q": ((N,), torch.float64)}

    monkeypatch.setattr(operator, "_outputs", wrong)
    with pytest.raises(Exception, match="test_faketensor failed"):
        torch.library.opcheck(torch.ops.fastdpo.linear_logprob.default, args, test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck_of_the_smaller_operations(dtype):
    ops = torch.ops.fastdpo
    logits = torch.randn(N, V, dtype=dtype)
    labels = torch.randint(-1, V, (N,))
    for x in (logits, torch.randn(V, N, dtype=dtype).t()):
        args = (x.requires_grad_(), labels, 0.7, False)
        with Recorded() as record:
            assert equal(results_of(ops.logprob.default, args), results_of(logprob_module._run, args))
        gradients = (ops.logprob_backward.default, record.calls["fastdpo::logprob_backward"])
        for op, its in ((ops.logprob.default, args), gradients):
            assert set(torch.library.opcheck(op, its).values()) == {"SUCCESS"}
    args = (torch.randn(N, dtype=dtype, requires_grad=True), torch.tensor([0, 0, 5, N]))
    assert equal(results_of(ops.segment_sum.default, args), results_of(sequence._run, args))
    assert set(torch.library.opcheck(ops.segment_sum.default, args).values()) == {"SUCCESS"}


def pairs() -> tuple[Tensor, ...]:
    """weight, hidden (4, 3, H), labels (4, 3), ref_hidden."""
    weight, hidden, ref_hidden = torch.randn(V, H), torch.randn(4, 3, H), torch.randn(4, 3, H)
    return weight.requires_grad_(), hidden.requires_grad_(), torch.randint(0, V, (4, 3)), ref_hidden


def autocast(hidden, weight, labels):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return linear_logprob(hidden, weight, labels)


def twice(hidden, weight, labels):
    """The policy's log-probs over the reference's, as in a step."""
    with torch.no_grad():
        reference = linear_logprob(hidden, weight, labels)
    return linear_logprob(hidden, weight, labels) - reference


def frozen(hidden, weight, labels):
    return linear_logprob(hidden, weight.detach(), labels, temperature=0.7, softcap=3.0)


def three(hidden, weight, labels, rows=None, **options):
    return linear_logprob(hidden, weight, labels, rows=rows, **options)


def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    hidden, weight, bias, labels = operands()
    plain = (hidden, weight, labels)
    logps, ref = torch.randn(6, requires_grad=True), torch.randn(6)
    dpo, ipo = FusedLinearDPOLoss(["sigmoid", "hinge"], 0.3), DPOLoss("ipo", 0.2)
    return {
        "trained": (lambda h, w, y, b: linear_logprob(h, w, y, bias=b), (*plain, bias)),
        "frozen": (frozen, plain),
        "rows": (three, (hidden, weight, labels[:5], torch.tensor([1, 1, 0, 3, 11]))),
        "stats": (lambda h, w, y: linear_logprob_stats(h, w, y, stats=STATS), plain),
        "autocast": (autocast, plain),
        "policy_and_reference": (twice, plain),
        "transposed": (lambda h, w, y: linear_logprob(h.t(), w.t(), y), (hidden.t(), weight.t(), labels)),
        "logprob": (lambda z, y: logprob(z, y, temperature=0.9), (torch.randn(N, V, requires_grad=True), labels)),
        "sequence_logprob": (lambda w, h, y, _: sequence_logprob(h, w, y, average=True), pairs()),
        "preference_loss": (
            lambda a, b: preference_loss(PairLogps(*a.chunk(2), *b.chunk(2)), ["sigmoid", "hinge"], label_smoothing=0),
            (logps, ref),
        ),
        "DPOLoss": (lambda a, b, n: ipo(a, b, n), (logps, ref, torch.randint(1, 5, (6,)))),
        "FusedLinearDPOLoss": (lambda w, h, y, r: dpo(w, h, y, ref_hidden=r), pairs()),
    }[name]


NAMES = (
    *("rows", "autocast", "policy_and_reference", "transposed"),
    *("trained", "frozen", "stats", "logprob", "sequence_logprob", "preference_loss", "DPOLoss", "FusedLinearDPOLoss"),
)


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, False) for name in NAMES), *((name, True) for name in NAMES[4:])]
)
def test_compiled_is_eager_to_the_bit(name, dynamic):
    fn, args = make(name)
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert equal(results_of(compiled, args), results_of(fn, args))


def test_the_comparison_can_fail():
    fn, args = make("trained")
    found = results_of(fn, args)
    assert not equal(found, results_of(lambda *a: fn(*a) * (1 + 2**-20), args))
    assert not equal(found, results_of(lambda *a: fn(*a).detach(), args))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends_compile(backend, monkeypatch):
    monkeypatch.setenv("FASTDPO_BACKEND", backend)
    for name in ("stats", "logprob", "sequence_logprob"):
        fn, args = make(name)
        compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
        assert equal(results_of(compiled, args), results_of(fn, args))


def test_ignored_labels_in_a_graph():
    """They cannot be taken out while a graph is traced: the same numbers, from tiles of another height."""
    hidden, weight, _, labels = operands(ignored=True)

    def fn(hidden, weight, labels):
        found = linear_logprob_stats(hidden, weight, labels, stats=("entropy",))
        return found.logprob, found.entropy

    args = (hidden, weight, labels)
    compiled = results_of(torch.compile(fn, backend="aot_eager", fullgraph=True), args)
    for a, b in zip(compiled, results_of(fn, args), strict=True):
        assert torch.allclose(a, b, atol=1e-5) if isinstance(a, Tensor) else a is b
    assert bool((compiled[0][labels == -100] == 0).all())
    assert bool((compiled[-2][labels == -100] == 0).all())


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_one_graph_serves_many_lengths(trained):
    def compiles(lengths: tuple[int, ...], **options: Any) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(linear_logprob, backend=counter, fullgraph=True, **options)

        def marked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            if not options:
                torch._dynamo.mark_dynamic(hidden, 0)
                torch._dynamo.mark_dynamic(labels, 0)
            return compiled(hidden, weight, labels)

        for n in lengths:
            hidden, weight, _, labels = operands((1, trained, 0), n=n)
            args = (hidden, weight, labels)
            assert equal(results_of(marked, args), results_of(linear_logprob, args))
        return counter.frame_count

    assert compiles((70, 71, 128, 300, 900)) == 1
    # where the plan of a trained head changes, one more
    assert compiles((3, 20, 70, 900, 1500)) <= (3 if trained else 1)
    assert compiles((70, 71, 128), dynamic=False) == 3


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor():
    fn, args = make("trained")
    assert equal(results_of(torch.compile(fn, fullgraph=True), args), results_of(fn, args))


def test_errors_keep_their_sentence_in_a_graph(monkeypatch):
    hidden, weight, _, labels = operands()
    compiled = torch.compile(linear_logprob, backend="aot_eager")
    with pytest.raises(TypeError, match=r"labels must be int64, got torch.float32; call .long\(\)"):
        compiled(hidden, weight, labels.float())
    monkeypatch.setenv("FASTDPO_BACKEND", "cuda")
    with pytest.raises(Exception, match="must be one of auto, triton, tiled, reference, got 'cuda'"):
        compiled(hidden, weight, labels)


def test_a_second_derivative_is_refused():
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


def head_cases() -> dict[str, Callable[[Tensor], Any]]:
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


@pytest.mark.parametrize(
    ("backend", "keep", "compiled"),
    [("tiled", "0", False), ("tiled", "64", False), ("triton", "64", False), ("tiled", "64", True)],
    ids=["recompute", "kept", "triton", "compiled"],
)
def test_a_gradient_penalty_never_counts_for_nothing(backend, keep, compiled, monkeypatch):
    monkeypatch.setenv("FASTDPO_BACKEND", backend)
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    few = compiled or backend == "triton"
    for name in ("one_pass", "entropy", "lora's u", "logprob") if few else head_cases():
        op = head_cases()[name]
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


def test_the_reference_backend_has_second_derivatives(monkeypatch):
    monkeypatch.setenv("FASTDPO_BACKEND", "reference")
    hidden, weight, bias, labels = (x.detach().double() if x.is_floating_point() else x for x in operands())
    labels[0] = -100

    def op(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
        found = linear_logprob_stats(x, w, labels, bias=c, softcap=3.0, stats=("entropy",))
        assert found.entropy is not None
        return found.logprob + found.entropy

    leaves = [x[:3].requires_grad_() if x is hidden else x.requires_grad_() for x in (hidden, weight, bias)]
    labels = labels[:3]
    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_changes_in_place_are_noticed():
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


def test_autocast_is_off_inside_forward_and_backward(monkeypatch):
    seen = []
    for module, name in ((operator.forward, "forward"), (operator, "_scaled"), (logprob_module, "softplus")):
        inner = getattr(module, name)

        def spy(*args, inner=inner):
            seen.append(torch.is_autocast_enabled("cpu"))
            return inner(*args)

        monkeypatch.setattr(module, name, spy)
    hidden, weight, _, labels = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_logprob(hidden, weight, labels).sum().backward()
        logprob(torch.randn(N, V), labels)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False, False, False]


@pytest.mark.parametrize("unused", [0, 1], ids=["logprob", "entropy"])
def test_a_gradient_that_is_none_stays_none(unused):
    with Recorded() as record:
        found = torch.ops.fastdpo.linear_logprob.default(*op_arguments(stats=("entropy",)))
        found[1 - unused].sum().backward()
    upstream = record.calls["fastdpo::linear_logprob_backward"][:2]
    assert [x is None for x in upstream] == [unused == 0, unused == 1]


class NothingRead(TorchDispatchMode):
    """Fails where an operation's result or shape depends on values, which on a GPU waits for them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.repeat_interleave.Tensor:
            reads = kwargs.get("output_size") is None
        elif func is torch.ops.aten.index.Tensor:
            reads = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        assert not reads, f"{func} reads values"
        return func(*args, **kwargs)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_nothing_waits_for_a_device(backend, keep, monkeypatch, as_on_a_gpu):
    monkeypatch.setenv("FASTDPO_BACKEND", backend)
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    weight, states, pair_labels, ref_states = pairs()
    pair_labels[0, 0] = -100
    ran = []
    # on a CPU, bf16 and kept, dW comes from a routine of its own, which may look at labels
    for dtype in (torch.float32,) if keep == "64" else (torch.float32, torch.bfloat16):
        for needs in ((0, 0, 0), (1, 0, 0), (1, 1, 1)):
            hidden, w, bias, labels = operands(needs, dtype, ignored=True)
            ran.append(linear_logprob_plan(hidden, w, labels, bias=bias, stats=STATS, entropy_grad=False).path)
            with NothingRead():
                for entropy_grad in (False, True):
                    found = linear_logprob_stats(
                        hidden, w, labels, bias=bias, stats=STATS, softcap=4.0, entropy_grad=entropy_grad
                    )
                    total = found.logprob.sum() + found.entropy.sum()
                    if total.requires_grad:
                        total.backward()
                rows = torch.tensor([0, 0, 5, 3])
                out = linear_logprob(hidden, w, labels[:4], rows=rows)
                if out.requires_grad:
                    out.sum().backward()
    assert set(ran) == {"stats", "one_pass", "kept" if keep == "64" else "recompute"}
    logits = torch.randn(N, V, requires_grad=True)
    with NothingRead():
        logprob(logits, operands(ignored=True)[-1]).sum().backward()
        FusedLinearDPOLoss(shift=True)(weight, states, pair_labels, ref_hidden=ref_states)[0].backward()


def test_a_read_is_noticed():
    hidden, weight, _, labels = operands(ignored=True)
    for read in (
        lambda: linear_logprob(hidden, weight, labels),  # on a CPU it takes ignored labels out
        lambda: torch.repeat_interleave(labels, torch.ones_like(labels)),
        lambda: labels[labels > 0],
        lambda: labels.max().item(),
    ):
        with pytest.raises(AssertionError, match="reads values"), NothingRead():
            read()


def on(device: str, args: list[Tensor]) -> list[Tensor]:
    return [x.detach().to(device).requires_grad_(x.requires_grad) for x in args]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
class TestOnAGpu:
    pytestmark = on_a_gpu

    def test_forward_and_backward_replay_from_a_graph(self, trained, keep, monkeypatch):
        monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
        first, second = (
            on("cuda", [*operands((1, trained, 0), torch.bfloat16, n=300)[:2], x])
            for x in (operands(ignored=True, n=300)[-1], operands(n=300)[-1])
        )

        def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
            out = linear_logprob(hidden, weight, labels)
            wanted = [x for x in (hidden, weight) if x.requires_grad]
            return [out.detach(), *torch.autograd.grad(out, wanted, torch.linspace(-1, 1, 300, device="cuda"))]

        expected = [[x.clone() for x in step(*args)] for args in (first, second)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(*first)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(*first)
        for args, wanted in ((first, expected[0]), (second, expected[1])):
            with torch.no_grad():
                for static, fresh in zip(first, args, strict=True):
                    static.copy_(fresh)
            graph.replay()
            assert equal(captured, wanted)
        assert not equal(expected[0], expected[1])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_a_device_that_is_not_current(self, trained, keep, monkeypatch):
        monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
        args, found = operands((1, trained, 0), ignored=True), []
        for device in ("cuda:0", "cuda:1"):
            hidden, weight, _, labels = on(device, args)
            with torch.cuda.device(0):
                results = results_of(linear_logprob, (hidden, weight, labels))
            found.append([x.cpu() if isinstance(x, Tensor) else x for x in results])
        assert equal(*found)
