"""What sort of thing an argument is, before its shape is looked at: a strided tensor with values, or something else.

A plain tensor passes at the cost of two comparisons. Anything else gets one sentence with the fix, but for fake and
meta tensors, which have shapes and no values: they pass, and results of the same sort come back.
"""

import sys
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)
_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def check_tensors(what: str, **arguments: Any) -> None:
    """Each argument is None or a tensor that the op can read.

    Raises:
        TypeError: a module, an array, a list, or a tensor that is sharded, sparse or nested.
    """
    for name, x in arguments.items():
        if not (type(x) in _PLAIN and x.layout is torch.strided) and x is not None:
            _check_special(what, name, x)


def _check_special(what: str, name: str, x: Any) -> None:
    if isinstance(x, nn.Module):
        fix = "pass its .weight (lm_head.weight)" if hasattr(x, "weight") else "pass a tensor"
        if getattr(x, "bias", None) is not None:
            fix = "pass lm_head.weight, and bias=lm_head.bias"
        raise TypeError(f"{what}: {name} must be a tensor, got the module {type(x).__name__}; {fix}.")
    if not isinstance(x, Tensor):
        kind = f"{type(x).__module__}.{type(x).__name__}".removeprefix("builtins.")
        fix = "torch.from_numpy" if kind.startswith("numpy.") else "torch.tensor"
        raise TypeError(f"{what}: {name} must be a tensor, got {kind}; make one with {fix}.")
    if _is_dtensor(x):
        raise TypeError(
            f"{what}: {name} is a DTensor, which is spread over a device mesh; pass {name}.full_tensor() (its gradient "
            "flows back to the shards)."
        )
    if x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        fix = f"torch.cat({name}.unbind())" if x.is_nested else f"{name}.to_dense()"
        raise TypeError(f"{what}: {name} is a {kind} tensor, and the op reads strided memory; pass {fix}.")


def number(what: str, name: str, value: Any) -> float:
    """A constant of the call as a float: a number, or a tensor of one on the CPU that is no parameter.

    Raises:
        TypeError: a tensor that requires a gradient, since it would get none, or on another device, since reading it
            would wait for the device; or no number.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{what}: {name} is a tensor that requires grad, and it would get no gradient; pass {name}.item(), or "
                f"{_LEARNED[name]}."
            )
        if value.numel() != 1 or value.device.type != "cpu":
            got = f"a tensor of shape {tuple(value.shape)} on {value.device}"
            raise TypeError(f"{what}: {name} must be a number, got {got}; pass a Python float.")
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{what}: {name} must be a number, got {value!r}; pass a Python float.")


_LEARNED = {
    "temperature": "to learn it divide hidden (or the logits) by it before the call",
    "logit_scale": "to learn it multiply hidden (and bias) by it before the call",
    "softcap": "to learn it take the eager definition in fastdpo.ops.reference",
}


def is_abstract(x: Tensor) -> bool:
    """It has a shape and no values: a meta tensor, or one of torch's FakeTensorMode."""
    return x.is_meta or (type(x) not in _PLAIN and _is_fake(x))


def transformed() -> bool:
    """A transform of torch.func is under way (grad, vjp, jvp, vmap, ...)."""
    return _functorch_is_active()


def in_forward_mode() -> bool:
    """Inside `torch.autograd.forward_ad.dual_level`: tensors may carry tangents."""
    return forward_ad._current_level >= 0


def _is_fake(x: Tensor) -> bool:
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(x, module.FakeTensor)


def _is_dtensor(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
