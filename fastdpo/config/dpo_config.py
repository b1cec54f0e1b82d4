"""`DPOConfig`: transformers' `TrainingArguments` plus what DPO needs, under TRL 1.16's names and defaults."""

import json
import logging
import math
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.utils.chat_template_utils import get_json_schema
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from fastdpo.config.checks import ON_NAN, check_trackers
from fastdpo.config.old_names import accepts_old_names, todays_init_kwargs
from fastdpo.data.collate import TRUNCATION_MODES, check_truncation
from fastdpo.data.layouts import BATCH_LAYOUTS
from fastdpo.data.limits import ON_OVERLONG
from fastdpo.data.tokenize_row import SCORED_TURNS
from fastdpo.json_text import parse_json
from fastdpo.losses import LossOptions
from fastdpo.losses.options import AGGREGATES, F_DIVERGENCES

logger = logging.getLogger(__name__)


@accepts_old_names
@dataclass
class DPOConfig(TrainingArguments):
    """Every argument of a DPO run; arguments of older TRL and transformers (`OLD_NAMES`) are understood too.

    Raises:
        TypeError: an unknown argument; the sentence has the closest name.
        ValueError: from the constructor, one sentence that names the field, what came and what was wanted.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "ref_model_init_kwargs",
    ]

    # fields of TrainingArguments with another default
    output_dir: str | None = field(
        default="output", metadata={"help": "Folder for checkpoints, metrics and the final model or adapter."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many update steps; below 1, a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Log the running mean in place of a NaN or infinite loss; hides a diverged run."},
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute activations in the backward pass: less memory, about a fifth slower."},
    )
    bf16: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride] None means: ask the device
        default=None,
        metadata={"help": "Train under bfloat16 autocast. Unset: yes where the device has it, unless fp16."},
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 transformers' parser takes the second type
        default="none",
        metadata={"help": "Trackers to log to: all, none, or names such as tensorboard, wandb."},
    )
    metric_files: bool = field(
        default=True, metadata={"help": "Write table, curves and summary of the run to dpo_metrics in `output_dir`."}
    )

    # the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained` for a model given as a path, as a dict or JSON."},
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The same for a ref_model given as a path; unset: as `model_init_kwargs`."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of a mixture of experts' load-balancing loss; unset: the model's own."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that a model or tokenizer brings along."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of policy and reference to 0."})

    # the data
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize the dataset; unset: this one."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt plus completion, in tokens; unset: no limit."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which end of a sequence longer than `max_length` is kept.",
            "choices": list(TRUNCATION_MODES),
        },
    )
    on_overlong: str = field(
        default="truncate",
        metadata={
            "help": "What becomes of a pair with a sequence longer than `max_length`: truncate, drop, or stop (error).",
            "choices": list(ON_OVERLONG),
        },
    )
    scored_turns: str = field(
        default="last",
        metadata={
            "help": "Score completions (last, as TRL), or all assistant turns, the prompt's too (all, as minimind).",
            "choices": list(SCORED_TURNS),
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Cut longer prompts from the left to this many tokens; unset: no limit."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Cut longer completions from the right to this many tokens; unset: no limit."}
    )
    tools: None | str | list[Any] = field(  # noqa: RUF036 as above
        default=None,
        metadata={"help": "Tools for rows without any of their own, as JSON (in Python a list of dicts or functions)."},
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Token that pads batches; unset: the tokenizer's pad token, or its EOS token."}
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Accepted: `batch_layout` 'auto' pads as little as is exact."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata={"help": "Pad batches to a multiple of this many tokens; 'auto': 128 on Neuron, else 1."},
    )
    batch_layout: str = field(
        default="auto",
        metadata={
            "help": "Rows of a batch: padded, packed, shared (prompts once), auto: the best exact one.",
            "choices": ["auto", *BATCH_LAYOUTS],
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Tokens of a batch at most, beside per_device_train_batch_size pairs; unset: no limit."},
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Accepted and not used: `gradient_checkpointing` saves that memory."}
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Drop and count bad rows of the dataset instead of stopping at them."},
    )

    generate_during_eval: bool = field(
        default=False,
        metadata={"help": "Let policy and reference answer some prompts at each evaluation (answers.jsonl)."},
    )

    # the loss, under the names of `LossOptions`
    loss_type: list[str] | str = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Loss, or several that are added with `loss_weights`; docs/losses.md has the table."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each loss in `loss_type`; unset: 1 each."}
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Strength of the pull to the reference, > 0; ipo: the paper's tau, orpo: its lambda."},
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "Probability that a label is flipped, in [0, 0.5); really applied to sigmoid (cDPO)."},
    )
    aggregate: str = field(
        default="sum",
        metadata={"help": "A completion's log-prob: sum or mean over its tokens.", "choices": list(AGGREGATES)},
    )
    reference_free: bool = field(default=False, metadata={"help": "Take the reference's log-probs as 0."})
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence from the reference (f-DPO).", "choices": list(F_DIVERGENCES)},
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "alpha of alpha_divergence; 1 is reverse_kl."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of discopop's modulation, > 0."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target reward margin of simpo."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of cpo's likelihood term."})
    rpo_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of an added NLL of the chosen answers, a mean over the batch's tokens (RPO)."},
    )
    pref_ftx: float = field(
        default=0.0, metadata={"help": "Weight of an added NLL of the chosen answers, each averaged over its tokens."}
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "Weigh each pair by its probability under the policy (WPO)."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight in [0, 1] of tokens beyond the shorter answer's length (LD-DPO); unset: off."},
    )

    # the reference, beside the trainer's `ref_model`
    model_adapter_name: str | None = field(
        default=None, metadata={"help": "Adapter that is trained, of a model that has several; unset: the active one."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "Adapter of the same model that is the reference; unset: base or start."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Compute the reference's log-probs once, before training; kept on disk."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per batch of that computation; unset: as in training or evaluation."}
    )
    precompute_ref_dir: str | None = field(
        default=None, metadata={"help": "Folder where these log-probs are kept; unset: ref_logps in `output_dir`."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Let the reference follow the policy (TR-DPO), with an adapter too."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy when TR-DPO mixes it into the reference, in (0, 1]."}
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "Update steps between two such mixtures, at least 1."}
    )

    # what a run does where it cannot go on as it was
    on_nan: str = field(
        default="stop",
        metadata={
            "help": "At a loss, gradient or weight that is not finite: stop with an error, or continue with a line.",
            "choices": list(ON_NAN),
        },
    )
    resume_with_other_data: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint whose run trained on other rows than these."},
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = "output"
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.f_divergence_type, Enum):  # TRL up to 0.28
            self.f_divergence_type = self.f_divergence_type.value
        self.loss_options()
        self._check_lengths()
        self._check_tools()
        self._check_reference()
        self._check_schedule()
        check_trackers(self.report_to)
        self._say_what_is_not_used()
        self._choose_precision()
        # the alias is deprecated in transformers 5.2x; the default of ours is no reason for a warning
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if getattr(self, "activation_checkpointing_kwargs", False) is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        for name in ("model_init_kwargs", "ref_model_init_kwargs"):
            if isinstance(getattr(self, name), dict):
                setattr(self, name, todays_init_kwargs(getattr(self, name), name))
        if self.pad_to_multiple_of == "auto":
            self.pad_to_multiple_of = 128 if self.device.type == "neuron" else None

    def loss_options(self) -> LossOptions:
        """The options of the loss, checked."""
        return LossOptions(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})

    def _check_lengths(self) -> None:
        check_truncation(self.max_length, self.truncation_mode)
        named = (("on_overlong", ON_OVERLONG), ("scored_turns", SCORED_TURNS), ("on_nan", ON_NAN))
        for name, choices in named:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        multiple = self.pad_to_multiple_of
        if isinstance(multiple, str) and multiple != "auto":
            if multiple.lower() in ("none", "null"):
                self.pad_to_multiple_of = None
            elif multiple.isdigit():
                self.pad_to_multiple_of = int(multiple)
        multiple = self.pad_to_multiple_of
        if multiple not in (None, "auto") and (isinstance(multiple, str) or multiple < 1):
            raise ValueError(f"pad_to_multiple_of must be 'auto' or a number >= 1, got {multiple!r}.")
        if self.batch_layout not in ("auto", *BATCH_LAYOUTS):
            wanted = ", ".join(("auto", *BATCH_LAYOUTS))
            raise ValueError(f"batch_layout is {self.batch_layout!r}; wanted one of {wanted}.")
        if self.padding_free and self.batch_layout == "padded":
            raise ValueError("padding_free and batch_layout='padded' exclude each other; leave one out.")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 2:
            raise ValueError(f"max_tokens_per_batch must be at least 2, got {self.max_tokens_per_batch}.")
        if self.max_tokens_per_batch is not None and self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size changes the pairs of a batch, and max_tokens_per_batch plans the batches of the "
                "whole run for one number; use one of them."
            )
        if self.dataset_num_proc is not None and self.dataset_num_proc < 1:
            raise ValueError(f"dataset_num_proc must be at least 1, got {self.dataset_num_proc}.")

    def _check_tools(self) -> None:
        if isinstance(self.tools, str):
            try:
                self.tools = parse_json(self.tools)
            except json.JSONDecodeError as error:
                raise ValueError(f"tools is not JSON: {error.msg} at character {error.pos}.") from None
            except ValueError as error:
                raise ValueError(f"tools cannot be read: {error}.") from error
        if self.tools is not None and not isinstance(self.tools, list):
            raise ValueError(f"tools must be a list of tools, got {type(self.tools).__name__}.")
        # text, as every other argument: it is logged, hashed and written to files
        self.tools = json.dumps([get_json_schema(t) if callable(t) else t for t in self.tools]) if self.tools else None

    def _check_reference(self) -> None:
        for name in ("precompute_ref_batch_size", "ref_model_sync_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}.")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model moves the reference, and precompute_ref_log_probs keeps the log-probs of one that "
                "stays; use one of them."
            )

    def _check_schedule(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate must be a number >= 0, got {self.learning_rate}.")
        for name in ("logging_steps", "save_steps", "eval_steps"):
            steps = getattr(self, name)
            if steps is not None and not (math.isfinite(steps) and steps >= 0):
                raise ValueError(f"{name} must be a number of steps, or a share of them below 1, got {steps}.")
        if self.logging_strategy == "steps" and self.logging_steps == 0:
            raise ValueError("logging_steps must be above 0 where logging_strategy is 'steps', got 0.")
        when = [getattr(strategy, "value", strategy) for strategy in (self.eval_strategy, self.save_strategy)]
        if self.load_best_model_at_end and when[1] not in ("best", when[0]):
            raise ValueError(
                f"load_best_model_at_end compares evaluations of what is saved, and eval_strategy is {when[0]!r} and "
                f"save_strategy {when[1]!r}; make them the same."
            )
        if self.max_steps == 0:
            raise ValueError("max_steps must be at least 1, or -1 to train for num_train_epochs, got 0.")
        if self.max_steps < 0 and not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise ValueError(f"num_train_epochs must be > 0 where max_steps is not set, got {self.num_train_epochs}.")

    def _say_what_is_not_used(self) -> None:
        if self.padding_free:
            logger.warning(f"padding_free is part of batch_layout today, which is {self.batch_layout!r}.")
        if self.activation_offloading:
            logger.warning(
                "activation_offloading is not used: activations stay on the device; gradient_checkpointing saves "
                "most of their memory."
            )

    def _choose_precision(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both set; a run computes in one of them: leave one out.")
        if self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            logger.warning("fp16 needs a GPU, and none is in use: training is in fp32.")
        if self.bf16 is None:
            device_has_it = not self.use_cpu and is_torch_bf16_gpu_available()
            self.bf16 = bool(device_has_it and not self.fp16)  # pyright: ignore[reportIncompatibleVariableOverride] as above
            if not device_has_it and not self.fp16:
                logger.warning("bf16 is off: no GPU with bfloat16 is in use, training is in fp32.")
        elif self.bf16 and not torch.accelerator.is_available():
            # bfloat16 autocast works on a CPU; transformers refuses it unless the CPU is asked for by name
            self.use_cpu = True
