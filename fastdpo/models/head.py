"""What a causal LM's head multiplies by, as the log-prob op takes it: weight, bias and a LoRA's factors."""

from dataclasses import dataclass
from typing import cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadParts:
    """A linear head, and the layer of its LoRA where one is active."""

    linear: nn.Linear
    lora: LoraLinear | None = None

    def lora_pair(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """(u, B): u (..., r) = scaling * A dropout(hidden), as PEFT's layer computes it, and B (V, r)."""
        if self.lora is None:
            return None
        (name,) = _adapters(self.lora)
        a, b = self.lora.lora_A[name], self.lora.lora_B[name]
        hidden = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(cast(Tensor, a.weight).dtype)
        return a(self.lora.lora_dropout[name](hidden)) * self.lora.scaling[name], cast(Tensor, b.weight)


def head_parts(head: nn.Module) -> HeadParts | str:
    """The parts of a head, or why it is not of that form (for a sentence that goes "the head is ...").

    A plain linear layer, a trained copy of one (PEFT's `modules_to_save`), and a plain LoRA over one are; several
    adapters at once, DoRA and other variants, a LoRA with a bias of its own, and quantized heads are not.
    """
    if isinstance(head, ModulesToSaveWrapper):
        return _saved_module(head)
    if head._forward_hooks or head._forward_pre_hooks:
        return "a layer with forward hooks, which only a call of it runs"
    if type(head) is nn.Linear:
        return HeadParts(head)
    if type(head) is not LoraLinear:
        return f"a {type(head).__module__}.{type(head).__name__}"
    base = head.get_base_layer()
    if type(base) is not nn.Linear:
        return f"an adapter over a {type(base).__module__}.{type(base).__name__}"
    names = _adapters(head)
    if head.disable_adapters or head.merged or not names:
        # PEFT takes a merged adapter out again before it runs without it
        return HeadParts(base) if not (head.disable_adapters and head.merged) else "a merged adapter, switched off"
    if len(names) > 1:
        return f"under {len(names)} adapters at once"
    if names[0] in head.lora_variant or head.lora_bias[names[0]]:
        return "under a variant of LoRA"
    return HeadParts(base, head)


def _adapters(layer: LoraLinear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _saved_module(wrapper: ModulesToSaveWrapper) -> HeadParts | str:
    names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    copies = [] if wrapper.disable_adapters else [wrapper.modules_to_save[name] for name in names]
    return head_parts(copies[0] if copies else wrapper.original_module)
