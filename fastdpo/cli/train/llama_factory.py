"""A LLaMA-Factory configuration as arguments of `fastdpo train`: what a table of names cannot say.

Its defaults hold where it is silent and they change what is trained (`llama_factory_keys.py`). Its meanings are
copied except where they are mistakes: `pref_loss` is honoured, and an adapter that is trained further is its own
reference.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.arguments import Field
from fastdpo.cli.train.fields import FIELDS
from fastdpo.cli.train.llama_factory_keys import DEFAULTS, LORA_DEFAULTS, REFUSED, RENAMED, WHY_NOT
from fastdpo.cli.train.values import Entry, convert, plain
from fastdpo.config.old_names import OLD_NAMES
from fastdpo.wording import did_you_mean

logger = logging.getLogger(__name__)

OURS = {field.name for field in FIELDS}
METHODS = ("lora", "full", "freeze", "oft")
STAGES = ("dpo", "pt", "sft", "rm", "ppo", "kto")
ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
LORA = {"use_rslora", "use_dora", "init_lora_weights"}  # and what begins with lora_


def is_one(entries: list[Entry]) -> bool:
    """Whether this is a LLaMA-Factory configuration: its stage or method, or two of its names and none of ours."""
    names = {entry.name for entry in entries}
    theirs = names & (KEYS - OURS)
    return bool(theirs & {"stage", "finetuning_type"}) or (len(theirs) > 1 and not names & {*RENAMED.values()})


def translate(entries: list[Entry], source: str) -> list[Entry]:
    """The entries under our names. What changes nothing is said in one log line, and so are the defaults that hold.

    Raises:
        UsageError: one sentence: an unknown name, or what would change training and is not built.
    """
    given = {entry.name: entry for entry in entries}  # the command line comes after the file
    # null is LLaMA-Factory's way to leave an argument out
    given = {name: e for name, e in given.items() if not _is_left_out(e)}
    unused: dict[str, str] = {}
    found: dict[str, Entry] = {}
    for entry in given.values():
        for ours in _translated(entry, unused):
            other = found.get(ours.name)
            if other and bool(other.place) == bool(ours.place):
                raise UsageError(f"{ours.where} and {other.given_as or other.name} are the same argument: give one")
            if other is None or other.place:
                found[ours.name] = ours
    _settle_data(given, found)
    _settle_method(given, found, unused)
    _add_bco(given, found, unused)
    defaults = {**DEFAULTS, **(LORA_DEFAULTS if "use_peft" in found else {})}
    silent = {name: value for name, value in defaults.items() if RENAMED.get(name, name) not in found}
    for name, value in silent.items():
        found[RENAMED.get(name, name)] = Entry(RENAMED.get(name, name), value, "", name)
    said = ", ".join(f"{name} {value}" for name, value in silent.items())
    logger.info(f"{source} is a LLaMA-Factory configuration{said and f'; its defaults hold for {said}'}.")
    if "adapter_name_or_path" in found and not {"use_peft", "ref_model", "ref_adapters"} & found.keys():
        logger.info("the reference is the adapter's start, where LLaMA-Factory takes the base model (ref_model).")
    if unused:
        logger.warning(f"no effect here: {', '.join(f'{name} ({why})' for name, why in unused.items())}.")
    return list(found.values())


def add_defaults(values: dict[str, Any]) -> None:
    """LLaMA-Factory's defaults that follow from other values."""
    if values.get("use_peft"):
        values.setdefault("lora_alpha", 2 * values["lora_r"])
    if values.get("load_in_4bit"):
        values.setdefault("use_bnb_nested_quant", True)


def _is_left_out(entry: Entry) -> bool:
    value = plain(entry.value) if entry.name in KEYS and not entry.place else entry.value
    return value is None


def _translated(entry: Entry, unused: dict[str, str]) -> list[Entry]:
    """One entry under our names: none where it has no effect."""
    name = entry.name
    if name in _TRANSLATE:
        return [Entry(new, value, entry.place, name) for new, value in _TRANSLATE[name](entry).items()]
    if name == "max_length" and entry.place:
        raise UsageError(f"{entry.where} is a length of generation in LLaMA-Factory: write cutoff_len for training")
    if name in RENAMED:
        return [entry._replace(name=RENAMED[name], given_as=name)]
    if name in OURS or name in OLD_NAMES:
        return [entry]
    asked = plain(entry.value)
    if name in REFUSED and asked:
        raise UsageError(f"{entry.where} is not supported: {REFUSED[name]}")
    if name in WHY_NOT and asked:
        unused[name] = WHY_NOT[name]
    if name in REFUSED or name in WHY_NOT:
        return []
    hint = did_you_mean(name, KEYS | OURS | OLD_NAMES.keys())
    kind = f"{entry.place}: there is no key" if entry.place else "there is no argument"
    raise UsageError(f"{kind} '{name}'" + (f": {hint}" if hint else ", neither LLaMA-Factory's nor fastdpo's"))


