"""Whether a trained weight can change at all: a 16-bit number moves only by steps of its own size."""

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.config.dpo_config import DPOConfig

logger = logging.getLogger(__name__)

# half of the distance between numbers that begin at 1/2: what is less changes nothing
_HALF_STEP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# whose step is about the learning rate, whatever the gradient
_STEP_IS_RATE = ("adam", "lion", "lamb", "apollo", "galore")
_SAMPLE = 4096


def stuck_share(weights: Sequence[Tensor], rate: float) -> float:
    """The share of weights that a step of `rate` leaves as they are; weights: 16-bit tensors, of each some are read."""
    stuck = total = 0
    for weight in weights:
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLE)].float()
        exponents = torch.frexp(some)[1]
        stuck += int((torch.ldexp(torch.full_like(some, _HALF_STEP[weight.dtype]), exponents) > rate).sum())
        total += some.numel()
    return stuck / total if total else 0.0


def warn_of_rounding(model: nn.Module, args: DPOConfig) -> None:
    """One line where most trained weights are 16-bit and too coarse for the learning rate to change them.

    Not where somebody keeps wider copies of them (DeepSpeed) or rounds by chance.
    """
    trained = (p for p in model.parameters() if p.requires_grad and p.dtype in _HALF_STEP)
    weights = [p for p in trained if p.numel() and not p.is_meta]
    optim, options = str(getattr(args.optim, "value", args.optim)), str(args.optim_args or "")
    if not weights or args.deepspeed or "stochastic_round" in options or not any(k in optim for k in _STEP_IS_RATE):
        return
    share = stuck_share(weights, args.learning_rate)
    if share < 0.5 or not args.should_log:
        return
    dtype = str(weights[0].dtype).removeprefix("torch.")
    logger.warning(
        f"{share:.0%} of the trained weights are {dtype} numbers that a step of learning_rate {args.learning_rate:g} "
        "is too small to change, so they stay as they are: load the model in float32 (bf16=True computes in bfloat16 "
        "all the same), train an adapter (peft_config), or raise the learning rate."
    )


def check_accelerators(args: DPOConfig) -> None:
    """Refuse, before weights are loaded, what needs a GPU or a package that is not here. Raises ValueError."""
    device: Any = args.device
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if args.use_liger_kernel and device.type == "cpu" and not interpreted:
        raise ValueError(
            "use_liger_kernel needs a GPU, since its kernels are Triton's, and this run is on the CPU; leave it out."
        )
    if args.fp16 and device.type == "cpu":
        raise ValueError("fp16=True needs a GPU, and this run is on the CPU; leave it out, or take bf16=True.")
    optim = str(getattr(args.optim, "value", args.optim))
    bitsandbytes = any(word in optim for word in ("bnb", "8bit", "paged")) and "torch_" not in optim
    if bitsandbytes and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"optim {optim!r} needs bitsandbytes, which is not installed: install it, or take optim='adamw_torch'."
        )
