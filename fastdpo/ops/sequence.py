"""From per-token log-probs to per-sequence sums and means."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.custom_op import differentiable_op, on_device_without_autocast, reads_are_free
from fastdpo.ops.linear_logprob.api import linear_logprob
from fastdpo.ops.switches import choose_backend, widest_float
from fastdpo.ops.tensor_kinds import check_tensors, in_forward_mode, transformed


def sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    average: bool = False,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """log p(sequence) of each row: the sum (or mean) of its scored tokens' log-probs, in nats.

    Args:
        hidden: (S, T, H); weight: (V, H); labels: (S, T) int64, `ignore_index` where not scored.
        average: divide by the number of scored tokens; an empty sequence gives 0 either way.
        options: those of `linear_logprob` (bias, temperature, logit_scale, softcap, shift).

    Returns:
        (S,), float32 (float64 for float64 operands).
    """
    check_tensors("sequence_logprob", hidden=hidden, weight=weight, labels=labels)
    if labels.dim() < 1:
        raise ValueError("sequence_logprob: labels must be (..., T), got a scalar.")
    if "rows" in options:
        raise ValueError("sequence_logprob: rows has no sequences; use linear_logprob and segment_sum with offsets.")
    tokens = linear_logprob(hidden, weight, labels, ignore_index=ignore_index, **options)
    scored = labels != ignore_index
    if options.get("shift"):
        scored = scored[..., 1:]
    length = tokens.shape[-1]
    offsets = torch.arange(0, tokens.numel() + 1, max(length, 1), device=tokens.device)
    sums = segment_sum(tokens.reshape(-1), offsets).view(labels.shape[:-1]) if length else tokens.sum(-1)
    return sums / scored.sum(-1).clamp(min=1) if average else sums


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """out[i] = sum of values[offsets[i] : offsets[i + 1]], in an order that depends on nothing else.

    Args:
        values: (M,) floating point; offsets: (S + 1,) int64, ascending from 0 to M (checked on a CPU).

    Returns:
        (S,), 0 for an empty segment; differentiable.
    """
    check_tensors("segment_sum", values=values, offsets=offsets)
    if values.dim() != 1 or offsets.dim() != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(
            f"segment_sum: values must be (M,) and offsets (S + 1,) int64, got {tuple(values.shape)} and "
            f"{tuple(offsets.shape)} {offsets.dtype}."
        )
    if not values.is_floating_point():
        raise TypeError(f"segment_sum: values must be floating point, got {values.dtype}.")
    if reads_are_free(offsets):
        ends = (int(offsets[0]), int(offsets[-1]))
        if ends != (0, len(values)) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"segment_sum: offsets must ascend from 0 to {len(values)}, the number of values, got {ends[0]} to "
                f"{ends[1]}{'' if ends != (0, len(values)) else ', not ascending'}."
            )
    if not torch.compiler.is_compiling() and (transformed() or in_forward_mode()):
        return _plain_sum(values, offsets)
    return _run(values, offsets)[0]


def _forward(values: Tensor, offsets: Tensor) -> list[Tensor]:
    if choose_backend(values.device, values.dtype) == "triton":
        from fastdpo.kernels.segment_sum import segment_sum_fwd

        out = values.new_empty(len(offsets) - 1, dtype=torch.float32)
        with on_device_without_autocast(values.device):
            segment_sum_fwd(values.float().contiguous(), offsets, out)
        return [out.to(values.dtype)]
    wide = widest_float(values.device.type)
    if wide != torch.float64:
        return [_pairwise_sum(values.to(wide), offsets).to(values.dtype)]
    # it adds one value at a time: in fp32 a long completion would lose what the op has kept
    return [torch.segment_reduce(values.to(wide), "sum", offsets=offsets, initial=0).to(values.dtype)]


def _pairwise_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """The sums where there is no float64: a segment's values are added as a tree, whose shape its length alone decides.

    After the step of width w each place holds the sum of the (at most) 2 w last values of its segment up to itself:
    the error grows with the logarithm of a segment's length.
    """
    total, count = len(values), len(offsets) - 1
    if not total or not count:
        return values.new_zeros(count)
    places = torch.arange(total, device=values.device)
    since = places - torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=total)
    sums, width = values, 1
    while width < total:
        # a NaN or inf of the segment before is not to be multiplied by 0
        before = torch.where(since[width:] >= width, sums[:-width], 0.0)
        sums = torch.cat((sums[:width], sums[width:] + before))
        width *= 2
    return torch.where(offsets.diff() > 0, sums[offsets[1:].clamp(min=1) - 1], 0.0)


def _plain_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """The sums as plain torch, for torch.func and forward mode: every operation has their rules."""
    owner = torch.repeat_interleave(offsets.diff(), output_size=values.shape[0])
    wide = values.to(widest_float(values.device.type))
    return wide.new_zeros(offsets.shape[0] - 1).index_add(0, owner, wide).to(values.dtype)


def _fake_forward(values: Tensor, offsets: Tensor) -> list[Tensor]:
    return [values.new_empty(offsets.shape[0] - 1)]


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    values, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.length = values.shape[0]


def _backward(ctx: Any, upstream: Sequence[Tensor | None], _: Any) -> tuple[Any, ...]:
    (offsets,), (up,) = ctx.saved_tensors, upstream
    assert up is not None
    # the size is known: nothing waits for the device
    return torch.repeat_interleave(up, offsets.diff(), output_size=ctx.length), None


_run = differentiable_op("segment_sum", _forward, _fake_forward, _setup_context, _backward)
