"""Loading policies and tokenizers, and refusing what cannot be trained, in one sentence each."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.rows.sides import id_columns, is_tokenized
from fastdpo.models.adapters import check_adapter_name, choose_adapters, resize_to_adapter
from fastdpo.models.forward import unwrap_peft
from fastdpo.models.load_errors import check_causal_lm, check_loaded, check_text_causal_lm, why_no_weights
from fastdpo.models.precision import check_accelerators, warn_of_rounding
from fastdpo.models.size import check_adapter_rank, check_model_size, check_parts, checked_config
from fastdpo.wording import first_line, first_sentence

logger = logging.getLogger(__name__)


def load_policy(
    model: str | PreTrainedModel | PeftModel,
    args: DPOConfig,
    peft_config: PeftConfig | None = None,
    quantization_config: Any = None,
    default_dtype: torch.dtype | None = None,
) -> PreTrainedModel | PeftModel:
    """The policy, with a fresh adapter where `peft_config` is given.

    A path of an adapter's folder gives the adapter, to be trained further, over its base model.

    A path is loaded in fp32 for full fine-tuning, whatever the checkpoint's dtype: under bf16 autocast the
    weights stay fp32, since AdamW at a learning rate of 1e-6 changes no bf16 weight. With PEFT the base model
    is frozen and keeps the checkpoint's dtype. `default_dtype` replaces that rule, and an explicit `dtype` in
    `args.model_init_kwargs` wins over both.

    Raises:
        ValueError: no such model, not a text-only causal LM, or arguments that exclude each other.
    """
    if args.model_adapter_name is not None:
        check_adapter_name("model_adapter_name", args.model_adapter_name)
    if isinstance(model, str) and is_adapter_folder(model):
        model = _from_adapter_folder(model, args, quantization_config, default_dtype or "auto")
    elif isinstance(model, str):
        dtype = default_dtype or (torch.float32 if peft_config is None else "auto")
        model = _from_pretrained(model, args, quantization_config, dtype)
    elif args.model_init_kwargs or quantization_config is not None:
        raise ValueError(
            f"model_init_kwargs and quantization_config only apply to a model given as a path, got a loaded "
            f"{type(model).__name__}; load it with them, or pass its path."
        )
    check_text_causal_lm(model.config, type(unwrap_peft(model)).__name__)
    _keep_gradients(model)
    if peft_config is None:
        if isinstance(model, PeftModel):
            _check_adapter_type(model.active_peft_config)
        return model
    if isinstance(model, PeftModel):
        raise ValueError(
            "got peft_config and a model that has an adapter already; merge that adapter (merge_and_unload), or "
            "leave peft_config out to go on training it."
        )
    _check_adapter_type(peft_config)
    _check_modules_to_save(peft_config, model)
    # TRL draws the adapter's weights right after set_seed; nothing may take random numbers in between
    set_seed(args.seed)
    try:
        return cast(PeftModel, get_peft_model(model, peft_config, adapter_name=args.model_adapter_name or "default"))
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        linear = {name.split(".")[-1]: None for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        targets = cast(Any, peft_config).target_modules
        raise ValueError(
            f"target_modules is {targets if isinstance(targets, str) else ', '.join(sorted(targets))}, and "
            f"{type(model).__name__} has no such module; its linear layers are {', '.join(linear)}."
        ) from error


def policy_to_train(
    model: str | PreTrainedModel | PeftModel,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None = None,
    quantization_config: Any = None,
) -> PreTrainedModel | PeftModel:
    """`load_policy`, with the adapter that is trained chosen, without dropout, and fit for the tokenizer."""
    policy = load_policy(model, args, peft_config, quantization_config)
    choose_adapters(policy, args)
    check_vocabulary(tokenizer, policy)
    warn_of_rounding(policy, args)
    if args.disable_dropout:
        disable_dropout(policy)
    checkpointing = cast("dict[str, Any]", args.gradient_checkpointing_kwargs or {})
    if isinstance(policy, PeftModel) and checkpointing.get("use_reentrant"):
        # re-entrant checkpointing drops the gradient where no input of a block asks for one
        policy.enable_input_require_grads()
    return policy


def _keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU kernel that has no gradient and rounds to bf16.

    It does so, for good, in the first pass in eval mode: the reference's, or an evaluation's.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 no attribute of nn.Module


def is_adapter_folder(path: str) -> bool:
    """Whether a folder holds an adapter and no model."""
    return Path(path, "adapter_config.json").is_file() and not Path(path, "config.json").is_file()


def _from_adapter_folder(path: str, args: DPOConfig, quantization_config: Any, default_dtype: Any) -> PeftModel:
    """The adapter over the base model that its configuration names, to be trained further."""
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot load the adapter {path!r}: {first_line(error)}") from error
    if not config.base_model_name_or_path:
        raise ValueError(
            f"the adapter {path!r} does not say which model it belongs to; load both, and pass the PeftModel."
        )
    _check_adapter_type(config)
    check_adapter_rank(config, path)
    base = _from_pretrained(config.base_model_name_or_path, args, quantization_config, default_dtype)
    name = args.model_adapter_name or "default"
    try:
        resize_to_adapter(base, path)
        return PeftModel.from_pretrained(base, path, adapter_name=name, is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load the adapter {path!r}: {first_line(error)}") from error


def _from_pretrained(path: str, args: DPOConfig, quantization_config: Any, default_dtype: Any) -> PreTrainedModel:
    assert not isinstance(args.model_init_kwargs, str)
    options = dict(args.model_init_kwargs or {})
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if "gguf_file" not in options:
        # reading a pickle can run code: only where it is asked for by name
        options.setdefault("use_safetensors", True)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    dtype = options.setdefault("dtype", default_dtype)
    if isinstance(dtype, str) and dtype != "auto":
        options["dtype"] = getattr(torch, dtype, None)
        if not isinstance(options["dtype"], torch.dtype):
            raise ValueError(f"model_init_kwargs: dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")
    hub = {k: options[k] for k in ("trust_remote_code", "revision") if k in options}
    try:
        config = checked_config(path, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load model {path!r}: {first_sentence(error)}") from error
    check_causal_lm(config)
    try:
        check_model_size(config, path)
        # its own complaint about sizes names none of them
        info = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, loaded = cast(Any, AutoModelForCausalLM.from_pretrained(path, **{**options, **info}))
    except (OSError, ValueError, ImportError, RecursionError, SafetensorError) as error:
        raise ValueError(f"cannot load model {path!r}: {why_no_weights(path) or first_sentence(error)}") from error
    if options.get("ignore_mismatched_sizes"):  # asked for by name
        loaded["mismatched_keys"] = ()
    check_loaded(loaded, f"cannot load model {path!r}")
    return model


def _check_adapter_type(config: PeftConfig) -> None:
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"adapter type {kind} puts virtual tokens before the prompt, which fastdpo does not support; use LoRA."
        )


def _check_modules_to_save(config: PeftConfig, model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules()]
    for ending in getattr(config, "modules_to_save", None) or []:
        if not any(name.endswith(ending) for name in names):
            raise ValueError(
                f"modules_to_save names {ending!r}, and {type(model).__name__} has no module whose name ends so; the "
                f"last part of one is wanted, for instance {names[-1].split('.')[-1]}."
            )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in `model` to 0: of `nn.Dropout`, and of modules that keep a number."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def load_tokenizer(tokenizer: Any, model: Any, args: DPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token: `args.pad_token`, its own, or the EOS token (masks come from lengths)."""
    if tokenizer is None:
        path = model if isinstance(model, str) else model.config.name_or_path
        if is_adapter_folder(path) and not Path(path, "tokenizer_config.json").is_file():
            path = PeftConfig.from_pretrained(path).base_model_name_or_path or path
        options = cast("dict[str, Any]", args.model_init_kwargs or {})
        try:
            check_parts(path, revision=options.get("revision"))  # it reads the config too
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=options.get("revision"), trust_remote_code=args.trust_remote_code
            )
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"no tokenizer in {path!r} ({first_line(error)}); pass processing_class.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a tokenizer, got {type(tokenizer).__name__}.")
    if args.pad_token is not None:
        if args.pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token is {args.pad_token!r}, which the tokenizer does not have.")
        tokenizer.pad_token = args.pad_token
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel, what: str = "model"
) -> None:
    """`what` names the model in the message."""
    embedded = model.config.get_text_config().vocab_size
    if len(tokenizer) > embedded:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the {what} embeds {embedded}; use the model's own "
            "tokenizer, or resize_token_embeddings."
        )


