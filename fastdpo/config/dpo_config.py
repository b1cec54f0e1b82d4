"""`DPOConfig`: transformers' `TrainingArguments` plus what DPO needs, under TRL 1.16's names and defaults."""

import logging
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from transformers import TrainingArguments

from fastdpo.config import checks
from fastdpo.config.old_names import accepts_old_names, todays_init_kwargs
from fastdpo.config.trackers import check_trackers
from fastdpo.data.collate import TRUNCATION_MODES
from fastdpo.data.layouts import BATCH_LAYOUTS
from fastdpo.data.limits import ON_OVERLONG
from fastdpo.data.tokenize_row import SCORED_TURNS
from fastdpo.losses import LossOptions
from fastdpo.losses.options import AGGREGATES, F_DIVERGENCES
from fastdpo.losses.unpaired import UNPAIRED_LOSSES, UnpairedOptions

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
        default=10, metadata={"help": "Log every N update steps; below 1, a share of all steps."}
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
    train_sampling_strategy: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride] None: by the loss
        default=None,
        metadata={
            "help": "Order of the rows; unset: random, and as they come for kto and apo_zero_unpaired (as in TRL).",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
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
        metadata={
            "help": "Loss, or several of pairs that are added with `loss_weights`; docs/losses.md has the table."
        },
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
        metadata={"help": "Probability that a label is flipped, in [0, 0.5); applied to sigmoid too (cDPO)."},
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
    desirable_weight: float = field(
        default=1.0, metadata={"help": "What desirable answers count in kto, bco and apo_zero_unpaired."}
    )
    undesirable_weight: float = field(default=1.0, metadata={"help": "What undesirable answers count there."})

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
            "choices": list(checks.ON_NAN),
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
        checks.check_unpaired(self)
        checks.check_lengths(self)
        checks.check_tools(self)
        checks.check_reference(self)
        checks.check_schedule(self)
        check_trackers(self.report_to)
        checks.say_what_is_not_used(self)
        checks.choose_precision(self)
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

    @property
    def unpaired(self) -> bool:
        """Whether the loss is one of single answers with a label."""
        return not UNPAIRED_LOSSES.keys().isdisjoint(self.loss_type)

    @property
    def rows_are(self) -> str:
        """What a row of the data is called, in the plural."""
        return "rows" if self.unpaired else "pairs"

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss reads answers under the prompts of other rows."""
        return self.unpaired and UNPAIRED_LOSSES[self.loss_type[0]].shift == "kl"

    def loss_options(self) -> LossOptions | UnpairedOptions:
        """The options of the loss, checked."""
        if self.unpaired and len(self.loss_type) == 1:
            named = {"loss_type": self.loss_type[0], "beta": self.beta}
            return UnpairedOptions(
                **named, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
            )
        return LossOptions(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})
