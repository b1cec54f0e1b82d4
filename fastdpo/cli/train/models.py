"""What `fastdpo train` puts together beyond a model by its name: adapters, references, quantized and frozen weights."""

import copy
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from fastdpo.cli.errors import UsageError
from fastdpo.cli.terminal import say
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.load import load_policy
from fastdpo.models.saved import load_adapter, read_adapter_config

REFERENCE = "reference"  # the name of a second adapter in the trained model


class Models(NamedTuple):
    """DPOTrainer's arguments. A name is left to the trainer, which loads it after the data is found good."""

    policy: str | PreTrainedModel | PeftModel
    reference: str | PreTrainedModel | PeftModel | None
    peft_config: PeftConfig | None
    quantization_config: BitsAndBytesConfig | None


def load_models(option: dict[str, Any], args: DPOConfig, peft_config: PeftConfig | None) -> Models:
    """Policy and reference as the arguments say. `args` are changed where the trainer would load the policy again.

    Raises:
        ValueError: one sentence: an adapter that cannot be read or does not fit, or arguments that exclude each other.
    """
    name, adapters = option["model_name_or_path"], option["adapter_name_or_path"] or []
    reference, ref_adapters = option["ref_model"], option["ref_adapters"] or []
    quantized = quantization_config(option, args)
    has_adapter = bool(adapters or peft_config)
    beside = bool(ref_adapters) and reference is None and has_adapter
    if beside and (len(ref_adapters) > 1 or option["create_new_adapter"]):
        raise UsageError("--ref_adapters: this reference is not the trained base model: give that as --ref_model")
    if ref_adapters and not beside:
        own = copy.copy(args)
        if args.ref_model_init_kwargs is not None:
            own.model_init_kwargs = args.ref_model_init_kwargs
        dtype = cast(Any, "auto") if has_adapter else None
        reference = _with_adapters(reference or name, ref_adapters, own, dtype, keep="default")
        # what the run calls it: an adapter's folder names its base model
        cast(Any, reference).name_or_path = ", ".join(ref_adapters)
    if not adapters and not beside:
        return Models(name, reference, peft_config, quantized)

    policy: Any
    trained = args.model_adapter_name or "default"
    if adapters:
        keep = None if option["create_new_adapter"] else trained
        policy = _with_adapters(name, adapters, args, cast(Any, "auto"), keep, quantized, trainable=True)
        if keep is None:
            # no folder holds what the fresh adapter belongs to, and its base model alone would be wrong
            policy.name_or_path = ""
            merged = f"{' and '.join(adapters)}: merged into {name} for this run"
            say(f"{merged}; the model that the new adapter belongs to is what `fastdpo merge` writes")
    else:
        policy, peft_config = load_policy(name, args, peft_config, quantized), None
    if beside:
        args.ref_adapter_name = args.ref_adapter_name or REFERENCE
        read_adapter_config(ref_adapters[0])
        load_adapter(policy, ref_adapters[0], name, name=args.ref_adapter_name)
    # the policy is loaded, so these can only be a reference's
    if args.ref_model_init_kwargs is None:
        args.ref_model_init_kwargs = args.model_init_kwargs
    args.model_init_kwargs = None
    return Models(policy, reference, peft_config, None)


def _with_adapters(
    name: str,
    adapters: list[str],
    args: DPOConfig,
    dtype: torch.dtype | None,
    keep: str | None,
    quantized: BitsAndBytesConfig | None = None,
    trainable: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model with its adapters merged, the last one kept as an adapter named `keep` unless that is None."""
    for adapter in adapters:
        read_adapter_config(adapter)
    model: Any = load_policy(name, args, quantization_config=quantized, default_dtype=dtype)
    for adapter in adapters if keep is None else adapters[:-1]:
        model = load_adapter(model, adapter, name).merge_and_unload()
    return model if keep is None else load_adapter(model, adapters[-1], name, name=keep, trainable=trainable)


def quantization_config(option: dict[str, Any], args: DPOConfig) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration, under TRL's names; None where nothing is quantized."""
    if option["load_in_8bit"]:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not option["load_in_4bit"]:
        return None
    storage = option["bnb_4bit_quant_storage"]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        bnb_4bit_quant_type=option["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=option["use_bnb_nested_quant"],
        **({} if storage is None else {"bnb_4bit_quant_storage": storage}),
    )


def freeze_layers(model: nn.Module, layers: int, modules: list[str] | None, extra: list[str] | None) -> None:
    """Train only some layers, as LLaMA-Factory's finetuning_type freeze.

    layers: the last N, negative: the first N. modules: parts of a layer by the name of its attribute; None: all.
    extra: modules outside of the layers by the last part of their name.

    Raises:
        ValueError: one sentence: a name that the model does not have, or no layer at all.
    """
    blocks = _layers(model)
    if layers == 0:
        raise UsageError("freeze_trainable_layers is 0: give a number of last layers, or of first ones as -number")
    parts = {name for block in blocks for name, _ in block.named_children()}
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = {
        name.split(".")[-1]: module
        for name, module in model.named_modules()
        if name and any(id(parameter) not in inside for parameter in module.parameters(recurse=False))
    }
    for field, names, known in (
        ("freeze_trainable_modules", modules, parts),
        ("freeze_extra_modules", extra, outside),
    ):
        for name in names or []:
            if name not in known:
                raise UsageError(f"{field} names {name}, and the model has {', '.join(sorted(known))}")
    model.requires_grad_(False)
    for block in blocks[-layers:] if layers > 0 else blocks[:-layers]:
        for part in [block] if modules is None else [getattr(block, name) for name in modules]:
            part.requires_grad_(True)
    for name in extra or []:
        outside[name].requires_grad_(True)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    which = f"{'last' if layers > 0 else 'first'} {min(abs(layers), len(blocks))} of {len(blocks)} layers"
    say(f"freeze: {count} parameters are trained, in the {which}")


def _layers(model: nn.Module) -> Any:
    """The list of the model's layers."""
    config = cast(Any, model).config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UsageError(f"freeze_trainable_layers: no list of {count} layers is found in {type(model).__name__}")
