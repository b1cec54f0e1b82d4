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
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Chat template (Jinja text, or a file with it) in place of the tokenizer's own."},
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
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters that get LoRA, for experts that are no modules."}
    )
    lora_task_type: str = field(
        default="CAUSAL_LM", metadata={"help": "The task, as in TRL; there is one.", "choices": ("CAUSAL_LM",)}
    )
    init_lora_weights: bool | str = field(
        default=True, metadata={"help": "PEFT's initialization: true (adds nothing at first), gaussian, pissa, ..."}
    )
    adapter_name_or_path: list[str] | None = field(
        default=None,
        metadata={"help": "Adapter folder that is trained further; of several, all but the last are merged first."},
    )
    create_new_adapter: bool = field(
        default=False, metadata={"help": "Merge all of `adapter_name_or_path`, and train a fresh adapter."}
    )
    freeze_trainable_layers: int | None = field(
        default=None, metadata={"help": "Train only the last N layers; negative: the first N."}
    )
    freeze_trainable_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules of these layers that are trained; unset: all of them."}
    )
    freeze_extra_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules outside of the layers that are trained too, such as norm or lm_head."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the model to 8 bit (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the model to 4 bit (bitsandbytes, QLoRA)."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Type of the 4-bit weights.", "choices": ("nf4", "fp4")}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the 4-bit scales too."})
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Dtype that stores 4-bit weights, for FSDP; unset: uint8."}
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the reference; unset: the starting policy or its base."}
    )
    ref_adapters: list[str] | None = field(
        default=None, metadata={"help": "Adapter folder of the reference, on `ref_model` or the trained base model."}
    )


@dataclass
class DataArguments:
    """Which preference pairs are trained and evaluated on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A file (json, jsonl, csv, parquet), a saved folder, a name in dataset_info.json or on the hub; "
            "several with commas."
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
    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Several datasets, each with path, name, data_dir, data_files, split, columns, fraction (TRL's)."
        },
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read training pairs as they come, with --max_steps (--streaming is the same)."},
    )
    data_scale_rate: float = field(
        default=1.0, metadata={"help": "Share of each training dataset that is taken, at random, in (0, 1]."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Take at most N pairs of each dataset."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Pairs split off for evaluation: a share below 1, or a number of pairs."}
    )