def _typed(entry: Entry, kind: str, choices: tuple[str, ...] | None = None) -> Any:
    return convert(entry.value, Field(entry.name, kind, None, choices, "", "", "", False), entry.where)


def _names(entry: Entry) -> list[str]:
    return _typed(entry, "list[str]")


def _stage(entry: Entry) -> dict[str, Any]:
    stage = _typed(entry, "str", STAGES)
    if stage != "dpo":
        other = "llamafactory-cli" if stage != "kto" else "pairs with `pref_loss: kto_pair`, or llamafactory-cli"
        raise UsageError(f"{entry.where} is {stage}, and fastdpo trains dpo: set it to dpo, or use {other}")
    return {}


def _do_train(entry: Entry) -> dict[str, Any]:
    if not _typed(entry, "bool"):
        raise UsageError(f"{entry.where} is false, and `fastdpo train` trains: set it to true")
    return {}


def _finetuning_type(entry: Entry) -> dict[str, Any]:
    if _typed(entry, "str", METHODS) == "oft":
        raise UsageError(f"{entry.where} is oft, which is not supported: use lora, freeze or full")
    return {}


def _lora_target(entry: Entry) -> dict[str, Any]:
    names = _names(entry)
    return {"lora_target_modules": "all-linear" if names == ["all"] else names}


def _dataset_dir(entry: Entry) -> dict[str, Any]:
    folder = _typed(entry, "str")
    if folder.startswith("REMOTE:"):
        raise UsageError(f"{entry.where} is {folder}: download that folder, and give its path")
    return {"dataset_dir": None if folder == "ONLINE" else folder}


def _quantization_bit(entry: Entry) -> dict[str, Any]:
    bits = _typed(entry, "int")
    if bits not in (4, 8):
        raise UsageError(f"{entry.where} should be 4 or 8, got {bits}")
    return {f"load_in_{bits}bit": True}


def _ref_quantization_bit(entry: Entry) -> dict[str, Any]:
    config = {"quant_method": "bitsandbytes", **_quantization_bit(entry)}
    return {"ref_model_init_kwargs": {"quantization_config": config}}


def _quantization_method(entry: Entry) -> dict[str, Any]:
    if _typed(entry, "str") not in ("bnb", "bitsandbytes"):
        raise UsageError(f"{entry.where} is {entry.value}, and bitsandbytes (bnb) is what models are quantized with")
    return {}


def _mix_strategy(entry: Entry) -> dict[str, Any]:
    if _typed(entry, "str") != "concat":
        raise UsageError(f"{entry.where} is {entry.value}: datasets are put together whole (concat); leave it out")
    return {}


def _adapter_folder(entry: Entry) -> dict[str, Any]:
    if entry.value:
        raise UsageError(f"{entry.where} is not supported: put the sub-folder into adapter_name_or_path")
    return {}


def _pissa_convert(entry: Entry) -> dict[str, Any]:
    if _typed(entry, "bool"):
        raise UsageError(f"{entry.where} is not supported: `fastdpo merge` reads the adapter as it is saved")
    return {}


def _freeze_modules(entry: Entry) -> dict[str, Any]:
    names = _names(entry)
    return {} if names == ["all"] else {entry.name: names}


def _val_size(entry: Entry) -> dict[str, Any]:
    size = _typed(entry, "float")
    if size == 0:
        return {}
    return {"test_split_size": size if size < 1 else int(size)}


def _flag(when_true: dict[str, Any]) -> Callable[[Entry], dict[str, Any]]:
    return lambda entry: when_true if _typed(entry, "bool") else {}


def _as_it_is(entry: Entry) -> dict[str, Any]:
    return {entry.name: entry.value}


