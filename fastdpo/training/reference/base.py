"""What every reference policy is: something that gives log-probs of a batch, never trained."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from fastdpo.models.adapters import plain_weights
from fastdpo.models.forward import LogprobForward


class ReferenceState(dict[str, Tensor]):
    """A reference's tensors by name, and in words its `kind`: those of another kind may have the same names."""

    def __init__(self, tensors: Mapping[str, Tensor], kind: str) -> None:
        super().__init__(tensors)
        self.kind = kind


class Reference(ABC):
    """Gives reference log-probs.

    Attributes:
        description: one line that says what the reference is.
        origin: the same for a program: "kind" (none, base, adapter, start, model, columns) and, where it has them,
            "path" of the model, "name" of the adapter, "synced" (TR-DPO), "precomputed" (the folder).
    """

    description: str
    origin: Mapping[str, Any]

    @abstractmethod
    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
        """The (M,) log-probs of `inputs["logprob_targets"]` under the reference, without gradients."""

    def weights(self, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that its log-probs depend on: what tells it from another reference."""
        raise NotImplementedError

    def settings(self, policy: nn.Module) -> dict[str, Any]:
        """The configuration beside these tensors: of the model, and of an adapter."""
        raise NotImplementedError

    def policy_moves(self) -> None:  # noqa: B027 most need not know
        """Training begins: before other weights are loaded into the policy, and before its first step."""

    def callbacks(self, policy: nn.Module) -> list[TrainerCallback]:
        """What it does while the policy is trained."""
        return []

    def state_dict(self) -> ReferenceState:
        """What a checkpoint must keep for a resumed run to have the same reference; empty where nothing."""
        return ReferenceState({}, "none")

    def load_state_dict(self, state: ReferenceState) -> None:
        """Go on with the `state_dict` of a checkpoint.

        Raises:
            ValueError: it belongs to a reference of another kind, or to other weights.
        """
        mine = self.state_dict()
        if state.kind != mine.kind:
            raise ValueError(
                f"its reference is {state.kind} and this run's is {mine.kind}; go on with the arguments that the run "
                "began with"
            )
        if state.keys() != mine.keys():
            odd = min(state.keys() ^ mine.keys())
            raise ValueError(f"the checkpoint's reference and this run's have other weights ({odd})")


class NoReference(Reference):
    """For losses that read none: no pass, no second model."""

    origin: Mapping[str, Any] = {"kind": "none"}

    def __init__(self, losses: str) -> None:
        self.description = f"none, since the loss ({losses}) reads none"

    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> None:
        return None


class FrozenModel(Reference):
    """A second model, in eval mode and without gradients.

    It is not given to accelerate's `prepare`, which would count it among the models that evaluation finds ready.
    `autocast` makes the context that the policy's forward runs in.
    """

    origin: Mapping[str, Any] = {"kind": "start"}

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

    def weights(self, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        running = self.model.active_adapters if isinstance(self.model, PeftModel) else []
        yield from plain_weights(self.model, running)

    def settings(self, policy: nn.Module) -> dict[str, Any]:
        configs = {"model": cast(Any, self.model).config}
        if isinstance(self.model, PeftModel):
            configs |= {name: self.model.peft_config[name] for name in self.model.active_adapters}
        return configs


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A copy of the policy as it is now, same dtype and device.

    Raises:
        ValueError: the policy is split over devices, where a copy would share the original's hooks.
    """
    devices = set((getattr(policy, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            "full fine-tuning of a model that device_map has split over devices needs a reference of its own; "
            "pass ref_model, precompute_ref_log_probs=True, or train an adapter (peft_config)."
        )
    return copy.deepcopy(policy)
