"""A LLaMA-Factory configuration as arguments of `fastdpo train`: what a table of names cannot say.

Its defaults hold where it is silent and they change what is trained (`llama_factory_keys.py`). Its meanings are
copied except where they are mistakes: `pref_loss` is honoured, and an adapter that is trained further is its own
reference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.translations.llama_factory_keys import DEFAULTS, LORA_DEFAULTS, NO_EFFECT, REFUSED, RENAMED
from fastdpo.cli.train.translations.tool import (
    OURS,
    Arguments,
    Tool,
    as_it_is,
    flag,
    held_out,
    nothing,
    typed,
    value_of,
)
from fastdpo.cli.train.values import Argument, as_yaml

METHODS = ("lora", "full", "freeze", "oft")
STAGES = ("dpo", "pt", "sft", "rm", "ppo", "kto")
ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
LORA = {"use_rslora", "use_dora", "init_lora_weights"}  # and what begins with lora_


def _is_one(arguments: Arguments) -> bool:
    """Whether this is a LLaMA-Factory configuration: its stage or method, or two of its names and none of ours."""
    theirs = arguments.keys() & (KEYS - OURS)
    return bool(theirs & {"stage", "finetuning_type"}) or (
        len(theirs) > 1 and not arguments.keys() & {*RENAMED.values()}
    )


def _settle(theirs: Arguments, ours: Arguments, unused: dict[str, str]) -> None:
    for name in ("kto_chosen_weight", "kto_rejected_weight"):
        if name in theirs and value_of(theirs, "stage") != "kto":
            unused[name] = "it belongs to stage kto"
            del ours[RENAMED[name]]
    length = theirs.get("max_length")
    if length and length.place:
        raise UsageError(f"{length.where} is a length of generation in LLaMA-Factory: write cutoff_len for training")
    _settle_data(theirs, ours)
    _settle_method(theirs, ours, unused)
    _add_bco(theirs, ours, unused)


def _defaults(ours: Arguments) -> dict[str, Any]:
    return {**DEFAULTS, **(LORA_DEFAULTS if "use_peft" in ours else {})}


def _remarks(ours: Arguments) -> list[str]:
    if "adapter_name_or_path" in ours and not {"use_peft", "ref_model", "ref_adapters"} & ours.keys():
        return ["the reference is the adapter's start, where LLaMA-Factory takes the base model (ref_model)."]
    return []


def _add_defaults(values: dict[str, Any]) -> None:
    """LLaMA-Factory's defaults that follow from other values."""
    if values.get("use_peft"):
        values.setdefault("lora_alpha", 2 * values["lora_r"])
    if values.get("load_in_4bit"):
        values.setdefault("use_bnb_nested_quant", True)


def _names(argument: Argument) -> list[str]:
    return typed(argument, "list[str]")


def _stage(argument: Argument) -> dict[str, Any]:
    stage = typed(argument, "str", STAGES)
    if stage not in ("dpo", "kto"):
        raise UsageError(f"{argument.where} is {stage}, and fastdpo trains dpo: set it to dpo, or use llamafactory-cli")
    return {"loss_type": "kto"} if stage == "kto" else {}


def _do_train(argument: Argument) -> dict[str, Any]:
    if not typed(argument, "bool"):
        raise UsageError(f"{argument.where} is false, and `fastdpo train` trains: set it to true")
    return {}


def _finetuning_type(argument: Argument) -> dict[str, Any]:
    if typed(argument, "str", METHODS) == "oft":
        raise UsageError(f"{argument.where} is oft, which is not supported: use lora, freeze or full")
    return {}


def _lora_target(argument: Argument) -> dict[str, Any]:
    names = _names(argument)
    return {"lora_target_modules": "all-linear" if names == ["all"] else names}


def _dataset_dir(argument: Argument) -> dict[str, Any]:
    folder = typed(argument, "str")
    if folder.startswith("REMOTE:"):
        raise UsageError(f"{argument.where} is {folder}: download that folder, and give its path")
    return {"dataset_dir": None if folder == "ONLINE" else folder}


def _quantization_bit(argument: Argument) -> dict[str, Any]:
    bits = typed(argument, "int")
    if bits not in (4, 8):
        raise UsageError(f"{argument.where} should be 4 or 8, got {bits}")
    return {f"load_in_{bits}bit": True}


def _ref_quantization_bit(argument: Argument) -> dict[str, Any]:
    config = {"quant_method": "bitsandbytes", **_quantization_bit(argument)}
    return {"ref_model_init_kwargs": {"quantization_config": config}}


def _quantization_method(argument: Argument) -> dict[str, Any]:
    if typed(argument, "str") not in ("bnb", "bitsandbytes"):
        why = "bitsandbytes (bnb) is what models are quantized with"
        raise UsageError(f"{argument.where} is {argument.value}, and {why}")
    return {}


def _mix_strategy(argument: Argument) -> dict[str, Any]:
    if typed(argument, "str") != "concat":
        why = "datasets are put together whole (concat)"
        raise UsageError(f"{argument.where} is {argument.value}: {why}; leave it out")
    return {}


def _adapter_folder(argument: Argument) -> dict[str, Any]:
    if argument.value:
        raise UsageError(f"{argument.where} is not supported: put the sub-folder into adapter_name_or_path")
    return {}


def _pissa_convert(argument: Argument) -> dict[str, Any]:
    if typed(argument, "bool"):
        raise UsageError(f"{argument.where} is not supported: `fastdpo merge` reads the adapter as it is saved")
    return {}


def _freeze_modules(argument: Argument) -> dict[str, Any]:
    names = _names(argument)
    return {} if names == ["all"] else {argument.name: names}


