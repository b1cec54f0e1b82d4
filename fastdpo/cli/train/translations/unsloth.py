"""What an unsloth notebook passes (from_pretrained, get_peft_model, DPOConfig) as arguments of `fastdpo train`."""

from typing import Any

from fastdpo.cli.train.translations.tool import OURS, Arguments, Tool, flag, nothing, only, value_of
from fastdpo.cli.train.values import Argument, as_yaml

RENAMED = {
    "hub_path": "hub_model_id",
    "model_name": "model_name_or_path",
    "modules_to_save": "lora_modules_to_save",
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "dataset": "dataset_name",
    "revision": "model_revision",
}
REFUSED = {
    "ensure_weight_tying": "leave it out",
    "finetune_last_n_layers": "give freeze_trainable_layers, without an adapter",
    "layer_replication": "leave it out",
    "layers_pattern": "leave it out",
    "layers_to_transform": "leave it out",
    "load_in_fp8": "give load_in_4bit or load_in_8bit",
    "loftq_config": "leave it out",
    "quantization_config": "give load_in_4bit or load_in_8bit",
    "user_config": "leave it out",
    "qat_scheme": "leave it out",
    "resize_model_vocab": "resize the model's embeddings first, and save it",
    "rope_scaling": "set it in the model's config.json",
    "embedding_learning_rate": "leave it out",
    "packing": "leave it out; packing of preference pairs is an argument of its own (batch_layout)",
    "raw_text_file": "this trains on preferences",
}
NO_EFFECT = {
    "`seed` draws the adapter": "random_state",
    "it changes speed and memory only": "device_map disable_log_stats fast_inference float8_kv_cache "
    "gpu_memory_utilization offload_embedding temporary_location unsloth_tiled_mlp use_exact_model_name fix_tokenizer "
    "float32_mixed_precision fullgraph max_lora_rank return_logits unsloth_force_compile",
    "the environment variable HF_TOKEN is read": "token",
    "the adapter is saved; `fastdpo merge` makes one model": "save_model save_method save_path save_gguf push_model "
    "push_gguf quantization",
    "text models only": "auto_model finetune_audio_layers finetune_vision_layers text_only "
    "whisper_language whisper_task",
    "it cuts texts of another method": "chunk_size stride",
}
DEFAULTS = {"load_in_4bit": True}
LORA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_DEFAULTS = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": list(LORA)}


def _is_one(arguments: Arguments) -> bool:
    """A mark of unsloth's, and another name that it has and we have not."""
    marks = {"use_gradient_checkpointing", "max_seq_length", "random_state", "loftq_config", "full_finetuning"}
    marked = arguments.keys() & marks
    others = arguments.keys() & (UNSLOTH.keys - OURS)
    return bool(marked) and len(others) > 1 and bool({"model_name", "r"} & arguments.keys())


def _gradient_checkpointing(argument: Argument) -> dict[str, Any]:
    return {"gradient_checkpointing": as_yaml(argument.value) not in (False, "")}


def _settle(theirs: Arguments, ours: Arguments, unused: dict[str, str]) -> None:
    """max_seq_length is the model's bound; DPOConfig's max_length, where it is given, cuts the pairs."""
    bound = theirs.get("max_seq_length")
    if bound and "max_length" not in ours:
        ours["max_length"] = bound._replace(name="max_length", given_as="max_seq_length")
    if value_of(theirs, "full_finetuning") or "adapter_name_or_path" in ours:
        ours.setdefault("load_in_4bit", Argument("load_in_4bit", False))
    else:
        ours.setdefault("use_peft", Argument("use_peft", True))
    for name in ("load_in_8bit", "load_in_16bit"):
        if value_of(theirs, name):
            ours.setdefault("load_in_4bit", Argument("load_in_4bit", False))


def _defaults(ours: Arguments) -> dict[str, Any]:
    return {**DEFAULTS, **(LORA_DEFAULTS if "use_peft" in ours else {})}


UNSLOTH = Tool(
    name="unsloth",
    mark="model_name and max_seq_length",
    is_one=_is_one,
    renamed=RENAMED,
    refused=REFUSED,
    no_effect=NO_EFFECT,
    by_code={
        "bias": only("none", fix="leave it out: biases are not trained"),
        "finetune_attention_modules": only(True, fix="name the modules in target_modules"),
        "finetune_language_layers": only(True, fix="name the modules in target_modules"),
        "finetune_mlp_modules": only(True, fix="name the modules in target_modules"),
        "full_finetuning": nothing,
        "load_in_16bit": nothing,
        "max_seq_length": nothing,
        "use_gradient_checkpointing": _gradient_checkpointing,
        "task_type": only("CAUSAL_LM", fix="leave it out"),
        "use_unsloth": flag({}),
    },
    settle=_settle,
    defaults=_defaults,
    several=frozenset({"target_modules", "modules_to_save", "target_parameters"}),
)
