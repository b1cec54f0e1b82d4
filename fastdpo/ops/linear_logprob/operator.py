"""The op itself: arguments as plain values, what is saved, and a backward that is a row scale where the head is frozen.

`run` is what a checked call ends in (prepare.py). Path and tile follow from the arguments' shapes and from `Settings`
alone, so forward, backward and the fake tensors of `torch.compile` find the same ones.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.custom_op import Implementation, differentiable_op, gradient_op, inside
from fastdpo.ops.linear_logprob import forward, head_gradient
from fastdpo.ops.linear_logprob.operands import HeadOperands, TokenOperands
from fastdpo.ops.linear_logprob.plan import Plan, route
from fastdpo.ops.linear_logprob.settings import SETTINGS, Settings, plan_of, result_names, shape_of
from fastdpo.ops.numerics import blocks

logger = logging.getLogger("fastdpo")


def _outputs(
    settings: Settings, path: str, cols: int, n: int, h: int, v: int, rank: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each of forward's outputs, by name and in order: results, then what is saved for backward."""
    needs, acc, compute = settings.wanted, settings.acc, settings.compute
    row, names = ((n,), acc), result_names(settings)
    if needs.hidden or needs.lora_hidden or needs.head:
        names += ["q", *("direction", "entropy_direction")[: needs.directions]]
        names += ("lora_direction", "lora_entropy_direction")[: needs.lora_directions]
    if needs.head:
        names += ["m", "s", *(["zy"] if settings.softcap else [])]
    elif needs.hidden or needs.lora_hidden:
        names += ["anchor"]
    odd = {"is_top1": ((n,), torch.bool), "anchor": ((0,), acc)} | dict.fromkeys(
        ("direction", "entropy_direction"), ((n, h), compute)
    )
    odd |= dict.fromkeys(("lora_direction", "lora_entropy_direction"), ((n, rank), settings.lora_compute))
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {name: odd.get(name, row) for name in names}
    if path == "kept":
        blocks = -(-v // cols)
        out |= {"kept": ((blocks, n, cols), compute), "bases": ((blocks, n), acc)}
    return out


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    *values: Any,
) -> list[Tensor]:
    """Results (N,), then what backward needs; hidden (R, H), weight (V, H), LoRA (R, r), (V, r), labels, rows (N,)."""
    settings = Settings(*values)
    sizes = (*hidden.shape, len(weight), _rank(lora_weight))
    shape = shape_of(settings, hidden.device, len(labels), sizes, (hidden.dtype, weight.dtype), rows is not None)
    plan = plan_of(settings, shape)
    logger.debug("linear_logprob: %s backend, %s", settings.backend, plan)
    head = HeadOperands(weight, bias, settings.compute, settings.acc, lora_weight, settings.lora_compute)
    tokens = TokenOperands(hidden, labels, rows, settings.ignored, lora_hidden)
    with inside(hidden.device):
        found, saved = forward.forward(settings.tiles(), tokens, head, settings.how, plan, settings.wanted)
        if settings.ignored:
            saved.q = saved.q.where(labels >= 0, 0.0)
    saved.anchor = saved.q.new_empty(0)
    by_name = {**vars(saved), **found}
    return [by_name[name] for name in _outputs(settings, plan.path, plan.cols, len(labels), *sizes[1:])]


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    *values: Any,
) -> list[Tensor]:
    settings = Settings(*values)
    n, sizes, path, cols = labels.shape[0], (*hidden.shape, weight.shape[0], _rank(lora_weight)), "", 0
    if settings.wanted.head:
        # of no other path do the shapes depend on the plan, and its comparisons of a symbolic N become guards
        shape = shape_of(settings, hidden.device, n, sizes, (hidden.dtype, weight.dtype), rows is not None)
        path, _, cols = route(shape, settings.wanted, settings.workspace, settings.keep)
    outputs = _outputs(settings, path, cols, n, *sizes[1:])
    return [hidden.new_empty(shape, dtype=dtype) for shape, dtype in outputs.values()]


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    hidden, weight, bias, lora_hidden, lora_weight, labels, rows, *values = inputs
    settings = Settings(*values)
    needs, results = settings.wanted, result_names(settings)
    ctx.set_materialize_grads(False)
    entropy = output[results.index("entropy")] if needs.entropy else None
    frozen = not needs.head and (needs.hidden or needs.lora_hidden)
    anchor = output[-1] if frozen else None
    ctx.mark_non_differentiable(*(x for x in output[1:] if x is not entropy and x is not anchor))
    # rows are saved in any case: autograd then notices a change in place
    arguments = (*((hidden, weight, bias, lora_hidden, lora_weight, labels) if needs.head else (None,) * 6), rows)
    ctx.save_for_backward(*arguments, entropy if needs.head else None, *output[len(results) :])
    lora_dtype = hidden.dtype if lora_hidden is None else lora_hidden.dtype
    ctx.settings, ctx.dtypes = settings, (hidden.dtype, weight.dtype, lora_dtype)
    ctx.sizes = (*hidden.shape, weight.shape[0], _rank(lora_weight))


