"""The command's own arguments: which model, which data. Everything else is a field of DPOConfig.

Names and defaults are TRL's (ModelConfig, ScriptArguments). No heavy import: the table of fields is made from these.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Field(NamedTuple):
    """One argument in the generated table."""

    name: str
    type: str  # what it takes, as alternatives: "float", "list[str] | None", "bool | str | None"
    default: Any
    choices: tuple[str, ...] | None
    group: str
    help: str
    owner: str  # the dataclass that takes it: model, data or dpo
    main: bool  # shown by --help; the others only by --help-all


@dataclass
class ModelArguments:
    """Which model is trained, and how its adapters look."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the model to train; also the reference."}
    )
    model_revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of a hub model.",
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights in memory. Unset: float32 for full training, the checkpoint's with PEFT.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: eager, sdpa, flash_attention_2, ... Unset: transformers' choice."}
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train a LoRA adapter; the reference is the model with the adapter switched off."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(
        default=32,
        metadata={
            "help": "LoRA scale: updates are multiplied by lora_alpha / lora_r.",
        },
    )
    lora_dropout: float = field(
        default=0.05,
        metadata={
            "help": "Dropout in front of the LoRA matrices, 0 to 1.",
        },
    )
    lora_target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get LoRA. Unset: PEFT's choice for the architecture, all-linear where it has none."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA)."}
    )
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA)."})


@dataclass
class DataArguments:
    """Which preference pairs are trained and evaluated on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A file (json, jsonl, csv, parquet), a saved folder, a name in dataset_info.json or on the hub."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on when eval_strategy is not 'no'."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Another file, folder or name to evaluate on."}
    )
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder of LLaMA-Factory's dataset_info.json, which names dataset_name."}
    )
