"""Checks of the op's arguments: one sentence with what came, what is needed and the fix."""

import math

import torch
from torch import Tensor

from fastdpo.ops.custom_op import reads_are_free
from fastdpo.ops.switches import checks_wait
from fastdpo.ops.tensor_kinds import DTYPES, check_tensors


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    shift: bool,
) -> torch.dtype:
    """The dtype in which the operands enter the products; raises for anything that cannot be meant."""
    what = "linear_logprob"
    check_tensors(what, hidden=hidden, weight=weight, labels=labels, bias=bias, rows=rows)
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{what}: weight must be (V, {hidden.shape[-1] if hidden.dim() else 'H'}) to match hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}{_other_way_round(hidden, weight, labels)}."
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{what}: weight has no rows, got {tuple(weight.shape)}; a vocabulary has at least one token.")
    if weight.shape[1] == 0:
        raise ValueError(f"{what}: hidden {tuple(hidden.shape)} has no features; its last dimension must not be 0.")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(
                f"{what}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
                f"{'; dequantize the head first' if name == 'weight' else ''}."
            )
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias), ("rows", rows)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{what}: {name} is on {tensor.device} and hidden on {hidden.device}; move one of them.")
    for name, tensor in (("labels", labels), ("rows", rows)):
        if tensor is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{what}: {name} must be int64, got {tensor.dtype}; call .long() on it.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{what}: bias must be ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}.")
    if rows is None and labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{what}: labels must be {tuple(hidden.shape[:-1])} to match hidden {tuple(hidden.shape)}, "
            f"got {tuple(labels.shape)}"
            f"{_other_way_round(hidden, weight, labels) or '; pass `rows` where they do not line up'}."
        )
    if rows is not None and (labels.dim() != 1 or rows.shape != labels.shape):
        raise ValueError(
            f"{what}: with rows, labels and rows must both be (M,), got {tuple(labels.shape)} and {tuple(rows.shape)}."
        )
    if rows is not None and shift:
        raise ValueError(
            f"{what}: shift=True and rows exclude each other; rows already say which state predicts what: leave shift "
            "out."
        )
    if shift and labels.dim() < 1:
        raise ValueError(f"{what}: shift=True needs labels with a token dimension, got a scalar.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{what}: temperature must be > 0 and finite, got {temperature}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{what}: softcap must be > 0 and finite, or None, got {softcap}.")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"{what}: logit_scale must be finite, got {logit_scale}.")
    _check_ranges(what, hidden, weight, labels, rows, ignore_index)
    if _autocasts(hidden.device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{what}: hidden is {hidden.dtype} and weight {weight.dtype}; cast one"
            f"{'' if torch.float64 in (hidden.dtype, weight.dtype) else ', or call under torch.autocast'}."
        )
    return hidden.dtype


def check_lora(hidden: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor], compute: torch.dtype) -> torch.dtype:
    """The dtype in which the LoRA's factors u (..., r) and B (V, r) enter their product."""
    what = "linear_logprob: lora"
    if len(lora) != 2:
        raise ValueError(f"{what} must be the pair (s * A h, B), got {len(lora)} values.")
    u, b = lora
    check_tensors(what, **{"s * A h": u, "B": b})
    if b.dim() != 2 or u.dim() < 1 or u.shape[:-1] != hidden.shape[:-1] or b.shape != (len(weight), u.shape[-1]):
        shapes = f"({', '.join(str(size) for size in (*hidden.shape[:-1], 'r'))}) and ({len(weight)}, r)"
        raise ValueError(f"{what} must be of shapes {shapes}, got {tuple(u.shape)} and {tuple(b.shape)}.")
    if b.shape[1] == 0:
        raise ValueError(f"{what} has rank 0; leave it out.")
    for name, tensor in (("s * A h", u), ("B", b)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{what}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}.")
        if tensor.device != hidden.device:
            raise ValueError(f"{what}: {name} is on {tensor.device} and hidden on {hidden.device}; move one of them.")
    if _autocasts(hidden.device) and compute != torch.float64:
        return compute
    if u.dtype != b.dtype:
        raise TypeError(f"{what}: s * A h is {u.dtype} and B {b.dtype}; cast one, or call under torch.autocast.")
    if (u.dtype == torch.float64) != (compute == torch.float64):
        raise TypeError(f"{what} is {u.dtype} beside {compute}; float64 goes with float64 only.")
    return u.dtype


def _other_way_round(hidden: Tensor, weight: Tensor, labels: Tensor) -> str:
    """The fix, where the shapes say that weight and hidden are swapped or that weight is transposed."""
    if hidden.dim() == 2 and weight.dim() and weight.shape[-1] == hidden.shape[1] and labels.shape == weight.shape[:-1]:
        return "; hidden and weight look swapped: pass the hidden states as hidden and the head's weight as weight"
    if weight.dim() == 2 and hidden.dim() and weight.shape[0] == hidden.shape[-1] != weight.shape[1]:
        return "; pass weight.t()"
    return ""


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _check_ranges(
    what: str, hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, ignore_index: int
) -> None:
    # reading values of a CUDA tensor waits for the device: only on request
    on_request = checks_wait() and not torch.compiler.is_compiling()
    if not (on_request or reads_are_free(labels)) or labels.numel() == 0:
        return
    bad = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
    if bool(bad.any()):
        value = int(labels[bad][0])
        raise ValueError(
            f"{what}: label {value} is outside the vocabulary [0, {weight.shape[0]}) and is not "
            f"ignore_index={ignore_index}."
        )
    total = hidden.shape[:-1].numel()
    if rows is not None and not (int(rows.min()) >= 0 and int(rows.max()) < total):
        raise ValueError(
            f"{what}: rows must be in [0, {total}), got values from {int(rows.min())} to {int(rows.max())}."
        )
