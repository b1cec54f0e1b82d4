"""What DPOConfig refuses, in one sentence each, and what it settles before TrainingArguments sees it.

A config is passed as it is in the middle of its construction. Raises ValueError that names the field.
"""

import json
import logging
import math
from dataclasses import fields
from typing import Any

import torch
from transformers.utils.chat_template_utils import get_json_schema
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from fastdpo.data.collate import check_truncation
from fastdpo.data.layouts import BATCH_LAYOUTS
from fastdpo.data.limits import ON_OVERLONG
from fastdpo.data.tokenize_row import SCORED_TURNS
from fastdpo.json_text import parse_json
from fastdpo.losses import LossOptions
from fastdpo.losses.unpaired import UNPAIRED_LOSSES, UnpairedOptions

logger = logging.getLogger(__name__)

ON_NAN = ("stop", "continue")


def check_unpaired(config: Any) -> None:
    """What a loss of single answers has, and what it has not; the order of rows where it is left open."""
    if config.train_sampling_strategy is None:
        in_order = not {"kto", "apo_zero_unpaired"}.isdisjoint(config.loss_type)
        config.train_sampling_strategy = "sequential" if in_order else "random"
    options = config.loss_options()
    plain = {option.name: option.default for option in fields(LossOptions)}
    weights = {option.name: option.default for option in fields(UnpairedOptions) if option.name not in plain}
    if isinstance(options, LossOptions):
        for name, default in weights.items():
            if getattr(config, name) != default:
                raise ValueError(
                    f"{name} is for single answers with a label ({', '.join(UNPAIRED_LOSSES)}), and the loss "
                    f"{', '.join(options.names)} compares pairs; leave it out."
                )
        return
    loss = options.loss_type
    for name, default in plain.items():
        if name not in ("loss_type", "beta") and getattr(config, name) != default:
            raise ValueError(
                f"{name} is for losses of pairs, got {getattr(config, name)!r}; leave it out for {loss!r}."
            )
    if options.loss.shift == "kl" and config.per_device_train_batch_size == 1:
        raise ValueError(
            f"{loss} estimates its KL from answers under the prompts of other rows of a batch, and "
            "per_device_train_batch_size is 1; give at least 2 (with fewer gradient_accumulation_steps), or use bco or "
            "apo_zero_unpaired."
        )


def check_lengths(config: Any) -> None:
    """Lengths, layouts and other choices from a list; `pad_to_multiple_of` becomes a number where it is one."""
    check_truncation(config.max_length, config.truncation_mode)
    named = (("on_overlong", ON_OVERLONG), ("scored_turns", SCORED_TURNS), ("on_nan", ON_NAN))
    for name, choices in named:
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}.")
    for name in ("max_prompt_length", "max_completion_length"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    multiple = config.pad_to_multiple_of
    if isinstance(multiple, str) and multiple != "auto":
        if multiple.lower() in ("none", "null"):
            config.pad_to_multiple_of = None
        elif multiple.isdigit():
            config.pad_to_multiple_of = int(multiple)
    multiple = config.pad_to_multiple_of
    if multiple not in (None, "auto") and (isinstance(multiple, str) or multiple < 1):
        raise ValueError(f"pad_to_multiple_of must be 'auto' or a number >= 1, got {multiple!r}.")
    if config.batch_layout not in ("auto", *BATCH_LAYOUTS):
        choices = ", ".join(("auto", *BATCH_LAYOUTS))
        raise ValueError(f"batch_layout is {config.batch_layout!r}; wanted one of {choices}.")
    if config.padding_free and config.batch_layout == "padded":
        raise ValueError("padding_free and batch_layout='padded' exclude each other; leave one out.")
    if config.max_tokens_per_batch is not None and config.max_tokens_per_batch < 2:
        raise ValueError(f"max_tokens_per_batch must be at least 2, got {config.max_tokens_per_batch}.")
    if config.max_tokens_per_batch is not None and config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size changes the pairs of a batch, and max_tokens_per_batch plans the batches of the "
            "whole run for one number; use one of them."
        )
    if config.dataset_num_proc is not None and config.dataset_num_proc < 1:
        raise ValueError(f"dataset_num_proc must be at least 1, got {config.dataset_num_proc}.")


