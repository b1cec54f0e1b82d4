"""TR-DPO (arXiv:2404.09656): the reference follows the policy, ref <- alpha * policy + (1 - alpha) * ref.

Alpha is `ref_model_mixup_alpha`, the rule is applied after every `ref_model_sync_steps` optimizer steps, as TRL's
`SyncRefModelCallback` does for whole models. With a LoRA it is applied to what the adapter adds to the weights: mixing
the factors A and B one by one would add cross terms that the paper does not have.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.adapters import trained_adapter
from fastdpo.ops.switches import widest_float
from fastdpo.training.reference.base import FrozenModel, ReferenceState
from fastdpo.training.reference.inside_policy import StartWeights

logger = logging.getLogger(__name__)


class SyncedModel(FrozenModel):
    """A frozen copy whose weights are mixed with the policy's."""

    origin: Mapping[str, Any] = {"kind": "start", "synced": True}

    def check(self, policy: nn.Module) -> None:
        """Raise ValueError unless the weights can be mixed one by one."""
        ours = [parameter.shape for parameter in self.model.parameters()]
        if isinstance(policy, PeftModel) or ours != [parameter.shape for parameter in policy.parameters()]:
            raise ValueError(
                "sync_ref_model mixes the policy's weights into the reference's, and ref_model has others; leave "
                "ref_model out, so that the reference starts as the policy."
            )

    def callbacks(self, policy: nn.Module) -> list[TrainerCallback]:
        return [SyncCallback(self, policy)]

    @torch.no_grad()
    def mix(self, policy: nn.Module, alpha: float) -> str:
        """Apply the rule; what there is to say of it."""
        for mine, other in zip(self.model.parameters(), policy.parameters(), strict=True):
            mine.mul_(1.0 - alpha).add_(other.to(mine), alpha=alpha)
        return ""

    def state_dict(self) -> ReferenceState:
        return ReferenceState(dict(self.model.named_parameters()), "a model mixed with the policy (sync_ref_model)")

    @torch.no_grad()
    def load_state_dict(self, state: ReferenceState) -> None:
        super().load_state_dict(state)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])


class SyncedAdapter(StartWeights):
    """Base model plus a delta that is mixed with the adapter's, kept as factors of a rank that grows.

    alpha * s B A + (1 - alpha) * s B' A' = s [alpha B, (1 - alpha) B'] [A; A'], so the reference runs in the policy's
    own layers with these factors in place. Past `rank_limit` they are recompressed to it by a truncated SVD; what that
    leaves out is measured and logged. At the limit min(in, out) nothing is left out.
    """

    kind = "a delta mixed with the adapter's (sync_ref_model)"
    origin: Mapping[str, Any] = {"kind": "start", "synced": True}

    def __init__(self, policy: PeftModel) -> None:
        super().__init__(policy)
        self.layers = lora_factors(policy)
        parameters = dict(policy.named_parameters())
        # a factor that is frozen is part of the delta as well
        self.start = {name: parameters[name].detach().clone() for pair in self.layers for name in pair}

    def callbacks(self, policy: nn.Module) -> list[TrainerCallback]:
        return [SyncCallback(self, policy)]

    @torch.no_grad()
    def mix(self, policy: nn.Module, alpha: float) -> str:
        """Apply the rule; the factors' largest rank and what recompression left out."""
        parameters = dict(policy.named_parameters())
        rank, left_out = 0, 0.0
        for a_name, b_name in self.layers:
            a, b = wide(parameters[a_name]), wide(parameters[b_name])
            old_a, old_b = wide(self.start[a_name]), wide(self.start[b_name])
            limit = rank_limit(a, b)
            if alpha == 1 or not bool(old_b.any()):
                a, b = a.clone(), alpha * b
            else:
                a, b = torch.cat([a, old_a]), torch.cat([alpha * b, (1 - alpha) * old_b], dim=1)
            if len(a) > limit:
                a, b, error = recompress(a, b, limit)
                left_out = max(left_out, error)
            self.start[a_name], self.start[b_name] = a, b
            rank = max(rank, len(a))
        return f", rank up to {rank}, recompression left out at most {left_out:.1e} of a layer's delta"

    def load_state_dict(self, state: ReferenceState) -> None:
        super().load_state_dict(state)
        for a_name, b_name in self.layers:
            if len(self.start[a_name]) != self.start[b_name].shape[1]:
                raise ValueError(f"the checkpoint's reference has factors that do not fit together ({a_name})")


def wide(factor: Tensor) -> Tensor:
    """In at least fp32: a mean of means would lose what 16 bits do not hold."""
    return factor.detach().to(torch.promote_types(factor.dtype, torch.float32))


def rank_limit(a: Tensor, b: Tensor) -> int:
    """The rank up to which factors are kept as they are: 8 times the adapter's own, at least 64.

    a: (r, in), b: (out, r). A rank past min(in, out) could hold nothing more.
    """
    return min(a.shape[1], b.shape[0], max(8 * a.shape[0], 64))


def recompress(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of `rank` for b @ a, and the share of its Frobenius norm that they leave out.

    a: (k, in), b: (out, k) -> (rank, in), (out, rank). In float64 where the device has it.
    """
    dtype = widest_float(a.device.type)
    q_b, r_b = torch.linalg.qr(b.to(dtype))
    q_a, r_a = torch.linalg.qr(a.to(dtype).T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    total = s.norm()
    left_out = float(s[rank:].norm() / total) if total > 0 else 0.0
    root = s[:rank].sqrt()
    new_b, new_a = (q_b @ u[:, :rank]) * root, (root[:, None] * vh[:rank]) @ q_a.T
    return new_a.to(a.dtype), new_b.to(b.dtype), left_out


def lora_factors(policy: PeftModel) -> list[tuple[str, str]]:
    """The parameter names of A and B of every layer of the trained LoRA.

    Raises:
        ValueError: something else is trained too, or the adapter is no plain LoRA on linear layers, so that what it
            adds to the weights is not `B @ A` times a number.
    """
    adapter = trained_adapter(policy)
    pairs, odd = [], []
    for path, layer in policy.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        plain = isinstance(a, nn.Linear) and isinstance(b, nn.Linear) and b.bias is None
        if plain and not isinstance(layer, ParamWrapper) and adapter not in layer.lora_variant:
            pairs.append((f"{path}.lora_A.{adapter}.weight", f"{path}.lora_B.{adapter}.weight"))
        else:
            odd.append(path)
    known = {name for pair in pairs for name in pair}
    other = [name for name, parameter in policy.named_parameters() if parameter.requires_grad and name not in known]
    if odd or other or not pairs:
        what = f"{other[0]} is trained too" if other else f"{policy.peft_config[adapter].peft_type} is another kind"
        what = f"that of {odd[0]} is another kind" if odd else what
        raise ValueError(
            f"sync_ref_model with an adapter mixes what a plain LoRA adds to linear layers, and {what}; leave "
            "sync_ref_model out, or train without DoRA, modules_to_save, biases and embeddings."
        )
    return pairs


class SyncCallback(TrainerCallback):
    """Mixes after every `ref_model_sync_steps` optimizer steps, before the step's checkpoint is written."""

    def __init__(self, reference: "SyncedModel | SyncedAdapter", policy: nn.Module) -> None:
        self.reference, self.policy = reference, policy

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        config = cast(DPOConfig, args)
        if state.global_step % config.ref_model_sync_steps == 0:
            said = self.reference.mix(self.policy, config.ref_model_mixup_alpha)
            if args.should_log:
                logger.info(f"reference: mixed with the policy after step {state.global_step}{said}.")