_TRANSLATE: dict[str, Callable[[Entry], dict[str, Any]]] = {
    "adapter_folder": _adapter_folder,
    "adapter_name_or_path": _as_it_is,
    "create_new_adapter": _as_it_is,
    "dataset_dir": _dataset_dir,
    "disable_gradient_checkpointing": _flag({"gradient_checkpointing": False}),
    "disable_shuffling": _flag({"train_sampling_strategy": "sequential"}),
    "do_train": _do_train,
    "finetuning_type": _finetuning_type,
    "flash_attn": lambda entry: {"attn_implementation": ATTENTION[_typed(entry, "str", tuple(ATTENTION))]},
    "freeze_extra_modules": _freeze_modules,
    "freeze_trainable_layers": _as_it_is,
    "freeze_trainable_modules": _freeze_modules,
    "lora_target": _lora_target,
    "mask_history": _flag({"scored_turns": "last"}),
    "mix_strategy": _mix_strategy,
    "pissa_convert": _pissa_convert,
    "pissa_init": _flag({"init_lora_weights": "pissa"}),
    "pref_bco_weight": lambda entry: {},  # _add_bco reads it
    "pure_bf16": _flag({"dtype": "bfloat16"}),
    "quantization_bit": _quantization_bit,
    "quantization_method": _quantization_method,
    "ref_model_quantization_bit": _ref_quantization_bit,
    "stage": _stage,
    "use_swanlab": lambda entry: {},  # _settle_data reads it
    "val_size": _val_size,
}


# every name that is read in a LLaMA-Factory configuration only, or otherwise there
KEYS = RENAMED.keys() | REFUSED.keys() | WHY_NOT.keys() | _TRANSLATE.keys()


def _settle_data(given: dict[str, Entry], found: dict[str, Entry]) -> None:
    """Which pairs are evaluated on, where datasets are named, and what is reported to."""
    for name in ("dataset_name", "eval_dataset_name"):
        if name in found and isinstance(found[name].value, list):  # a YAML list of names
            found[name] = found[name]._replace(value=",".join(map(str, found[name].value)))
    size, other = found.get("test_split_size"), found.get("eval_dataset_name")
    if size and other:
        raise UsageError(f"{size.where} and {other.given_as or other.name} both name pairs to evaluate on: give one")
    named = [str(found[name].value) for name in ("dataset_name", "eval_dataset_name") if name in found]
    # a file that is given in place of a name needs no dataset_info.json
    files = all(Path(name.strip()).exists() for names in named for name in names.split(","))
    if "dataset" in given and "dataset_dir" not in given and not files:
        found["dataset_dir"] = Entry("dataset_dir", "data", given["dataset"].place)
    swanlab = given.get("use_swanlab")
    if swanlab and _typed(swanlab, "bool"):
        trackers = found["report_to"].value if "report_to" in found else []
        trackers = [trackers] if isinstance(trackers, str) else trackers
        names = [name for name in trackers if name != "none"]
        found["report_to"] = Entry("report_to", [*names, "swanlab"], swanlab.place, "use_swanlab")


def _settle_method(given: dict[str, Entry], found: dict[str, Entry], unused: dict[str, str]) -> None:
    """What `finetuning_type` says: which arguments hold."""
    entry = given.get("finetuning_type", Entry("finetuning_type", "lora"))
    method = entry.value
    adapter, fresh = found.get("adapter_name_or_path"), found.get("create_new_adapter")
    goes_on = adapter is not None and not (fresh and plain(fresh.value))
    if method != "lora" and adapter:
        raise UsageError(f"{adapter.where} goes with finetuning_type lora, got {method}: merge the adapter first")
    idle = set() if method == "freeze" else {name for name in found if name.startswith("freeze_")}
    why = f"finetuning_type is {method}"
    if method == "lora" and not goes_on:
        found["use_peft"] = Entry("use_peft", True, entry.place, "finetuning_type")
    else:
        idle |= {name for name in found if name.startswith("lora_") or name in LORA}
        why = "the adapter goes on with its own" if goes_on else why
    for name in sorted(idle):
        unused[found[name].given_as or name] = why
        del found[name]
    if method == "freeze" and "freeze_trainable_layers" not in found:
        found["freeze_trainable_layers"] = Entry("freeze_trainable_layers", 2, entry.place, "finetuning_type")


def _add_bco(given: dict[str, Entry], found: dict[str, Entry], unused: dict[str, str]) -> None:
    """`pref_bco_weight` w: (loss + w bco_pair) / (1 + w)."""
    entry = given.get("pref_bco_weight")
    weight = _typed(entry, "float") if entry else 0.0
    if entry is None or not weight:
        return
    if weight < 0:
        raise UsageError(f"{entry.where} should be a number of 0 or more, got {weight}")
    loss = found["loss_type"].value if "loss_type" in found else "sigmoid"
    losses = loss if isinstance(loss, list) else [loss]
    if set(losses) <= {"orpo", "simpo"}:
        unused["pref_bco_weight"] = f"{losses[0]} has no reference"
        return
    found["loss_type"] = Entry("loss_type", [*losses, "bco_pair"], entry.place, "pref_loss")
    shares = [*[1 / (1 + weight)] * len(losses), weight / (1 + weight)]
    found["loss_weights"] = Entry("loss_weights", shares, entry.place, "pref_bco_weight")
