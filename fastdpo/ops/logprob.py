"""Log-probabilities of chosen tokens from logits, for code that already has them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.custom_op import (
    Implementation,
    constant_backend,
    differentiable_op,
    gradient_op,
    on_device_without_autocast,
    reads_are_free,
)
from fastdpo.ops.numerics import NEG, blocks, softplus
from fastdpo.ops.switches import workspace_bytes
from fastdpo.ops.tensor_kinds import DTYPES, check_tensors, number


def logprob(logits: Tensor, labels: Tensor, *, temperature: float = 1.0, ignore_index: int = -100) -> Tensor:
    """`log_softmax(logits / temperature)[label]`, in nats, without a second (N, V) tensor in the forward.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        labels: (...), int64, aligned with logits; `ignore_index` gives 0 and no gradient.

    Returns:
        float32 (float64 for float64 logits), the shape of labels. Differentiable once.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or (on a CPU) a label outside [0, V).
    """
    check_tensors("logprob", logits=logits, labels=labels)
    temperature = number("logprob", "temperature", temperature)
    if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"logprob: labels must be {tuple(logits.shape[:-1])} to match logits {tuple(logits.shape)}, "
            f"got {tuple(labels.shape)}."
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"logprob: logits {tuple(logits.shape)} have no vocabulary; the last dimension must not be 0.")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logprob: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}.")
    if labels.dtype != torch.int64:
        raise TypeError(f"logprob: labels must be int64, got {labels.dtype}; call .long() on it.")
    if labels.device != logits.device:
        raise ValueError(f"logprob: labels are on {labels.device} and logits on {logits.device}; move one of them.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"logprob: temperature must be > 0 and finite, got {temperature}.")
    v = logits.shape[-1]
    scored = labels != ignore_index
    if reads_are_free(labels):
        bad = ((labels < 0) | (labels >= v)) & scored
        if bool(bad.any()):
            raise ValueError(
                f"logprob: label {int(labels[bad][0])} is outside the vocabulary [0, {v}) and is not "
                f"ignore_index={ignore_index}."
            )
    backend = constant_backend(logits.device, logits.dtype)
    if backend == "reference":
        return reference.logprob(logits, labels, temperature=temperature, ignore_index=ignore_index)
    flat = logits.reshape(-1, v)
    picked = labels.where(scored, -1).reshape(-1)
    logps, *_ = _run(flat, picked, 1.0 / temperature, backend == "triton")
    return logps.view(labels.shape)


def _forward(logits: Tensor, labels: Tensor, inv_t: float, triton: bool) -> list[Tensor]:
    """logp, and what backward needs: base, q, q / s; (N,) each, of logits (N, V) and labels (N,), < 0 where ignored."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    m, s, zy = (torch.empty(len(logits), dtype=acc, device=logits.device) for _ in range(3))
    with on_device_without_autocast(logits.device):
        if triton:
            from fastdpo.kernels.logprob import logprob_fwd

            logprob_fwd(logits, labels, inv_t, m, s, zy)
        else:
            _fold_logits(logits, labels, inv_t, m, s, zy)
        d = (m - zy) + s.log()
        scored = labels >= 0
        q = torch.sigmoid(d).where(scored, 0.0)
        # p_v = exp(z_v - base) * q / s: through lse it would lose what a large offset or an unlikely target takes
        base = torch.where(m > NEG / 2, m, 0.0)
        return [(-softplus(d)).where(scored, 0.0), base, q, q / torch.where(s == 0, 1.0, s)]


def _fake_forward(logits: Tensor, labels: Tensor, inv_t: float, triton: bool) -> list[Tensor]:
    acc = torch.promote_types(logits.dtype, torch.float32)
    return [logits.new_empty(logits.shape[:1], dtype=acc) for _ in range(4)]


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    logits, labels, *options = inputs
    _, base, q, rest = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(base, q, rest)
    ctx.save_for_backward(logits, labels, base, q, rest)
    ctx.options = options


def _backward(ctx: Any, upstream: Sequence[Tensor | None], gradients: Implementation) -> tuple[Any, ...]:
    if upstream[0] is None:
        return None, None, None, None
    (d_logits,) = gradients(upstream[0], *ctx.saved_tensors, *ctx.options)
    return d_logits, None, None, None


def _gradients(
    up: Tensor, logits: Tensor, labels: Tensor, base: Tensor, q: Tensor, rest: Tensor, inv_t: float, triton: bool
) -> list[Tensor]:
    """[d loss / d logits], (N, V)."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    with on_device_without_autocast(logits.device):
        up = (up.to(base.dtype) * inv_t).where(labels >= 0, 0.0)
        others, target = -up * rest, up * q
        dx = logits.new_empty(logits.shape)
        if triton:
            from fastdpo.kernels.logprob import logprob_bwd

            logprob_bwd(logits, dx, labels, base, others, target, inv_t)
            return [dx]
        at = labels.clamp(min=0)[:, None]
        for block in _row_blocks(logits, base.dtype):
            p = logits[block].to(base.dtype).mul(inv_t).scatter_(1, at[block], NEG)
            p.sub_(base[block, None]).exp_().mul_(others[block, None])
            dx[block] = p.scatter_(1, at[block], target[block, None]).where(labels[block, None] >= 0, 0.0)
        return [dx]


def _fake_gradients(up: Tensor, logits: Tensor, *_: Any) -> list[Tensor]:
    return [logits.new_empty(logits.shape)]


def _fold_logits(logits: Tensor, labels: Tensor, inv_t: float, m: Tensor, s: Tensor, zy: Tensor) -> None:
    """Maximum and sum over v != y, and z_y, (N,) each."""
    at = labels.clamp(min=0)[:, None]
    for block in _row_blocks(logits, m.dtype):
        z = logits[block].to(m.dtype, copy=True).mul_(inv_t)
        zy[block] = z.gather(1, at[block])[:, 0]
        z.scatter_(1, at[block], NEG)
        m[block] = z.amax(1)
        base = torch.where(m[block] > NEG / 2, m[block], 0.0)
        s[block] = z.sub_(base[:, None]).exp_().sum(1)


def _row_blocks(logits: Tensor, acc: torch.dtype) -> list[slice]:
    per_row = 2 * logits.shape[1] * acc.itemsize
    return list(blocks(len(logits), max(1, workspace_bytes() // max(1, per_row))))


_gradients_op = gradient_op(
    "logprob",
    _gradients,
    _fake_gradients,
)
_run = differentiable_op(
    "logprob",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    (_gradients, _gradients_op),
)
