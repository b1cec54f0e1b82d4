"""The operations as custom operators: opcheck, and the same bits as in eager mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastdpo.ops import logprob as logprob_module
from fastdpo.ops import sequence
from fastdpo.ops.linear_logprob import operator, prepare
from fastdpo.ops.linear_logprob.api import linear_logprob
from fastdpo.ops.linear_logprob.settings import STATS, Settings
from fastdpo.ops.logprob import logprob

N, V = 12, 70  # of `operands`
pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Recorded(TorchDispatchMode):
    """The arguments of each of our operators that is called, by its name; what it does inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastdpo":
            self.calls[func.name()] = tree_map_only(Tensor, Tensor.detach, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def op_arguments(operands: Callable[..., list[Tensor]]) -> Callable[..., tuple[Any, ...]]:
    """The operator's arguments as a call prepares them; those that `operands` takes, and these."""

    def of(
        rows: Tensor | None = None, stats=(), softcap: float | None = None, rank: int = 0, **options: Any
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

    return of


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
def test_opcheck_and_both_routes(case, dtype, monkeypatch, as_on_a_gpu, results_of, equal, op_arguments):
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
def test_opcheck_of_the_fused_kernels(case, monkeypatch, as_on_a_gpu, results_of, equal, op_arguments):
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    monkeypatch.setenv("FASTDPO_GEMM", "triton")
    args = op_arguments(dtype=torch.bfloat16, **CASES[case][1])
    assert Settings(*args[7:]).fused > 0
    op = torch.ops.fastdpo.linear_logprob.default
    assert equal(results_of(op, args), results_of(operator.run, args))
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_opcheck_notices_a_wrong_shape(monkeypatch, op_arguments):
    args, right = op_arguments(), operator._outputs

    def wrong(*args):
        return {**right(*args), "q": ((N,), torch.float64)}

    monkeypatch.setattr(operator, "_outputs", wrong)
    with pytest.raises(Exception, match="test_faketensor failed"):
        torch.library.opcheck(torch.ops.fastdpo.linear_logprob.default, args, test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck_of_the_smaller_operations(dtype, results_of, equal):
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


@pytest.mark.parametrize("unused", [0, 1], ids=["logprob", "entropy"])
def test_a_gradient_that_is_none_stays_none(unused, op_arguments):
    with Recorded() as record:
        outputs = torch.ops.fastdpo.linear_logprob.default(*op_arguments(stats=("entropy",)))
        outputs[1 - unused].sum().backward()
    upstream = record.calls["fastdpo::linear_logprob_backward"][:2]
    assert [x is None for x in upstream] == [unused == 0, unused == 1]


def test_autocast_is_off_inside_forward_and_backward(monkeypatch, operands):
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