def _backward(ctx: Any, upstream: Sequence[Tensor | None], gradients: Implementation) -> tuple[Any, ...]:
    settings: Settings = ctx.settings
    needs = settings.wanted
    up = upstream[0]
    up_entropy = upstream[result_names(settings).index("entropy")] if needs.entropy else None
    found: Sequence[Tensor] = ()
    if up is not None or up_entropy is not None:
        tensors = ctx.saved_tensors  # once: a non-reentrant checkpoint unpacks a tensor no second time
        found = gradients(up, up_entropy, *tensors[:8], list(tensors[8:]), list(ctx.sizes), *ctx.dtypes, *settings)
    wanted = iter(found)
    per_argument = (needs.hidden, needs.weight, needs.bias, needs.lora_hidden, needs.lora_weight)
    by_argument = (next(wanted, None) if need else None for need in per_argument)
    return (*by_argument, None, None, *(None,) * len(settings))


def _gradients(
    up: Tensor | None,
    up_entropy: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor | None,
    rows: Tensor | None,
    entropy: Tensor | None,
    stored: list[Tensor],
    sizes: list[int],
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    *values: Any,
) -> list[Tensor]:
    """d hidden (R, H), weight (V, H), bias (V,), LoRA (R, r) and (V, r), those that are wanted."""
    settings = Settings(*values)
    needs, q = settings.wanted, stored[0]
    shape = shape_of(settings, q.device, len(q), sizes, (hidden_dtype, weight_dtype), rows is not None)
    plan = plan_of(settings, shape)
    names = [*_outputs(settings, plan.path, plan.cols, len(q), *sizes[1:])][len(result_names(settings)) :]
    saved = forward.Saved(**dict(zip(names, stored, strict=True)), entropy=entropy)
    with inside(q.device):
        up = torch.zeros_like(q) if up is None else up.to(q.dtype)
        if up_entropy is not None:
            up_entropy = up_entropy.to(q.dtype)
            if labels is not None and settings.ignored:
                up_entropy = up_entropy.where(labels >= 0, 0.0)
        kinds = (
            (needs.hidden, saved.direction, saved.entropy_direction, hidden_dtype),
            (needs.lora_hidden, saved.lora_direction, saved.lora_entropy_direction, lora_dtype),
        )
        d_hidden, d_lora = (
            forward.scatter_rows(
                _scaled(direction, entropy_direction, saved.q, up, up_entropy, dtype, plan),
                rows,
                sizes[0],
                settings.unique_rows,
            )
            if need and direction is not None
            else None
            for need, direction, entropy_direction, dtype in kinds
        )
        d_weight = d_bias = d_lora_weight = None
        if needs.head:
            assert hidden is not None
            assert weight is not None
            assert labels is not None
            head = HeadOperands(weight, bias, settings.compute, settings.acc, lora_weight, settings.lora_compute)
            tokens = TokenOperands(hidden, labels, rows, settings.ignored, lora_hidden)
            d_weight, d_bias, d_lora_weight = head_gradient.backward_head(
                settings.tiles(), tokens, head, settings.how, plan, needs, saved, up, up_entropy
            )
    return [x for x in (d_hidden, d_weight, d_bias, d_lora, d_lora_weight) if x is not None]


def _fake_gradients(
    up: Tensor | None,
    up_entropy: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor | None,
    rows: Tensor | None,
    entropy: Tensor | None,
    stored: list[Tensor],
    sizes: list[int],
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    *values: Any,
) -> list[Tensor]:
    needs, q = Settings(*values).wanted, stored[0]
    found = [q.new_empty(sizes[:2], dtype=hidden_dtype)] if needs.hidden else []
    found += [torch.empty_like(x) for x, need in ((weight, needs.weight), (bias, needs.bias)) if need and x is not None]
    if needs.lora_hidden:
        found.append(q.new_empty((sizes[0], sizes[3]), dtype=lora_dtype))
    if needs.lora_weight and lora_weight is not None:
        found.append(torch.empty_like(lora_weight))
    return found


def _scaled(
    direction: Tensor,
    entropy_direction: Tensor | None,
    q: Tensor,
    up: Tensor,
    up_entropy: Tensor | None,
    dtype: torch.dtype,
    plan: Plan,
) -> Tensor:
    """(N, k) in `dtype`: direction * q * upstream, a block of rows at a time (no fp32 copy of it all)."""
    out = torch.empty_like(direction, dtype=dtype)
    for block in blocks(len(out), plan.rows):
        part = direction[block] * (q[block] * up[block])[:, None]
        if up_entropy is not None and entropy_direction is not None:
            part.addcmul_(entropy_direction[block].to(part.dtype), (q[block] * up_entropy[block])[:, None])
        out[block] = part
    return out


def _rank(lora_weight: Tensor | None) -> int:
    return 0 if lora_weight is None else lora_weight.shape[1]


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, Tensor labels, Tensor? rows"
)
_SAVED = (
    "Tensor? up, Tensor? up_entropy, Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? lora_hidden, "
    "Tensor? lora_weight, Tensor? labels, Tensor? rows, Tensor? entropy, Tensor[] stored, SymInt[] sizes, "
    "ScalarType hidden_dtype, ScalarType weight_dtype, ScalarType lora_dtype"
)
gradients_op = gradient_op("linear_logprob", f"({_SAVED}, {SETTINGS}) -> Tensor[]", _gradients, _fake_gradients)
run = differentiable_op(
    "linear_logprob",
    f"({_ARGUMENTS}, {SETTINGS}) -> Tensor[]",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    (_gradients, gradients_op),
)
