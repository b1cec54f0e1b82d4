"""The op itself: what is saved, and a backward that is a row scale where the head is frozen.

`run` is what a checked call ends in (prepare.py). It takes the fields of `Operands` and of `Settings`, and gives the
results in the order of `result_names`, then what is saved for backward.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.ops.custom_op import Implementation, differentiable_op, gradient_op, on_device_without_autocast
from fastdpo.ops.linear_logprob import forward, head_gradient
from fastdpo.ops.linear_logprob.operands import HeadOperands, Operands, TokenOperands
from fastdpo.ops.linear_logprob.plan import route
from fastdpo.ops.linear_logprob.settings import Settings, plan_of, result_names, shape_of
from fastdpo.ops.numerics import blocks
from fastdpo.ops.records import from_fields, takes_fields

logger = logging.getLogger("fastdpo")


class GradientArguments(NamedTuple):
    """What gradients are made of. Where the head is frozen, of the call's tensors only `rows` is there."""

    up: Tensor | None  # (N,) d loss / d logp
    up_entropy: Tensor | None  # (N,) d loss / d entropy
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_u: Tensor | None
    lora_b: Tensor | None
    labels: Tensor | None
    rows: Tensor | None
    entropy: Tensor | None  # (N,)
    stored: list[Tensor]  # what forward saved, in the order of `_outputs`
    sizes: list[int]  # R, H, V, r
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    lora_dtype: torch.dtype

    @property
    def operands(self) -> Operands:
        """The call's tensors, where the head is trained."""
        assert self.hidden is not None
        assert self.weight is not None
        assert self.labels is not None
        lora = self.lora_u, self.lora_b
        return Operands(self.hidden, self.weight, self.bias, *lora, self.labels, self.rows)


