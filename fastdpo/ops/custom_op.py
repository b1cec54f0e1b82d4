"""An operation as `torch.compile` wants it (opaque, with fake tensors and autograd) and as eager code wants it (cheap).

Both routes share the forward, what it saves and the backward. Under compilation a call is one custom operator in the
graph. In eager mode it is a plain `autograd.Function`: the custom operator's dispatch costs 0.1 to 0.2 ms a call, as
much as the launches of a small problem, and hides what runs inside it from profilers, FLOP counters and other modes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdpo.ops.switches import choose_backend
from fastdpo.ops.tensor_kinds import is_abstract, transformed

Implementation = Callable[..., Sequence[Tensor]]
Setup = Callable[[Any, Sequence[Any], Sequence[Tensor]], None]
# (ctx, upstream gradients, who computes the gradients) -> one gradient or None for each argument
Backward = Callable[[Any, Sequence[Tensor | None], Any], tuple[Any, ...]]


def gradient_op(name: str, implementation: Implementation, fake: Implementation) -> Implementation:
    """The custom operator that computes gradients; differentiating it refuses with a sentence."""
    op = torch.library.custom_op(f"fastdpo::{name}_backward", implementation, mutates_args=())
    op.register_fake(fake)

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{name} can be differentiated once: its gradients have no gradients (create_graph=True); "
            "FASTDPO_BACKEND=reference has them, at the cost of all logits."
        )

    op.register_autograd(refuse)
    return op


def differentiable_op(
    name: str,
    forward: Implementation,
    fake: Implementation,
    setup_context: Setup,
    backward: Backward,
    gradients: tuple[Implementation, Implementation] | None = None,
) -> Implementation:
    """A function of `forward`'s arguments that is differentiable once, in eager mode and under `torch.compile`.

    Args:
        name: of the custom operator `fastdpo::name`.
        forward, fake: what it computes, annotated so that torch infers the operator's schema (it returns list[Tensor]),
            and tensors of the same shapes and dtypes.
        setup_context, backward: as `torch.library.custom_op(...).register_autograd` takes them, but for backward's
            last argument.
        gradients: what computes the gradients, as it is and as a `gradient_op`: the one is cheap, the other can be
            traced, and answers whoever differentiates a gradient. None where `backward` is plain torch.
    """
    op = torch.library.custom_op(f"fastdpo::{name}", forward, mutates_args=())
    op.register_fake(fake)
    plain, opaque = gradients or (None, None)
    op.register_autograd(lambda ctx, upstream: backward(ctx, upstream, opaque), setup_context=setup_context)

    no_transform = (
        f"{name} does not run under torch.func (grad, vjp, jvp, vmap) or in forward mode; take torch.autograd.grad for "
        "gradients and leading dimensions for a batch, or FASTDPO_BACKEND=reference, at the cost of all logits."
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return tuple(output)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
            return backward(ctx, upstream, opaque if torch.is_grad_enabled() else plain)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(no_transform)

    Eager.__name__ = Eager.__qualname__ = name

    def call(*inputs: Any) -> Sequence[Tensor]:
        if torch.compiler.is_compiling() or is_abstract(inputs[0]):
            return op(*inputs)
        if transformed():
            raise RuntimeError(no_transform)
        return Eager.apply(*inputs)

    return call


@contextmanager
def on_device_without_autocast(device: torch.device) -> Iterator[None]:
    """For the work of an operation: its own dtypes whatever autocast says, and its device current, for Triton."""
    there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with there, without_autocast(device):
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def reads_are_free(x: Tensor) -> bool:
    """Values may be looked at: there are some, no device is waited for, and no graph is being traced."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not is_abstract(x) and not transformed()


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler (1 to 2 s) to set this attribute."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


@constant_in_graphs
def constant_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend of the moment; in a compiled graph that of the moment it was traced."""
    return choose_backend(device, dtype)
