"""Inputs and comparisons that several tests of the ops share."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdpo.ops import logprob, reference, sequence
from fastdpo.ops.linear_logprob import arguments, prepare
from fastdpo.ops.oracle import planted_inputs


@pytest.fixture(params=["tiled", "triton", "fused"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`fused` is triton with its own products, where a call can take them (16-bit operands)."""
    monkeypatch.setenv("FASTDPO_BACKEND", "triton" if request.param == "fused" else request.param)
    monkeypatch.setenv("FASTDPO_GEMM", "triton" if request.param == "fused" else "cublas")
    monkeypatch.setenv("FASTDPO_WORKSPACE_MB", "1")  # several tiles even for tiny shapes
    return request.param


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked at: ignored labels stay among the labels, and no range is checked."""
    for module in (arguments, prepare, logprob, sequence):
        monkeypatch.setattr(module, "reads_are_free", lambda _: False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def planted() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`planted(n, h, v, dtype, gaps)`: hidden, weight, labels as slices of NaN-filled buffers; rows' z_y -
    logsumexp(rest) runs over `gaps`, nats."""

    def make(
        n: int, h: int, v: int, dtype: torch.dtype, gaps: tuple[float, float] = (3.0, 16.0)
    ) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(n + h + v)
        hidden, weight, labels = planted_inputs(n, h, v, gaps, generator, steps=20)
        buffers = [torch.full((len(x) + 3, h + 8), math.nan, dtype=dtype) for x in (hidden, weight)]
        for buffer, x in zip(buffers, (hidden, weight), strict=True):
            buffer[1 : len(x) + 1, :h] = x.to(dtype)
        return buffers[0][1 : n + 1, :h], buffers[1][1 : v + 1, :h], labels

    return make


@pytest.fixture
def gradients() -> Callable[..., tuple[Any, ...]]:
    """`gradients(op, hidden, weight, bias, upstream, needs)`: (log-probs, dh, dW, db) of `op(hidden, weight, bias)`."""

    def of(
        op: Callable[..., Tensor],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        upstream: Tensor,
        needs: tuple[bool, ...] = (True, True, True),
    ) -> tuple[Any, ...]:
        leaves = [
            x if x is None else x.detach().requires_grad_(need)
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        out = op(*leaves)
        if any(needs):
            out.backward(upstream.to(out.dtype))
        return (out.detach(), *(x if x is None else x.grad for x in leaves))

    return of


@pytest.fixture
def eager() -> Callable[..., Callable[..., Tensor]]:
    """`eager(labels, dtype)`: what a plain loop does, logits in the operands' dtype and then an fp32 log-softmax."""

    def of(labels: Tensor, dtype: torch.dtype, **options: Any) -> Callable[..., Tensor]:
        def op(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            z = torch.nn.functional.linear(hidden, weight, bias)
            return reference.logprob(z.float() if dtype != torch.float64 else z, labels, **options)

        return op

    return of


@pytest.fixture
def operands() -> Callable[..., list[Tensor]]:
    """`operands(needs, dtype, ignored, n)`: hidden (n, 16), weight (70, 16), bias (70,), labels (n,)."""

    def make(
        needs: tuple[int, ...] = (1, 1, 1), dtype: torch.dtype = torch.float32, ignored: bool = False, n: int = 12
    ) -> list[Tensor]:
        shapes = ((n, 16), (70, 16), (70,))
        leaves = [torch.randn(s, dtype=dtype).requires_grad_(bool(k)) for s, k in zip(shapes, needs, strict=True)]
        labels = torch.randint(0, 70, (n,))
        if ignored:
            labels[::3] = -100
        return [*leaves, labels]

    return make


@pytest.fixture
def pairs() -> Callable[[], tuple[Tensor, ...]]:
    """`pairs()`: weight (70, 16), hidden (4, 3, 16), labels (4, 3), ref_hidden."""

    def make() -> tuple[Tensor, ...]:
        weight, hidden, ref_hidden = torch.randn(70, 16), torch.randn(4, 3, 16), torch.randn(4, 3, 16)
        return weight.requires_grad_(), hidden.requires_grad_(), torch.randint(0, 70, (4, 3)), ref_hidden

    return make


@pytest.fixture
def results_of() -> Callable[..., list[Any]]:
    """`results_of(fn, args)`: outputs, whether each is differentiable, and the gradients of fresh copies of `args`
    under fixed upstreams."""

    def of(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        args = tuple(x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args)
        outputs = [x for x in tree_leaves(fn(*args)) if isinstance(x, Tensor)]
        live = [x for x in outputs if x.requires_grad]
        if live:
            torch.autograd.backward(live, [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in live])
        grads = [x.grad for x in args if isinstance(x, Tensor) and x.grad is not None]
        return [*(x.detach() for x in outputs), *(x.requires_grad for x in outputs), *grads]

    return of


@pytest.fixture
def equal() -> Callable[[list[Any], list[Any]], bool]:
    """`equal(a, b)`: two lists of `results_of` agree to the bit."""

    def of(a: list[Any], b: list[Any]) -> bool:
        return len(a) == len(b) and all(
            torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y
            for x, y in zip(a, b, strict=True)
        )

    return of
