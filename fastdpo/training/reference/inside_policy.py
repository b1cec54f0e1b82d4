"""References that live in the policy's own model: one base model in memory."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from fastdpo.models.adapters import (
    Switch,
    adapter_off,
    adapter_on,
    evaluating,
    find_peft,
    plain_weights,
    trained_adapter,
)
from fastdpo.training.reference.base import Reference, ReferenceState


class InsidePolicy(Reference):
    """The policy's model, switched to the reference for the time of a pass.

    `runs` names the adapters that the pass runs under.
    """

    switch: Switch

    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), evaluating(policy), self._switched(policy):
            return policy(**inputs)["logprob"]

    def _switched(self, policy: nn.Module) -> AbstractContextManager[None]:
        return self.switch(find_peft(policy))

    def runs(self, policy: nn.Module) -> list[str]:
        raise NotImplementedError

    def weights(self, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from plain_weights(policy, self.runs(policy))

    def settings(self, policy: nn.Module) -> dict[str, Any]:
        configs = {"model": cast(Any, policy).config}
        return configs | {name: cast(PeftModel, policy).peft_config[name] for name in self.runs(policy)}


class AdapterOff(InsidePolicy):
    """The policy's own base model."""

    description = "the base model of the policy, its adapter switched off"
    origin: Mapping[str, Any] = {"kind": "base"}

    def __init__(self) -> None:
        self.switch = adapter_off

    def runs(self, policy: nn.Module) -> list[str]:
        return []


class OtherAdapter(InsidePolicy):
    """The same base model under a second adapter."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.switch = adapter_on(name)
        self.description = f"the adapter {name!r} of the same model"
        self.origin = {"kind": "adapter", "name": name}

    def runs(self, policy: nn.Module) -> list[str]:
        return [self.name]


class StartingPolicy(InsidePolicy):
    """The policy as it is, for log-probs that are computed before it is trained."""

    description = "the starting policy"
    origin: Mapping[str, Any] = {"kind": "start"}

    def _switched(self, policy: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def runs(self, policy: nn.Module) -> list[str]:
        return list(policy.active_adapters) if isinstance(policy, PeftModel) else []


class StartWeights(InsidePolicy):
    """The same model with copies of the trained weights as they were at the start.

    PEFT does not know of the copies: they are neither saved with an adapter nor given to the optimizer, and no adapter
    is switched. A checkpoint has them, so that a resumed run keeps the first start.
    """

    kind = "the start of an adapter"
    origin: Mapping[str, Any] = {"kind": "start"}

    def __init__(self, policy: PeftModel) -> None:
        self.start = {
            name: parameter.detach().clone() for name, parameter in policy.named_parameters() if parameter.requires_grad
        }
        self.description = f"the adapter {trained_adapter(policy)!r} as it was at the start, kept as a frozen copy"

    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), evaluating(policy):
            return functional_call(find_peft(policy), self.start, kwargs=inputs, strict=False)["logprob"]

    def state_dict(self) -> ReferenceState:
        return ReferenceState(self.start, self.kind)

    def load_state_dict(self, state: ReferenceState) -> None:
        super().load_state_dict(state)
        self.start = {name: state[name].to(tensor.device) for name, tensor in self.start.items()}