def check_token_ids(dataset: Any, embedded: int, name: str) -> None:
    """Refuse a row, tokenized elsewhere, with an id that a model of `embedded` tokens does not have.

    Rows that are not tokenized yet, and streams, are left alone.
    """
    if not isinstance(dataset, Dataset) or not is_tokenized(dataset.column_names):
        return
    for column in id_columns(dataset.column_names):
        row = 0
        for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
            for chunk in cast("pa.Table", table).column(column).chunks:
                values = chunk.flatten().to_numpy(zero_copy_only=False)
                if len(values) and (values.max() >= embedded or values.min() < 0):
                    ids = chunk.to_pylist()
                    bad = next(i for i, row_ids in enumerate(ids) if any(not 0 <= x < embedded for x in row_ids))
                    value = next(x for x in ids[bad] if not 0 <= x < embedded)
                    raise ValueError(
                        f"{name}[{row + bad}].{column} has the id {value}, and the model embeds ids 0 to "
                        f"{embedded - 1}; tokenize with the model's own tokenizer."
                    )
                row += len(chunk)


def router_loss_weight(model: PreTrainedModel | PeftModel, args: DPOConfig) -> float:
    """What the load-balancing loss of a mixture of experts is multiplied by; 0 where there is none (TRL 1.16's rule).

    Raises:
        ValueError: `router_aux_loss_coef` for a model whose forward returns no such loss.
    """
    config, weight = model.config.get_text_config(), args.router_aux_loss_coef
    if not hasattr(config, "output_router_logits"):
        if weight:
            raise ValueError(
                f"router_aux_loss_coef is {weight}, and {type(unwrap_peft(model)).__name__} returns no load-balancing "
                "loss of a mixture of experts; leave it out."
            )
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if weight is None else weight)


def check_arguments(model: Any, ref_model: Any, args: DPOConfig) -> None:
    """Refuse what cannot work, and set what follows from the batch layout, before anything is loaded."""
    if ref_model is model and not isinstance(model, str):
        raise ValueError("model and ref_model are the same object; leave ref_model out to get a frozen copy.")
    check_accelerators(args)
    if args.use_liger_kernel:
        options = dict(cast("dict[str, bool] | None", args.liger_kernel_config) or {})
        if options.get("fused_linear_cross_entropy"):
            raise ValueError(
                "liger_kernel_config: fused_linear_cross_entropy replaces the model's forward, which computes "
                "the log-probs here; leave it out."
            )
        args.liger_kernel_config = {**options, "fused_linear_cross_entropy": False}
    # dispatching would cut a batch's tensors at row counts, and ours have several
    cast(Any, args.accelerator_config).dispatch_batches = False


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Where FSDP or DeepSpeed leave a model on the CPU until training, it is on `device` for a while."""
    home = next(model.parameters()).device
    moves = home.type == "cpu" and device.type != "cpu" and not hasattr(model, "hf_device_map")
    if moves:
        model.to(device)
    try:
        yield
    finally:
        if moves:
            model.to(home)