def _outputs(
    settings: Settings, path: str, cols: int, n: int, h: int, v: int, rank: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each of forward's outputs, by name and in order: results, then what is saved for backward."""
    needs, acc, compute = settings.needed, settings.acc, settings.compute
    names = result_names(settings)
    if needs.hidden or needs.lora_u or needs.head:
        names += ["q", *("direction", "entropy_direction")[: needs.directions]]
        names += ("lora_direction", "lora_entropy_direction")[: needs.lora_directions]
    if needs.head:
        names += ["m", "s", *(["zy"] if settings.softcap else [])]
    elif needs.hidden or needs.lora_u:
        names += ["anchor"]
    others = {"is_top1": ((n,), torch.bool), "anchor": ((0,), acc)}
    others |= dict.fromkeys(("direction", "entropy_direction"), ((n, h), compute))
    others |= dict.fromkeys(("lora_direction", "lora_entropy_direction"), ((n, rank), settings.lora_compute))
    row = (n,), acc
    outputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {name: others.get(name, row) for name in names}
    if path == "kept":
        count = -(-v // cols)
        outputs |= {"kept": ((count, n, cols), compute), "bases": ((count, n), acc)}
    return outputs


@takes_fields(Operands, Settings)
def _forward(operands: Operands, settings: Settings) -> list[Tensor]:
    n, device, sizes = len(operands.labels), operands.hidden.device, operands.sizes
    shape = shape_of(settings, device, n, sizes, operands.dtypes, operands.rows is not None)
    plan = plan_of(settings, shape)
    logger.debug("linear_logprob: %s backend, %s", settings.backend, plan)
    head, tokens = HeadOperands.of(operands, settings), TokenOperands.of(operands, settings)
    with on_device_without_autocast(device):
        results, saved = forward.forward(settings.tiles(), tokens, head, settings.spec, plan, settings.needed)
        if settings.ignored:
            saved.q = saved.q.where(operands.labels >= 0, 0.0)
    saved.anchor = saved.q.new_empty(0)
    by_name = {**vars(saved), **results}
    return [by_name[name] for name in _outputs(settings, plan.path, plan.cols, n, *sizes[1:])]


@takes_fields(Operands, Settings)
def _fake_forward(operands: Operands, settings: Settings) -> list[Tensor]:
    hidden, n, path, cols = operands.hidden, operands.labels.shape[0], "", 0
    if settings.needed.head:
        # of no other path do the shapes depend on the plan, and its comparisons of a symbolic N become guards
        shape = shape_of(settings, hidden.device, n, operands.sizes, operands.dtypes, operands.rows is not None)
        path, _, cols = route(shape, settings.needed, settings.workspace, settings.keep)
    outputs = _outputs(settings, path, cols, n, *operands.sizes[1:])
    return [hidden.new_empty(shape, dtype=dtype) for shape, dtype in outputs.values()]


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    operands: Operands
    settings: Settings
    operands, settings = from_fields(inputs, Operands, Settings)
    needs, results = settings.needed, result_names(settings)
    ctx.set_materialize_grads(False)
    entropy = output[results.index("entropy")] if needs.entropy else None
    frozen = not needs.head and (needs.hidden or needs.lora_u)
    anchor = output[-1] if frozen else None
    ctx.mark_non_differentiable(*(x for x in output[1:] if x is not entropy and x is not anchor))
    # rows are saved in any case: autograd then notices a change in place
    *others, rows = operands
    tensors = others if needs.head else [None] * len(others)
    ctx.save_for_backward(*tensors, rows, entropy if needs.head else None, *output[len(results) :])
    lora_dtype = operands.hidden.dtype if operands.lora_u is None else operands.lora_u.dtype
    ctx.settings, ctx.sizes, ctx.dtypes = settings, operands.sizes, (*operands.dtypes, lora_dtype)


def _backward(ctx: Any, upstream: Sequence[Tensor | None], compute: Implementation) -> tuple[Any, ...]:
    settings: Settings = ctx.settings
    needs, up = settings.needed, upstream[0]
    up_entropy = upstream[result_names(settings).index("entropy")] if needs.entropy else None
    gradients = {}
    if up is not None or up_entropy is not None:
        tensors = ctx.saved_tensors  # once: a non-reentrant checkpoint unpacks a tensor no second time
        # the fields of `GradientArguments`
        arguments = (up, up_entropy, *tensors[:8], list(tensors[8:]), list(ctx.sizes), *ctx.dtypes)
        gradients = dict(zip(needs.operands, compute(*arguments, *settings), strict=True))
    return (*(gradients.get(name) for name in Operands._fields), *(None,) * len(settings))


@takes_fields(GradientArguments, Settings)
def _gradients(arguments: GradientArguments, settings: Settings) -> list[Tensor]:
    """d hidden (R, H), weight (V, H), bias (V,), LoRA (R, r) and (V, r), those that are needed."""
    needs, stored, sizes, rows = settings.needed, arguments.stored, arguments.sizes, arguments.rows
    q, dtypes = stored[0], (arguments.hidden_dtype, arguments.weight_dtype)
    shape = shape_of(settings, q.device, len(q), sizes, dtypes, rows is not None)
    plan = plan_of(settings, shape)
    names = [*_outputs(settings, plan.path, plan.cols, len(q), *sizes[1:])][len(result_names(settings)) :]
    saved = forward.SavedForBackward(**dict(zip(names, stored, strict=True)), entropy=arguments.entropy)
    with on_device_without_autocast(q.device):
        up = torch.zeros_like(q) if arguments.up is None else arguments.up.to(q.dtype)
        up_entropy = arguments.up_entropy
        if up_entropy is not None:
            up_entropy = up_entropy.to(q.dtype)
            if arguments.labels is not None and settings.ignored:
                up_entropy = up_entropy.where(arguments.labels >= 0, 0.0)

        def scaled(direction: Tensor | None, entropy_direction: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if direction is None:
                return None
            by_token = _scaled(direction, entropy_direction, saved.q, up, up_entropy, dtype, plan.rows)
            return forward.scatter_rows(by_token, rows, sizes[0], settings.unique_rows)

        d_hidden = scaled(saved.direction, saved.entropy_direction, arguments.hidden_dtype)
        d_lora_u = scaled(saved.lora_direction, saved.lora_entropy_direction, arguments.lora_dtype)
        d_weight = d_bias = d_lora_b = None
        if needs.head:
            operands = arguments.operands
            head, tokens = HeadOperands.of(operands, settings), TokenOperands.of(operands, settings)
            d_weight, d_bias, d_lora_b = head_gradient.backward_head(
                settings.tiles(), tokens, head, settings.spec, plan, needs, saved, up, up_entropy
            )
    return [x for x in (d_hidden, d_weight, d_bias, d_lora_u, d_lora_b) if x is not None]


@takes_fields(GradientArguments, Settings)
def _fake_gradients(arguments: GradientArguments, settings: Settings) -> list[Tensor]:
    q, (source_rows, h, _, rank) = arguments.stored[0], arguments.sizes
    of_rows = {"hidden": (h, arguments.hidden_dtype), "lora_u": (rank, arguments.lora_dtype)}
    gradients = []
    for name in settings.needed.operands:
        if name in of_rows:
            columns, dtype = of_rows[name]
            gradients.append(q.new_empty((source_rows, columns), dtype=dtype))
        else:
            gradients.append(torch.empty_like(getattr(arguments, name)))
    return gradients


def _scaled(
    direction: Tensor,
    entropy_direction: Tensor | None,
    q: Tensor,
    up: Tensor,
    up_entropy: Tensor | None,
    dtype: torch.dtype,
    rows: int,
) -> Tensor:
    """(N, k) in `dtype`: direction * q * upstream, a block of rows at a time (no fp32 copy of it all)."""
    out = torch.empty_like(direction, dtype=dtype)
    for block in blocks(len(out), rows):
        part = direction[block] * (q[block] * up[block])[:, None]
        if up_entropy is not None and entropy_direction is not None:
            part.addcmul_(entropy_direction[block].to(part.dtype), (q[block] * up_entropy[block])[:, None])
        out[block] = part
    return out


gradients_op = gradient_op("linear_logprob", _gradients, _fake_gradients)
run = differentiable_op(
    "linear_logprob", _forward, _fake_forward, _setup_context, _backward, (_gradients, gradients_op)
)