def check_tools(config: Any) -> None:
    """`tools` becomes JSON text: it is logged, hashed and written to files as every other argument."""
    if isinstance(config.tools, str):
        try:
            config.tools = parse_json(config.tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"tools is not JSON: {error.msg} at character {error.pos}.") from None
        except ValueError as error:
            raise ValueError(f"tools cannot be read: {error}.") from error
    if config.tools is not None and not isinstance(config.tools, list):
        raise ValueError(f"tools must be a list of tools, got {type(config.tools).__name__}.")
    tools = [get_json_schema(tool) if callable(tool) else tool for tool in config.tools or []]
    config.tools = json.dumps(tools) if tools else None


def check_reference(config: Any) -> None:
    """Arguments of a reference that moves or is precomputed."""
    for name in ("precompute_ref_batch_size", "ref_model_sync_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 < config.ref_model_mixup_alpha <= 1:
        raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {config.ref_model_mixup_alpha}.")
    if config.sync_ref_model and config.precompute_ref_log_probs:
        raise ValueError(
            "sync_ref_model moves the reference, and precompute_ref_log_probs keeps the log-probs of one that "
            "stays; use one of them."
        )


def check_schedule(config: Any) -> None:
    """Batch sizes, steps, epochs, and what is logged, evaluated and saved when."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
    if not (math.isfinite(config.learning_rate) and config.learning_rate >= 0):
        raise ValueError(f"learning_rate must be a number >= 0, got {config.learning_rate}.")
    for name in ("logging_steps", "save_steps", "eval_steps"):
        steps = getattr(config, name)
        if steps is not None and not (math.isfinite(steps) and steps >= 0):
            raise ValueError(f"{name} must be a number of steps, or a share of them below 1, got {steps}.")
    if config.logging_strategy == "steps" and config.logging_steps == 0:
        raise ValueError("logging_steps must be above 0 where logging_strategy is 'steps', got 0.")
    when = [getattr(strategy, "value", strategy) for strategy in (config.eval_strategy, config.save_strategy)]
    if config.load_best_model_at_end and when[1] not in ("best", when[0]):
        raise ValueError(
            f"load_best_model_at_end compares evaluations of what is saved, and eval_strategy is {when[0]!r} and "
            f"save_strategy {when[1]!r}; make them the same."
        )
    if config.max_steps == 0:
        raise ValueError("max_steps must be at least 1, or -1 to train for num_train_epochs, got 0.")
    if config.max_steps < 0 and not (math.isfinite(config.num_train_epochs) and config.num_train_epochs > 0):
        raise ValueError(f"num_train_epochs must be > 0 where max_steps is not set, got {config.num_train_epochs}.")


def say_what_is_not_used(config: Any) -> None:
    """One log line for each argument that is understood and does nothing."""
    if config.padding_free:
        logger.warning(f"padding_free has no effect; batch_layout={config.batch_layout!r} decides.")
    if config.activation_offloading:
        logger.warning(
            "activation_offloading is not used: activations stay on the device; gradient_checkpointing saves "
            "most of their memory."
        )


def choose_precision(config: Any) -> None:
    """bf16 where it is left open and the device has it; a CPU is asked for by name where bf16 needs it."""
    if config.fp16 and config.bf16:
        raise ValueError("fp16 and bf16 are both set; a run computes in one of them: leave one out.")
    if config.fp16 and (config.use_cpu or not torch.accelerator.is_available()):
        logger.warning("fp16 needs a GPU, and none is in use: training is in fp32.")
    if config.bf16 is None:
        device_has_it = not config.use_cpu and is_torch_bf16_gpu_available()
        config.bf16 = bool(device_has_it and not config.fp16)  # pyright: ignore[reportIncompatibleVariableOverride] as above
        if not device_has_it and not config.fp16:
            logger.warning("bf16 is off: no GPU with bfloat16 is in use, training is in fp32.")
    elif config.bf16 and not torch.accelerator.is_available():
        # bfloat16 autocast works on a CPU; transformers refuses it unless the CPU is asked for by name
        config.use_cpu = True