_TRANSLATE: dict[str, Callable[[Argument], dict[str, Any]]] = {
    "adapter_folder": _adapter_folder,
    "adapter_name_or_path": as_it_is,
    "create_new_adapter": as_it_is,
    "dataset_dir": _dataset_dir,
    "disable_gradient_checkpointing": flag({"gradient_checkpointing": False}),
    "disable_shuffling": flag({"train_sampling_strategy": "sequential"}),
    "do_train": _do_train,
    "finetuning_type": _finetuning_type,
    "flash_attn": lambda argument: {"attn_implementation": ATTENTION[typed(argument, "str", tuple(ATTENTION))]},
    "freeze_extra_modules": _freeze_modules,
    "freeze_trainable_layers": as_it_is,
    "freeze_trainable_modules": _freeze_modules,
    "lora_target": _lora_target,
    "mask_history": flag({"scored_turns": "last"}),
    "mix_strategy": _mix_strategy,
    "pissa_convert": _pissa_convert,
    "pissa_init": flag({"init_lora_weights": "pissa"}),
    "pref_bco_weight": nothing,  # _add_bco reads it
    "pure_bf16": flag({"dtype": "bfloat16"}),
    "quantization_bit": _quantization_bit,
    "quantization_method": _quantization_method,
    "ref_model_quantization_bit": _ref_quantization_bit,
    "stage": _stage,
    "use_swanlab": nothing,  # _settle_data reads it
    "val_size": held_out,
}


def _settle_data(theirs: Arguments, ours: Arguments) -> None:
    """Which pairs are evaluated on, where datasets are named, and what is reported to."""
    for name in ("dataset_name", "eval_dataset_name"):
        if name in ours and isinstance(ours[name].value, list):  # a YAML list of names
            ours[name] = ours[name]._replace(value=",".join(map(str, ours[name].value)))
    size, other = ours.get("test_split_size"), ours.get("eval_dataset_name")
    if size and other:
        raise UsageError(f"{size.where} and {other.given_as or other.name} both name pairs to evaluate on: give one")
    named = [str(ours[name].value) for name in ("dataset_name", "eval_dataset_name") if name in ours]
    # a file that is given in place of a name needs no dataset_info.json
    files = all(Path(name.strip()).exists() for names in named for name in names.split(","))
    if "dataset" in theirs and "dataset_dir" not in theirs and not files:
        ours["dataset_dir"] = Argument("dataset_dir", "data", theirs["dataset"].place)
    swanlab = theirs.get("use_swanlab")
    if swanlab and typed(swanlab, "bool"):
        trackers = ours["report_to"].value if "report_to" in ours else []
        trackers = [trackers] if isinstance(trackers, str) else trackers
        names = [name for name in trackers if name != "none"]
        ours["report_to"] = Argument("report_to", [*names, "swanlab"], swanlab.place, "use_swanlab")


def _settle_method(theirs: Arguments, ours: Arguments, unused: dict[str, str]) -> None:
    """What `finetuning_type` says: which arguments hold."""
    argument = theirs.get("finetuning_type", Argument("finetuning_type", "lora"))
    method = argument.value
    adapter, fresh = ours.get("adapter_name_or_path"), ours.get("create_new_adapter")
    goes_on = adapter is not None and not (fresh and as_yaml(fresh.value))
    if method != "lora" and adapter:
        raise UsageError(f"{adapter.where} goes with finetuning_type lora, got {method}: merge the adapter first")
    idle = set() if method == "freeze" else {name for name in ours if name.startswith("freeze_")}
    why = f"finetuning_type is {method}"
    if method == "lora" and not goes_on:
        ours["use_peft"] = Argument("use_peft", True, argument.place, "finetuning_type")
    else:
        idle |= {name for name in ours if name.startswith("lora_") or name in LORA}
        why = "the adapter goes on with its own" if goes_on else why
    for name in sorted(idle):
        unused[ours[name].given_as or name] = why
        del ours[name]
    if method == "freeze" and "freeze_trainable_layers" not in ours:
        ours["freeze_trainable_layers"] = Argument("freeze_trainable_layers", 2, argument.place, "finetuning_type")


def _add_bco(theirs: Arguments, ours: Arguments, unused: dict[str, str]) -> None:
    """`pref_bco_weight` w: (loss + w bco_pair) / (1 + w)."""
    argument = theirs.get("pref_bco_weight")
    weight = typed(argument, "float") if argument else 0.0
    if argument is None or not weight:
        return
    if weight < 0:
        raise UsageError(f"{argument.where} should be a number of 0 or more, got {weight}")
    loss = ours["loss_type"].value if "loss_type" in ours else "sigmoid"
    losses = loss if isinstance(loss, list) else [loss]
    if set(losses) <= {"orpo", "simpo"}:
        unused["pref_bco_weight"] = f"{losses[0]} has no reference"
        return
    ours["loss_type"] = Argument("loss_type", [*losses, "bco_pair"], argument.place, "pref_loss")
    shares = [*[1 / (1 + weight)] * len(losses), weight / (1 + weight)]
    ours["loss_weights"] = Argument("loss_weights", shares, argument.place, "pref_bco_weight")


LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    mark="stage: dpo",
    is_one=_is_one,
    renamed=RENAMED,
    refused=REFUSED,
    no_effect=NO_EFFECT,
    by_code=_TRANSLATE,
    settle=_settle,
    defaults=_defaults,
    add_defaults=_add_defaults,
    remarks=_remarks,
)
KEYS = LLAMA_FACTORY.keys
