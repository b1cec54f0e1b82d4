"""An axolotl configuration as arguments of `fastdpo train`: what a table of names cannot say.

axolotl's `simpo` is TRL's CPO trainer, whose likelihood term (`cpo_alpha`, 1 where nothing is said) is our `rpo_alpha`.
"""

from collections.abc import Callable
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.translations.axolotl_data import read_dataset
from fastdpo.cli.train.translations.axolotl_keys import (
    DEFAULTS,
    LORA_DEFAULTS,
    NO_EFFECT,
    ONE_IS_NONE,
    REFUSED,
    RENAMED,
)
from fastdpo.cli.train.translations.templates import CHATML, LLAMA3
from fastdpo.cli.train.translations.tool import (
    OURS,
    Arguments,
    Tool,
    drop_idle_lora,
    flag,
    held_out,
    nothing,
    typed,
    value_of,
)
from fastdpo.cli.train.values import Argument, as_yaml

LOSSES = {"dpo": None, "ipo": "ipo", "orpo": "orpo", "simpo": "simpo", "kto": "kto"}
OVERLONG = {"drop": "drop", "truncate": "truncate", "raise": "error"}
TRACKERS = ("wandb", "mlflow", "comet", "tensorboard", "trackio", "swanlab")


def _is_one(arguments: Arguments) -> bool:
    return "base_model" in arguments and len(arguments.keys() & (AXOLOTL.keys - OURS)) > 1


def _rl(argument: Argument) -> dict[str, Any]:
    method = typed(argument, "str")
    if method not in LOSSES:
        raise UsageError(f"{argument.where} is {method}, and fastdpo trains {', '.join(LOSSES)}")
    return {"loss_type": LOSSES[method]} if LOSSES[method] else {}


def _adapter(argument: Argument) -> dict[str, Any]:
    kind = typed(argument, "str")
    if kind not in ("lora", "qlora"):
        raise UsageError(f"{argument.where} is {kind}, which is not supported: use lora or qlora, or leave it out")
    return {"use_peft": True, **({"load_in_4bit": True} if kind == "qlora" else {})}


def _chat_template(argument: Argument) -> dict[str, Any]:
    template = typed(argument, "str")
    if template == "chatml":
        return {"chat_template": CHATML}
    return {"chat_template": template} if any(sign in template for sign in "{./") else {}


def _bnb_config(argument: Argument) -> dict[str, Any]:
    ours = {"bnb_4bit_use_double_quant": "use_bnb_nested_quant"}
    known = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
    options = {key: value for key, value in typed(argument, "dict").items() if key != "bnb_4bit_compute_dtype"}
    unknown = next((key for key in options if key not in known), None)
    if unknown is not None:
        raise UsageError(f"{argument.where}: {unknown} is not supported: use {', '.join(known)}")
    return {ours.get(str(key), str(key)): value for key, value in options.items()}


