"""ms-swift's arguments of `swift rlhf` as arguments of `fastdpo train`: what a table of names cannot say.

Its `simpo` is TRL's CPO trainer, whose likelihood term (`cpo_alpha`, 1 where nothing is said) is our `rpo_alpha`.
"""

import os
from collections.abc import Callable
from math import ceil
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.translations.ms_swift_keys import (
    DEFAULTS,
    LEARNING_RATE,
    LORA_DEFAULTS,
    NO_EFFECT,
    REFUSED,
    RENAMED,
)
from fastdpo.cli.train.translations.tool import (
    Arguments,
    Tool,
    drop_idle_lora,
    held_out,
    nothing,
    only,
    typed,
    value_of,
)
from fastdpo.cli.train.values import Argument, as_yaml

LOSSES = {"dpo": None, "orpo": "orpo", "simpo": "simpo", "kto": "kto", "cpo": "cpo"}
ATTENTION = {"flash_attn": "flash_attention_2"}
OVERLONG = {
    "delete": {"on_overlong": "drop"},
    "left": {"on_overlong": "truncate", "truncation_mode": "keep_end"},
    "right": {"on_overlong": "truncate", "truncation_mode": "keep_start"},
}
SEVERAL = ("adapters", "dataset", "modules_to_save", "target_modules", "target_parameters", "val_dataset")


def _is_one(arguments: Arguments) -> bool:
    """`rlhf_type` or the kind of tuner, and the model under ms-swift's name or another mark beside it."""
    marks = {"rlhf_type", "tuner_type", "train_type"} & arguments.keys()
    others = {"model", "split_dataset_ratio", "torch_dtype", "lora_rank", "target_modules", "attn_impl", "adapters"}
    return bool(marks) and bool(others & arguments.keys() or len(marks) > 1)


def _rlhf_type(argument: Argument) -> dict[str, Any]:
    method = typed(argument, "str")
    if method not in LOSSES:
        raise UsageError(f"{argument.where} is {method}, and fastdpo trains {', '.join(LOSSES)}")
    return {"loss_type": LOSSES[method]} if LOSSES[method] else {}


def _tuner(argument: Argument) -> dict[str, Any]:
    if argument.value not in ("lora", "full"):
        raise UsageError(f"{argument.where} is {argument.value}, which is not supported: use lora or full")
    return {}


