"""The operations under torch.compile: no graph breaks, and the bits of eager mode."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdpo.losses import PairLogps, preference_loss
from fastdpo.losses.modules import DPOLoss, FusedLinearDPOLoss
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_stats
from fastdpo.ops.linear_logprob.settings import STATS
from fastdpo.ops.logprob import logprob
from fastdpo.ops.sequence import sequence_logprob

N, V = 12, 70  # of `operands`
pytestmark = pytest.mark.usefixtures("fresh_compiler")


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


@pytest.fixture
def make(operands, pairs) -> Callable[[str], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """A function by its name, and arguments for it."""

    def of(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        hidden, weight, bias, labels = operands()
        plain = (hidden, weight, labels)
        logps, ref = torch.randn(6, requires_grad=True), torch.randn(6)
        loss_types = ["sigmoid", "hinge"]
        dpo, ipo = FusedLinearDPOLoss(loss_types, 0.3), DPOLoss("ipo", 0.2)
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
                lambda a, b: preference_loss(
                    PairLogps(*a.chunk(2), *b.chunk(2)), ["sigmoid", "hinge"], label_smoothing=0
                ),
                (logps, ref),
            ),
            "DPOLoss": (lambda a, b, n: ipo(a, b, n), (logps, ref, torch.randint(1, 5, (6,)))),
            "FusedLinearDPOLoss": (lambda w, h, y, r: dpo(w, h, y, ref_hidden=r), pairs()),
        }[name]

    return of


NAMES = (
    *("rows", "autocast", "policy_and_reference", "transposed"),
    *("trained", "frozen", "stats", "logprob", "sequence_logprob", "preference_loss", "DPOLoss", "FusedLinearDPOLoss"),
)


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, False) for name in NAMES), *((name, True) for name in NAMES[4:])]
)
def test_compiled_is_eager_to_the_bit(name, dynamic, results_of, equal, make):
    fn, args = make(name)
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert equal(results_of(compiled, args), results_of(fn, args))


def test_the_comparison_can_fail(results_of, equal, make):
    fn, args = make("trained")
    results = results_of(fn, args)
    assert not equal(results, results_of(lambda *a: fn(*a) * (1 + 2**-20), args))
    assert not equal(results, results_of(lambda *a: fn(*a).detach(), args))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends_compile(backend, monkeypatch, results_of, equal, make):
    monkeypatch.setenv("FASTDPO_BACKEND", backend)
    for name in ("stats", "logprob", "sequence_logprob"):
        fn, args = make(name)
        compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
        assert equal(results_of(compiled, args), results_of(fn, args))


def test_ignored_labels_in_a_graph(operands, results_of):
    """They cannot be taken out while a graph is traced: the same numbers, from tiles of another height."""
    hidden, weight, _, labels = operands(ignored=True)

    def fn(hidden, weight, labels):
        stats = linear_logprob_stats(hidden, weight, labels, stats=("entropy",))
        return stats.logprob, stats.entropy

    args = (hidden, weight, labels)
    compiled = results_of(torch.compile(fn, backend="aot_eager", fullgraph=True), args)
    for a, b in zip(compiled, results_of(fn, args), strict=True):
        assert torch.allclose(a, b, atol=1e-5) if isinstance(a, Tensor) else a is b
    assert bool((compiled[0][labels == -100] == 0).all())
    assert bool((compiled[-2][labels == -100] == 0).all())


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_one_graph_serves_many_lengths(trained, operands, results_of, equal):
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
def test_inductor(results_of, equal, make):
    fn, args = make("trained")
    assert equal(results_of(torch.compile(fn, fullgraph=True), args), results_of(fn, args))


def test_errors_keep_their_sentence_in_a_graph(monkeypatch, operands):
    hidden, weight, _, labels = operands()
    compiled = torch.compile(linear_logprob, backend="aot_eager")
    with pytest.raises(TypeError, match=r"labels must be int64, got torch.float32; call .long\(\)"):
        compiled(hidden, weight, labels.float())
    monkeypatch.setenv("FASTDPO_BACKEND", "cuda")
    with pytest.raises(Exception, match="must be one of auto, triton, tiled, reference, got 'cuda'"):
        compiled(hidden, weight, labels)
