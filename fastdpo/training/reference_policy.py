"""Where the reference log-probs come from: a frozen copy of the policy, or the policy, its adapter off."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.training.config import DPOConfig
from fastdpo.training.logprob_forward import LogprobForward
from fastdpo.training.models import load_policy

logger = logging.getLogger(__name__)


class Reference(Protocol):
    """Gives reference log-probs. `description` is one line that says what the reference is."""

    description: str

    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
        """The (M,) log-probs of `inputs["logprob_targets"]` under the reference, without gradients."""
        ...


class NoReference:
    """For losses that read none: no pass, no second model."""

    def __init__(self, losses: str) -> None:
        self.description = f"none, since the loss ({losses}) reads none"

    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> None:
        return None


class FrozenModel:
    """A second model, in eval mode and without gradients.

    It is not given to accelerate's `prepare`, which would count it among the models that evaluation finds ready.
    `autocast` makes the context that the policy's forward runs in.
    """

    def __init__(
        self,
        model: nn.Module,
        description: str,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.description = description
        self.forward = LogprobForward(model)
        self.autocast = autocast

    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), self.autocast(), self.forward.installed():
            return self.model(**inputs)["logprob"]


class AdapterOff:
    """The policy's own base model: one model in memory."""

    description = "the base model of the policy, its adapter switched off"

    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        peft_model = policy if isinstance(policy, PeftModel) else _find_peft(policy)
        training = policy.training
        # eval: no dropout, no NEFTune noise, no activation checkpointing
        policy.eval()
        try:
            with torch.no_grad(), adapter_off(peft_model):
                return policy(**inputs)["logprob"]
        finally:
            policy.train(training)


def _find_peft(model: nn.Module) -> PeftModel:
    return next(module for module in model.modules() if isinstance(module, PeftModel))


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Switch all adapters off; afterwards the active adapters and every requires_grad are what they were.

    PEFT's `disable_adapter` makes the active adapter trainable again on exit, even one loaded frozen.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = model.active_adapters
    try:
        with model.disable_adapter():
            yield
    finally:
        if model.active_adapters != active:
            cast(Any, model.base_model).set_adapter(active)
        for parameter, requires_grad in trainable:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def make_reference(
    policy: PreTrainedModel | PeftModel,
    ref_model: str | PreTrainedModel | PeftModel | None,
    args: DPOConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Reference:
    """The reference of a policy that is on its device and not trained yet.

    `ref_model` if given (a path is loaded in the policy's dtype); else the base model of a policy with an
    adapter; else a frozen copy of the policy. None where no loss reads it.
    """
    options = args.loss_options()
    if not options.needs_reference:
        if ref_model is not None:
            logger.warning("ref_model is not used: the loss reads no reference.")
        return NoReference("reference_free" if args.reference_free else ", ".join(options.names))
    if ref_model is None and isinstance(policy, PeftModel):
        warn_if_adapter_is_trained(policy)
        return AdapterOff()
    if ref_model is None:
        return FrozenModel(frozen_copy(policy), "a frozen copy of the starting policy", autocast)
    name = ref_model if isinstance(ref_model, str) else getattr(ref_model, "name_or_path", "") or "an instance"
    if isinstance(ref_model, str):
        ref_model = load_policy(ref_model, args, default_dtype=policy.dtype)
    cast(nn.Module, ref_model).to(args.device)
    reference = FrozenModel(ref_model, f"the model given as ref_model ({name})", autocast)
    reference.forward.check()
    return reference


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy as it is now, same dtype and device.

    Raises:
        ValueError: the policy is split over devices, where a copy would share the original's hooks.
    """
    devices = set((getattr(policy, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            "full fine-tuning of a model that device_map has split over devices needs a reference of its own; "
            "pass ref_model, or train an adapter (peft_config)."
        )
    return copy.deepcopy(policy)


def warn_if_adapter_is_trained(model: PeftModel) -> None:
    """Say so when the reference (adapter off) is not the policy that training starts from."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name and bool(parameter.detach().any()):
            logger.warning(
                f"the adapter {model.active_adapters} is not fresh, so the reference (adapter off) differs from "
                "the starting policy; to make that the reference, merge the adapter (merge_and_unload) and pass "
                "peft_config."
            )
            return