def _words(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else str(value).split()


def _target_modules(argument: Argument) -> dict[str, Any]:
    names = _words(argument.value)
    return {"lora_target_modules": "all-linear" if names == ["all-linear"] else names}


def _attention(argument: Argument) -> dict[str, Any]:
    name = typed(argument, "str")
    return {"attn_implementation": ATTENTION.get(name, name)}


def _quant_bits(argument: Argument) -> dict[str, Any]:
    bits = typed(argument, "int")
    if bits not in (4, 8):
        raise UsageError(f"{argument.where} should be 4 or 8, got {bits}")
    return {f"load_in_{bits}bit": True}


def _truncation(argument: Argument) -> dict[str, Any]:
    return OVERLONG[typed(argument, "str", tuple(OVERLONG))]


def _deepspeed(argument: Argument) -> dict[str, Any]:
    """`zero2`, `zero3_offload`, ... are configurations that ms-swift brings along."""
    name = str(argument.value)
    if not name.startswith("zero") or name.endswith(".json"):
        return {"deepspeed": argument.value}
    stage, _, offload = name.removeprefix("zero").partition("_")
    if stage not in ("0", "1", "2", "3") or offload not in ("", "offload"):
        raise UsageError(f"{argument.where} is {name}: give zero0 to zero3, zero2_offload, zero3_offload, or a file")
    zero: dict[str, Any] = {"stage": int(stage)}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == "3":
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    enabled = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    return {"deepspeed": {"zero_optimization": zero, **dict.fromkeys(batch, "auto"), **enabled}}


def _loss_scale(argument: Argument) -> dict[str, Any]:
    turns = {"default": "all", "last_round": "last"}
    return {"scored_turns": turns[typed(argument, "str", tuple(turns))]}


BY_CODE: dict[str, Callable[[Argument], dict[str, Any]]] = {
    "attn_impl": _attention,
    "columns": nothing,
    "dataset": nothing,
    "deepspeed": _deepspeed,
    "lora_bias": only("none", fix="leave it out: biases are not trained"),
    "loss_scale": _loss_scale,
    "quant_bits": _quant_bits,
    "quant_method": only("bnb", fix="bitsandbytes (bnb) is what models are quantized with"),
    "rlhf_type": _rlhf_type,
    "split_dataset_ratio": held_out,
    "target_modules": _target_modules,
    "task_type": only("causal_lm", fix="leave it out"),
    "train_type": _tuner,
    "truncation_strategy": _truncation,
    "tuner_backend": only("peft", "unsloth", fix="PEFT's adapters are trained"),
    "tuner_type": _tuner,
    "val_dataset": nothing,
}


def _settle(theirs: Arguments, ours: Arguments, unused: dict[str, str]) -> None:
    _settle_data(theirs, ours)
    if value_of(theirs, "rlhf_type") == "simpo" and "rpo_alpha" not in ours:
        ours["rpo_alpha"] = ours.pop("cpo_alpha", Argument("cpo_alpha", 1.0))._replace(
            name="rpo_alpha", given_as="cpo_alpha"
        )
    if value_of(theirs, "tuner_type", value_of(theirs, "train_type", "lora")) == "full":
        drop_idle_lora(ours, unused, "tuner_type is full")
    elif "adapter_name_or_path" in ours:
        drop_idle_lora(ours, unused, "the adapter goes on with its own")
    else:
        ours["use_peft"] = Argument("use_peft", True, given_as="tuner_type")
    if not {"test_split_size", "eval_dataset_name"} & ours.keys():
        ours["eval_strategy"] = Argument("eval_strategy", "no")
        ours.pop("eval_steps", None)
    elif "eval_strategy" not in ours:
        strategy = value_of(ours, "save_strategy", "steps")
        ours["eval_strategy"] = Argument("eval_strategy", strategy)
        if strategy == "steps":
            ours.setdefault("eval_steps", Argument("eval_steps", value_of(ours, "save_steps", 500)))


def _settle_data(theirs: Arguments, ours: Arguments) -> None:
    """`dataset`: names or files, each perhaps with `:subset` and `#rows`."""
    for theirs_name, name in (("dataset", "dataset_name"), ("val_dataset", "eval_dataset_name")):
        argument = theirs.get(theirs_name)
        if argument is None or name in ours:
            continue
        specs = [_spec(word, argument.where) for word in _words(argument.value)]
        taken = {spec.pop("rows", None) for spec in specs}
        rows = taken.pop() if len(taken) == 1 else None
        if taken or (rows and name == "eval_dataset_name"):
            raise UsageError(f"{argument.where}: a number of rows (#) should be the same for all datasets: give files")
        if rows:
            ours.setdefault("max_samples", Argument("max_samples", rows, argument.place, theirs_name))
        columns = theirs.get("columns")
        if name == "eval_dataset_name" or (columns is None and not any("name" in spec for spec in specs)):
            if any("name" in spec for spec in specs):
                raise UsageError(f"{argument.where}: a subset (:) is not read here: give a file")
            joined = ",".join(spec["path"] for spec in specs)
            ours[name] = Argument(name, joined, argument.place, theirs_name)
            continue
        renamed = {"columns": {new: old for old, new in typed(columns, "dict").items()}} if columns else {}
        ours["datasets"] = Argument("datasets", [{**spec, **renamed} for spec in specs], argument.place, theirs_name)


def _spec(word: str, where: str) -> dict[str, Any]:
    path, _, rows = word.partition("#")
    for hub in ("hf::", "ms::"):
        path = path.removeprefix(hub)
    spec: dict[str, Any] = {"path": path}
    if rows:
        if not rows.isdigit():
            raise UsageError(f"{where} is {word}: wanted a number of rows after #")
        spec["rows"] = int(rows)
    if ":" in path and not os.path.exists(path):
        spec["path"], _, spec["name"] = path.partition(":")
    return spec


def _defaults(ours: Arguments) -> dict[str, Any]:
    lora = "use_peft" in ours or "adapter_name_or_path" in ours
    loss = value_of(ours, "loss_type")
    defaults: dict[str, Any] = {**DEFAULTS, **OVERLONG[str(DEFAULTS["truncation_strategy"])]}
    del defaults["truncation_strategy"]
    if "truncation_mode" in ours:
        del defaults["on_overlong"]
    defaults |= {"learning_rate": LEARNING_RATE["lora" if lora else "full"]}
    batch = typed(ours["per_device_train_batch_size"], "int") if "per_device_train_batch_size" in ours else 1
    # 16 pairs in all, over the processes of the launcher
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    defaults["gradient_accumulation_steps"] = max(1, ceil(16 / max(batch, 1) / processes))
    if loss == "simpo":
        defaults |= {"beta": 2.0, "simpo_gamma": 1.0}
    if loss == "orpo":
        defaults["scored_turns"] = "all"
    return {**defaults, **(LORA_DEFAULTS if "use_peft" in ours else {})}


def _add_defaults(values: dict[str, Any]) -> None:
    if values.get("lora_target_modules") == ["all-linear"]:
        values["lora_target_modules"] = "all-linear"
    if values.get("load_in_4bit"):
        values.setdefault("use_bnb_nested_quant", True)


def _remarks(ours: Arguments) -> list[str]:
    if as_yaml(value_of(ours, "max_length")) is None:
        return ["max_length is not set: pairs are as long as they are."]
    return []


MS_SWIFT = Tool(
    name="ms-swift",
    mark="rlhf_type: dpo",
    is_one=_is_one,
    renamed=RENAMED,
    refused=REFUSED,
    no_effect=NO_EFFECT,
    by_code=BY_CODE,
    settle=_settle,
    defaults=_defaults,
    add_defaults=_add_defaults,
    remarks=_remarks,
    several=frozenset(SEVERAL),
)
