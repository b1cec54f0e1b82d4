"""Arguments that older releases of TRL and transformers had: what each means today. No heavy import.

Each one that is given is answered with one log line; a name that nobody ever had, with the closest one.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

from fastdpo.config.other_names import meant_by

logger = logging.getLogger(__name__)

Config = TypeVar("Config")


class OldName(NamedTuple):
    """`becomes` gives today's arguments, {} for none; `says` ends the log line "NAME ..."."""

    becomes: Callable[[Any], dict[str, Any]]
    says: str


def _renamed(name: str) -> OldName:
    return OldName(lambda value: {name: value}, f"is {name} today; taken as that")


def _unused(says: str) -> OldName:
    return OldName(lambda value: {}, f"has no effect: {says}")


def _warmup(ratio: Any) -> dict[str, Any]:
    try:
        value = float(ratio)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"warmup_ratio must be in [0, 1], got {ratio}.")
    # as steps, 1 would be one step
    return {"warmup_steps": min(value, math.nextafter(1.0, 0.0))}


def _tensorboard(folder: Any) -> dict[str, Any]:
    os.environ["TENSORBOARD_LOGGING_DIR"] = os.fspath(folder)
    return {}


def _encoder_decoder(value: Any) -> dict[str, Any]:
    if value:
        raise ValueError("is_encoder_decoder is True, and fastdpo trains causal language models; leave it out.")
    return {}


_HEAD = "no logits but those of scored tokens are ever computed"
_PRECISION = "torch's own autocast is used"

OLD_NAMES: dict[str, OldName] = {
    # TRL
    "base_model_attribute_name": _unused("the backbone is found without it"),
    "force_use_ref_model": _unused("a ref_model that is given is always the reference"),
    "is_encoder_decoder": OldName(_encoder_decoder, "has no effect: every model is a causal one"),
    "label_pad_token_id": _unused("batches have no labels that would be padded"),
    "max_target_length": _renamed("max_completion_length"),
    "padding_value": _unused("padding is masked, whatever token it is"),
    "use_liger_loss": _unused(_HEAD),
    "use_logits_to_keep": _unused(_HEAD),
    # transformers
    "evaluation_strategy": _renamed("eval_strategy"),
    "fp16_backend": _unused(_PRECISION),
    "fp16_opt_level": _unused(_PRECISION),
    "group_by_length": OldName(
        lambda value: {"train_sampling_strategy": "group_by_length"} if value else {},
        "is train_sampling_strategy='group_by_length' today; taken as that",
    ),
    "half_precision_backend": _unused(_PRECISION),
    "include_inputs_for_metrics": _unused("compute_metrics gets the log-probs and rewards of each pair"),
    "logging_dir": OldName(
        _tensorboard, "is the environment variable TENSORBOARD_LOGGING_DIR today, which is set to it"
    ),
    "no_cuda": _renamed("use_cpu"),
    "overwrite_output_dir": _unused("a folder that has files is written to, and a checkpoint is never resumed unasked"),
    "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size"),
    "per_gpu_train_batch_size": _renamed("per_device_train_batch_size"),
    "push_to_hub_token": _renamed("hub_token"),
    "save_safetensors": _unused("weights are always saved as safetensors"),
    "use_mps_device": _unused("the device is found without it"),
    "warmup_ratio": OldName(_warmup, "is a warmup_steps below 1 today; taken as that"),
}

# what from_pretrained of transformers 4 put into a BitsAndBytesConfig by itself
_BITSANDBYTES = ("load_in_4bit", "load_in_8bit", "bnb_4bit_", "llm_int8_")


def todays_names(arguments: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """`given` under today's names; a name in `known` is one of them. Where both are given, today's goes first.

    Raises:
        TypeError: a name that is neither today's nor an old one.
        ValueError: an old name whose value cannot be met.
    """
    values = {name: value for name, value in arguments.items() if name in known}
    for name, value in arguments.items():
        if name in known:
            continue
        if name not in OLD_NAMES:
            hint = meant_by(name, [*known, *OLD_NAMES])
            hint = f"; {hint}" if hint else "; `fastdpo train --help-all` lists them."
            raise TypeError(f"{where} has no argument {name!r}{hint}")
        if value is None:
            continue
        old = OLD_NAMES[name]
        becomes = old.becomes(value)
        twice = [new for new in becomes if values.get(new) not in (None, 0)]
        says = f"is {twice[0]} today, which is given too and goes first" if twice else old.says
        logger.warning(f"{name} {says}.")
        values.update({new: value for new, value in becomes.items() if new not in twice})
    return values


def accepts_old_names(config: type[Config]) -> type[Config]:
    """A dataclass whose constructor also takes `OLD_NAMES`; its fields, and so parsers and `replace`, stay the same."""
    todays = config.__init__
    known = {field.name for field in fields(config) if field.init}  # pyright: ignore[reportArgumentType] a dataclass

    @functools.wraps(todays)
    def __init__(self: Any, *args: Any, **arguments: Any) -> None:
        if not arguments.keys() <= known:
            arguments = todays_names(arguments, known, type(self).__name__)
        todays(self, *args, **arguments)

    config.__init__ = __init__
    return config


def todays_init_kwargs(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that transformers 5 dropped: torch_dtype, load_in_4bit and what belongs to it.

    Raises:
        ValueError: beside a quantization_config.
    """
    values = {name: value for name, value in options.items() if not name.startswith(_BITSANDBYTES)}
    quantization = {name: value for name, value in options.items() if name not in values}
    if "torch_dtype" in values:
        logger.warning(f"{where}: torch_dtype is dtype today; taken as that.")
        dtype = values.pop("torch_dtype")
        values.setdefault("dtype", dtype)
    if quantization:
        names = ", ".join(quantization)
        if values.get("quantization_config") is not None:
            raise ValueError(f"{where} has a quantization_config and {names}; put them into it.")
        logger.warning(f"{where}: {names} belong in a quantization_config today; taken as one of bitsandbytes.")
        if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
            values["quantization_config"] = {"quant_method": "bitsandbytes", **quantization}
    return values
