"""The forward of a causal LM that LLaMA-Factory's DPO trainer calls for log-probs, where the model allows it."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdpo.models.backbone import backbone
from fastdpo.models.forward import LogprobForward
from fastdpo.models.head import head_parts

BLOCK = 128  # positions whose logits exist at a time, where only logits have the mean


class RowMeansForward(LogprobForward):
    """Adds "all_logits" (2B,) to each answer: each row's mean over all positions and the vocabulary, detached."""

    def _logprobs(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        states: list[Tensor] = []
        core = cast(nn.Module, backbone(model))
        hook = core.register_forward_hook(lambda _m, _a, output: states.append(output.last_hidden_state))
        try:
            scores = super()._logprobs(model, *args, **kwargs)
        finally:
            hook.remove()
        with torch.no_grad():
            return {**scores, "all_logits": self._mean_logits(model.get_output_embeddings(), states[0])}

    def _mean_logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        hidden = hidden.to(next(head.parameters()).device)
        if self.softcap is None:
            # without it the head is affine: the mean over positions is that of their mean
            return self.scale * _mean(head(_mean(hidden, 1).to(hidden.dtype)), 1)
        means = []
        for block in hidden.flatten(0, 1).split(BLOCK):
            logits = head(block)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            means.append(logits.mul_(self.scale / self.softcap).tanh_().mean(1) * self.softcap)
        return torch.cat(means).view(hidden.shape[:-1]).mean(1)


def _mean(x: Tensor, dim: int) -> Tensor:
    return x.mean(dim, dtype=torch.promote_types(x.dtype, torch.float32))


def forward_of(model: Any) -> RowMeansForward | str:
    """A forward for a causal LM, or why its log-probs cannot be computed from hidden states and its head."""
    if model.config.is_encoder_decoder or model.config.get_text_config() is not model.config:
        return "it is not a text-only causal language model"
    home = next(c for c in type(model).__mro__ if "forward" in vars(c))
    # accelerate's hooks, which move inputs between devices, may stand before it
    replaced = "forward" in vars(model) and not hasattr(model, "_hf_hook")
    if replaced or inspect.unwrap(home.forward).__module__ != home.__module__:
        return "something else has replaced its forward"
    head = model.get_output_embeddings()
    try:
        parts = "missing" if head is None else head_parts(head)
    except AttributeError as error:  # before 0.16 PEFT's layers have fewer attributes
        parts = f"under an adapter of an older PEFT ({error})"
    if isinstance(parts, str):
        return f"its head is {parts}"
    weight = parts.linear.weight
    if hasattr(weight, "ds_id") or (weight.is_meta and getattr(model, "hf_device_map", None)):
        return "its head's weight is elsewhere until the head is called (ZeRO-3 or offloading)"
    if backbone(model) is None:
        return "it has no backbone apart from its head"
    try:
        forward = RowMeansForward(model)
    except ValueError as error:
        return str(error).rstrip(".")
    return forward if forward.route == "head" else "they are not what the head's weight gives"
