"""From per-token log-probs to per-sequence sums and means."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.backend import choose_backend
from fastdpo.ops.custom_op import differentiable_op, inside, reads_are_free
from fastdpo.ops.linear_logprob import linear_logprob


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
    return _run(values, offsets)[0]


def _forward(values: Tensor, offsets: Tensor) -> list[Tensor]:
    if choose_backend(values.device, values.dtype) == "triton":
        from fastdpo.kernels.segments import segment_sum_fwd

        out = values.new_empty(len(offsets) - 1, dtype=torch.float32)
        with inside(values.device):
            segment_sum_fwd(values.float().contiguous(), offsets, out)
        return [out.to(values.dtype)]
    # it adds one value at a time: in fp32 a long completion would lose what the op has kept
    return [torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0).to(values.dtype)]


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


_run = differentiable_op(
    "segment_sum", "(Tensor values, Tensor offsets) -> Tensor[]", _forward, _fake_forward, _setup_context, _backward
)
