"""What an architecture does to the product of hidden states and head before the softmax."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# names of a configuration, by what the number does to `hidden @ weight.T`
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere and MPT, Muse, Falcon-H1
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def logit_transform(config: "PreTrainedConfig") -> tuple[float, float | None]:
    """(logit_scale, softcap): what the architecture does to `hidden @ weight.T` before the softmax.

    HyperCLOVA X multiplies by the `logits_scaling` that others divide by. A softcap comes after.
    """
    scale = 1.0
    for name in (*MULTIPLIERS, *DIVISORS):
        value = getattr(config, name, None)
        if isinstance(value, int | float):  # MPT's may be a formula's name
            scale = 1.0 / value if name in DIVISORS and config.model_type != "hyperclovax" else float(value)
            break
    caps = (getattr(config, name, None) for name in SOFTCAPS)
    softcap = next((float(cap) for cap in caps if cap is not None), None)
    return scale, softcap


def transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The logits (..., V) that the softmax sees, in fp32 or wider, of the head's output (..., V)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