def _trl(argument: Argument) -> dict[str, Any]:
    known = ("beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    return {key: value for key, value in typed(argument, "dict").items() if key in known and value is not None}


def _switch(name: str) -> Callable[[Argument], dict[str, Any]]:
    """A switch of ours that may say `auto`, which leaves the choice to us, or a way to do it."""

    def read(argument: Argument) -> dict[str, Any]:
        value = as_yaml(argument.value)
        return {} if value == "auto" else {name: value is not False}

    return read


def _one(argument: Argument) -> dict[str, Any]:
    if as_yaml(argument.value) not in (1, "1", False):
        raise UsageError(f"{argument.where} is not supported: {REFUSED[argument.name]}")
    return {}


def _optim_args(argument: Argument) -> dict[str, Any]:
    value = argument.value
    return {"optim_args": ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value}


def _fsdp(argument: Argument) -> dict[str, Any]:
    return {"fsdp": " ".join(typed(argument, "list[str]")) if isinstance(argument.value, list) else argument.value}


BY_CODE: dict[str, Callable[[Argument], dict[str, Any]]] = {
    "activation_offloading": _switch("activation_offloading"),
    "adapter": _adapter,
    "bf16": _switch("bf16"),
    "bfloat16": flag({"dtype": "bfloat16"}),
    "bnb_config_kwargs": _bnb_config,
    "chat_template": _chat_template,
    "chat_template_jinja": lambda argument: {"chat_template": typed(argument, "str")},
    "cosine_min_lr_ratio": nothing,
    "datasets": nothing,
    "eager_attention": flag({"attn_implementation": "eager"}),
    "evals_per_epoch": nothing,
    "excess_length_strategy": lambda argument: {"on_overlong": OVERLONG[typed(argument, "str", tuple(OVERLONG))]},
    "flash_attention": flag({"attn_implementation": "flash_attention_2"}),
    "flex_attention": flag({"attn_implementation": "flex_attention"}),
    "float16": flag({"dtype": "float16"}),
    "float32": flag({"dtype": "float32"}),
    "fsdp": _fsdp,
    "gradient_checkpointing": _switch("gradient_checkpointing"),
    "lora_target_linear": nothing,
    "optim_args": _optim_args,
    "orpo_alpha": nothing,
    "rl": _rl,
    "saves_per_epoch": nothing,
    "sdp_attention": flag({"attn_implementation": "sdpa"}),
    "special_tokens": lambda argument: {
        key: value for key, value in typed(argument, "dict").items() if key == "pad_token" and value
    },
    "test_datasets": nothing,
    "tf32": _switch("tf32"),
    "torch_compile": _switch("torch_compile"),
    "trl": _trl,
    "val_set_size": held_out,
    "xformers_attention": flag({"attn_implementation": "sdpa"}),
    **{f"use_{tracker}": nothing for tracker in TRACKERS},
    **dict.fromkeys(ONE_IS_NONE, _one),
}


def _settle(theirs: Arguments, ours: Arguments, unused: dict[str, str]) -> None:
    if "rl" not in theirs:
        raise UsageError(f"{theirs['base_model'].where} is axolotl's, without rl it trains on texts: add `rl: dpo`")
    _settle_data(theirs, ours)
    _settle_loss(theirs, ours)
    _settle_adapter(theirs, ours, unused)
    _settle_schedule(theirs, ours)
    template = theirs.get("chat_template")
    if template and "chat_template" not in ours and not str(template.value).startswith("tokenizer_default"):
        unused["chat_template"] = "the tokenizer's own template is used"
    tokens = typed(theirs["special_tokens"], "dict") if "special_tokens" in theirs else {}
    others = [name for name, token in tokens.items() if name != "pad_token" and token]
    if others:
        unused["special_tokens"] = f"{', '.join(others)}: the tokenizer's own are kept"
    trackers = [
        name
        for name in TRACKERS
        if value_of(theirs, f"use_{name}") or (name, "wandb_project" in theirs) == ("wandb", True)
    ]
    if trackers and "report_to" not in ours:
        ours["report_to"] = Argument("report_to", trackers, given_as=f"use_{trackers[0]}")


def _settle_data(theirs: Arguments, ours: Arguments) -> None:
    method, configured = theirs["rl"].value, ours.get("chat_template")
    named = theirs.get("datasets")
    if named and not ("dataset_name" in ours and not ours["dataset_name"].place):  # the command line goes first
        entries = typed(named, "list[dict]")
        read = [read_dataset(entry, f"{named.where}[{index}]", method) for index, entry in enumerate(entries)]
        templates = {template or (configured.value if configured else None) for _, template in read}
        if len(templates) > 1:
            raise UsageError(f"{named.where}: types of several chat templates do not mix: use those of one")
        template = templates.pop() if templates else None
        if template is not None:
            ours["chat_template"] = Argument("chat_template", template, named.place, "datasets")
        ours["datasets"] = Argument("datasets", [spec for spec, _ in read], named.place)
    tests = theirs.get("test_datasets")
    if tests is None:
        return
    specs = [read_dataset(entry, tests.where, method)[0] for entry in typed(tests, "list[dict]")]
    if len(specs) > 1 or not specs or specs[0].keys() - {"path", "split"}:
        raise UsageError(f"{tests.where}: give one file or name with its split, or val_set_size")
    ours["eval_dataset_name"] = Argument("eval_dataset_name", specs[0]["path"], tests.place, "test_datasets")
    if "split" in specs[0]:
        ours["dataset_test_split"] = Argument("dataset_test_split", specs[0]["split"], tests.place, "test_datasets")


def _settle_loss(theirs: Arguments, ours: Arguments) -> None:
    method = value_of(theirs, "rl")
    if "orpo_alpha" in theirs and "beta" not in ours:
        ours["beta"] = theirs["orpo_alpha"]._replace(name="beta", given_as="orpo_alpha")
    if method == "simpo" and "rpo_alpha" not in ours:
        weight = ours.pop("cpo_alpha", Argument("cpo_alpha", 1.0))
        ours["rpo_alpha"] = weight._replace(name="rpo_alpha", given_as="cpo_alpha")


def _settle_adapter(theirs: Arguments, ours: Arguments, unused: dict[str, str]) -> None:
    if value_of(theirs, "lora_target_linear"):  # beside names, it adds all of the layers' linear modules
        ours["lora_target_modules"] = Argument("lora_target_modules", "all-linear", "", "lora_target_linear")
    if "adapter_name_or_path" in ours:
        ours.pop("use_peft", None)
        drop_idle_lora(ours, unused, "the adapter goes on with its own")
    elif "use_peft" not in ours:
        drop_idle_lora(ours, unused, "adapter is not set")


def _settle_schedule(theirs: Arguments, ours: Arguments) -> None:
    """How often is evaluated and saved, as a share of all steps; without pairs to evaluate on, never."""
    epochs = typed(ours["num_train_epochs"], "float") if "num_train_epochs" in ours else DEFAULTS["num_epochs"]
    has_pairs = {"test_split_size", "eval_dataset_name"} & ours.keys()
    for ending, name in (("save", "saves_per_epoch"), ("eval", "evals_per_epoch")):
        times = typed(theirs[name], "float") if name in theirs else 0
        if times < 0:
            raise UsageError(f"{theirs[name].where} should be 0 or more, got {times:g}")
        if times and f"{ending}_steps" not in ours:
            share = min(1 / (times * epochs), 0.999)  # 1 would be each step
            ours[f"{ending}_steps"] = Argument(f"{ending}_steps", share, theirs[name].place, name)
        if f"{ending}_strategy" not in ours:
            strategy = "steps" if f"{ending}_steps" in ours else "epoch"
            ours[f"{ending}_strategy"] = Argument(f"{ending}_strategy", strategy)
    never = "evals_per_epoch" in theirs and not typed(theirs["evals_per_epoch"], "float")
    if not has_pairs or never:
        ours["eval_strategy"] = Argument("eval_strategy", "no")
        ours.pop("eval_steps", None)
    if "cosine_min_lr_ratio" in theirs:
        ratio = theirs["cosine_min_lr_ratio"]
        for name, value in (("type", "cosine_with_min_lr"), ("kwargs", {"min_lr_rate": typed(ratio, "float")})):
            ours[f"lr_scheduler_{name}"] = Argument(f"lr_scheduler_{name}", value, ratio.place, ratio.name)


def _defaults(ours: Arguments) -> dict[str, Any]:
    warmup = {} if {"warmup_steps", "warmup_ratio"} & ours.keys() else {"warmup_steps": 0.03}
    batch = value_of(ours, "per_device_train_batch_size", DEFAULTS["micro_batch_size"])
    lora = LORA_DEFAULTS if "use_peft" in ours else {}
    return {**DEFAULTS, **warmup, **lora, "eval_batch_size": batch}


def _add_defaults(values: dict[str, Any]) -> None:
    if values.get("load_in_4bit"):
        values.setdefault("use_bnb_nested_quant", True)


def _remarks(ours: Arguments) -> list[str]:
    template = value_of(ours, "chat_template")
    name = {CHATML: "ChatML", LLAMA3: "Llama 3's"}.get(template)
    return (
        [f"the chat template is {name}, as its dataset types write it, and saved with the tokenizer."] if name else []
    )


AXOLOTL = Tool(
    name="axolotl",
    mark="base_model and rl: dpo",
    is_one=_is_one,
    renamed=RENAMED,
    refused={name: fix for name, fix in REFUSED.items() if name not in ONE_IS_NONE},
    no_effect=NO_EFFECT,
    by_code=BY_CODE,
    settle=_settle,
    defaults=_defaults,
    add_defaults=_add_defaults,
    remarks=_remarks,
)
