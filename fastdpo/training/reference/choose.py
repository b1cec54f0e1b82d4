"""Which reference a run has: the one place where that is decided."""

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.adapters import adapter_tensors, is_fresh, trained_adapter
from fastdpo.models.load import load_policy
from fastdpo.training.reference.base import FrozenModel, NoReference, Reference, frozen_copy
from fastdpo.training.reference.inside_policy import AdapterOff, OtherAdapter, StartingPolicy, StartWeights
from fastdpo.training.reference.synced import SyncedAdapter, SyncedModel

logger = logging.getLogger(__name__)

Policy = PreTrainedModel | PeftModel
Autocast = Callable[[], AbstractContextManager[Any]]


def make_reference(
    policy: Policy,
    ref_model: str | Policy | None,
    args: DPOConfig,
    autocast: Autocast,
    created_adapter: bool = False,
    sharded: bool = False,
) -> Reference:
    """The reference of a policy that is on its device and not trained yet.

    In this order: none where no loss reads it; `ref_model` (a path is loaded in the policy's dtype); the adapter
    `ref_adapter_name`; the base model of a policy whose adapter adds nothing yet; the start of an adapter that goes on
    being trained (TRL 1.16's rule); a frozen copy of the policy. With `sync_ref_model` the reference moves. With
    `precompute_ref_log_probs` it is needed before training only, so that no copy is made of the starting policy.

    created_adapter: the adapter comes from a peft_config. sharded: FSDP or ZeRO-3 will split the weights.

    Raises:
        ValueError: one sentence: arguments that exclude each other, or a policy that the kind does not work with.
    """
    options = args.loss_options()
    if not options.needs_reference:
        for name in ("sync_ref_model", "precompute_ref_log_probs", "ref_adapter_name"):
            if getattr(args, name):
                logger.warning(f"{name} is not used: the loss reads no reference.")
        if ref_model is not None:
            logger.warning("ref_model is not used: the loss reads no reference.")
        return NoReference("reference_free" if args.reference_free else ", ".join(options.names))
    if sharded and args.sync_ref_model:
        raise ValueError(
            "sync_ref_model reads whole weights of policy and reference, which FSDP and ZeRO-3 split over processes; "
            "use DDP or ZeRO-2, or leave sync_ref_model out."
        )
    if ref_model is not None:
        return _given_model(policy, ref_model, args, autocast)
    if args.ref_adapter_name is not None:
        return _other_adapter(cast(PeftModel, policy), args)
    idle = [name for name in getattr(policy, "peft_config", {}) if name not in cast(PeftModel, policy).active_adapters]
    if idle:
        logger.warning(
            f"the model has other adapters, which are not used: {', '.join(idle)}; ref_adapter_name makes one of them "
            "the reference."
        )
    rhythm = f", mixed with the policy every {args.ref_model_sync_steps} steps (alpha {args.ref_model_mixup_alpha})"
    if not isinstance(policy, PeftModel):
        if args.precompute_ref_log_probs:
            return StartingPolicy()
        if args.sync_ref_model:
            return SyncedModel(frozen_copy(policy), f"a copy of the starting policy{rhythm}", autocast)
        return FrozenModel(frozen_copy(policy), "a frozen copy of the starting policy", autocast)
    if args.sync_ref_model:
        reference = SyncedAdapter(policy)
        reference.description = f"the policy's base model plus a delta that starts as the adapter's{rhythm}"
        return reference
    if is_fresh(policy, created_adapter):
        return AdapterOff()
    if args.precompute_ref_log_probs:
        return StartingPolicy()
    if sharded:
        raise ValueError(
            "the adapter is trained further, and its start cannot be kept beside weights that FSDP or ZeRO-3 splits; "
            "load it twice and give model_adapter_name and ref_adapter_name, or pass ref_model."
        )
    return StartWeights(policy)


def _given_model(policy: Policy, ref_model: str | Policy, args: DPOConfig, autocast: Autocast) -> FrozenModel:
    if args.ref_adapter_name is not None:
        raise ValueError(f"ref_model and ref_adapter_name ({args.ref_adapter_name!r}) both name a reference; give one.")
    name = ref_model if isinstance(ref_model, str) else getattr(ref_model, "name_or_path", "") or "an instance"
    if isinstance(ref_model, str):
        own = args
        if args.ref_model_init_kwargs is not None:
            own = copy.copy(args)
            own.model_init_kwargs = args.ref_model_init_kwargs
        ref_model = load_policy(ref_model, own, default_dtype=policy.dtype)
    trained = {id(parameter) for parameter in policy.parameters()}
    shared = next((key for key, parameter in ref_model.named_parameters() if id(parameter) in trained), None)
    if shared is not None:
        raise ValueError(
            f"ref_model and the model that is trained are one in memory ({shared}), so that freezing one freezes the "
            "other; load ref_model a second time, or leave it out."
        )
    cast(nn.Module, ref_model).to(args.device)
    description = f"the model given as ref_model ({name})"
    if args.sync_ref_model:
        description += f", mixed with the policy every {args.ref_model_sync_steps} steps"
        reference = SyncedModel(ref_model, f"{description} (alpha {args.ref_model_mixup_alpha})", autocast)
        reference.check(policy)
    else:
        reference = FrozenModel(ref_model, description, autocast)
    path = {} if name == "an instance" else {"path": name}
    reference.origin = {"kind": "model", **path, **({"synced": True} if args.sync_ref_model else {})}
    return reference


def _other_adapter(policy: PeftModel, args: DPOConfig) -> OtherAdapter:
    assert args.ref_adapter_name is not None
    if args.sync_ref_model:
        raise ValueError(
            "sync_ref_model mixes the policy into a delta of its own, which starts as the trained adapter; leave "
            f"ref_adapter_name ({args.ref_adapter_name!r}) out."
        )
    own = {id(tensor) for tensor in adapter_tensors(policy, trained_adapter(policy))}
    base = [name for name, tensor in policy.named_parameters() if tensor.requires_grad and id(tensor) not in own]
    if base and not args.precompute_ref_log_probs:
        raise ValueError(
            f"{base[0]} is trained beside the adapter, so the reference {args.ref_adapter_name!r} in the same model "
            "would move; freeze it, or pass ref_model."
        )
    return OtherAdapter(args.ref_adapter_name)
