"""The tables of docs/coming-from.md, from those of the tools: `python -m fastdpo.cli.train.translations.page`."""

import re
from pathlib import Path

from fastdpo.cli.train.translations.tool import Tool
from fastdpo.cli.train.translations.tools import TOOLS

PAGE = Path(__file__).resolve().parents[4] / "docs" / "coming-from.md"
_SWITCH = "the same; `auto` leaves the choice to fastdpo"
_TRACKER = "`report_to`"
_ONE = "1 alone: start one process for each GPU instead"
_LAYERS = "true alone: name the modules in `target_modules`"
# what the keys become that a table of names cannot say
NOTES: dict[str, dict[str, str]] = {
    "axolotl": {
        "activation_offloading": _SWITCH,
        "adapter": "`lora`: `use_peft`; `qlora`: `load_in_4bit` too",
        "bf16": _SWITCH,
        "bfloat16": "`dtype: bfloat16`",
        "bnb_config_kwargs": "`bnb_4bit_quant_type`, `use_bnb_nested_quant`, `bnb_4bit_quant_storage`",
        "chat_template": "`chatml`, Jinja text or a file: `chat_template`; a model's name: the tokenizer's own",
        "chat_template_jinja": "`chat_template`",
        "context_parallel_size": _ONE,
        "cosine_min_lr_ratio": "`lr_scheduler_type: cosine_with_min_lr` with `min_lr_rate`",
        "datasets": "`datasets`, each with the columns of its `type`",
        "eager_attention": "`attn_implementation: eager`",
        "evals_per_epoch": "`eval_steps`, as a share of all steps",
        "excess_length_strategy": "`on_overlong` (`raise`: `error`)",
        "flash_attention": "`attn_implementation: flash_attention_2`",
        "flex_attention": "`attn_implementation: flex_attention`",
        "float16": "`dtype: float16`",
        "float32": "`dtype: float32`",
        "fsdp": "`fsdp`, its words in one text",
        "gradient_checkpointing": "the same; `offload` is true",
        "lora_target_linear": "`lora_target_modules: all-linear`",
        "optim_args": "the same, a mapping too",
        "orpo_alpha": "`beta`",
        "rl": "`loss_type`: dpo, ipo, orpo, simpo (with `rpo_alpha`, 1 or `cpo_alpha`), kto",
        "saves_per_epoch": "`save_steps`, as a share of all steps",
        "sdp_attention": "`attn_implementation: sdpa`",
        "sequence_parallel_degree": _ONE,
        "special_tokens": "`pad_token`; the others are the tokenizer's own",
        "tensor_parallel_size": _ONE,
        "test_datasets": "`eval_dataset_name` and `dataset_test_split`",
        "tf32": _SWITCH,
        "torch_compile": _SWITCH,
        "trl": "`beta`, `sync_ref_model`, `ref_model_mixup_alpha`, `ref_model_sync_steps`",
        "use_comet": _TRACKER,
        "use_mlflow": _TRACKER,
        "use_swanlab": _TRACKER,
        "use_tensorboard": _TRACKER,
        "use_trackio": _TRACKER,
        "use_wandb": _TRACKER,
        "val_set_size": "`test_split_size`",
        "xformers_attention": "`attn_implementation: sdpa`",
    },
    "alignment-handbook": {
        "auto_insert_empty_system_msg": "false alone: put the system message into the rows",
        "dataset_configs": "`name` of each of `datasets`",
        "dataset_mixer": "`datasets`, each with its share as `rate`",
        "dataset_mixture": "`datasets`, with `weight` as `rate`, and `test_split_size`",
        "dataset_splits": "`split` of `datasets`; one with `test` in its name is evaluated on",
        "use_flash_attention_2": "`attn_implementation: flash_attention_2`",
    },
    "ms-swift": {
        "attn_impl": "`attn_implementation` (`flash_attn`: `flash_attention_2`)",
        "columns": "`columns` of `datasets`",
        "dataset": "`dataset_name`; `#N`: `max_samples`; `:subset`: `name` of `datasets`",
        "deepspeed": "the same; `zero0` to `zero3` and `zero3_offload` have their configurations",
        "lora_bias": "`none` alone: biases are not trained",
        "loss_scale": "`scored_turns`: `default` is all, `last_round` is last",
        "quant_bits": "`load_in_4bit` or `load_in_8bit`",
        "quant_method": "`bnb` alone",
        "rlhf_type": "`loss_type`: dpo, orpo, simpo (with `rpo_alpha`, 1 or `cpo_alpha`), kto, cpo",
        "split_dataset_ratio": "`test_split_size`",
        "target_modules": "`lora_target_modules`",
        "task_type": "`causal_lm` alone",
        "train_type": "as `tuner_type`",
        "truncation_strategy": "`delete`: `on_overlong: drop`; `left`, `right`: `truncation_mode`",
        "tuner_backend": "PEFT's adapters are trained",
        "tuner_type": "`lora`: `use_peft`; `full`: all weights",
        "val_dataset": "`eval_dataset_name`",
    },
    "unsloth": {
        "bias": "`none` alone: biases are not trained",
        "finetune_attention_modules": _LAYERS,
        "finetune_language_layers": _LAYERS,
        "finetune_mlp_modules": _LAYERS,
        "full_finetuning": "all weights, without `use_peft`",
        "load_in_16bit": "weights are not quantized",
        "max_seq_length": "`max_length`, where DPOConfig's is not given",
        "task_type": "`CAUSAL_LM` alone",
        "use_gradient_checkpointing": "`gradient_checkpointing`; `unsloth` is true",
        "use_unsloth": "nothing: there are no patches",
    },
}


def render(tool: Tool) -> str:
    """The section's lists, in Markdown: what each key becomes, what is refused, what has no effect."""
    notes = {**{key: f"`{ours}`" for key, ours in tool.renamed.items()}, **NOTES.get(tool.name, {})}
    rows = [f"| `{key}` | {notes[key]} |" for key in sorted(notes)]
    table = "\n".join(["| key | here |", "|---|---|", *rows])
    fixes: dict[str, list[str]] = {}
    for key, fix in tool.refused.items():
        fixes.setdefault(fix, []).append(key)
    refused = [f"- {fix}: {_names(keys)}" for fix, keys in fixes.items()]
    idle = [f"- {why}: {_names(names.split())}" for why, names in tool.no_effect.items()]
    parts = [table, "Refused, with what to do:", "\n".join(refused), "Without effect:", "\n".join(idle)]
    return "\n\n".join(parts)


def _names(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys))


def with_tables(text: str) -> str:
    """The page with each table between its marks made again."""
    for tool in TOOLS:
        begin, end = f"<!-- {tool.name} -->", f"<!-- end of {tool.name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
        text = pattern.sub(lambda _, t=tool, b=begin, e=end: f"{b}\n\n{render(t)}\n\n{e}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
