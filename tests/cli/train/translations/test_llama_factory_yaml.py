"""`fastdpo train` on LLaMA-Factory configurations: what each key becomes, and what is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli.train.parsing import UsageError, parse
from fastdpo.cli.train.translations.llama_factory import LLAMA_FACTORY

ALWAYS = {"max_length": 2048, "learning_rate": 5e-5}
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}


@pytest.fixture
def values(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """values(text, *arguments): the arguments of a configuration that says stage: dpo and `text`."""

    def read(text: str, *arguments: str) -> dict[str, Any]:
        path = tmp_path / "dpo.yaml"
        path.write_text(f"stage: dpo\n{text}\n")
        return parse([str(path), *arguments]).values

    return read


# what each key becomes


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("pref_beta: 0.3", {"beta": 0.3}),
        ("pref_loss: ipo", {"loss_type": "ipo"}),
        ("pref_loss: kto_pair\npref_ftx: 0.2", {"loss_type": "kto_pair", "pref_ftx": 0.2}),
        ("pref_bco_weight: 0", {}),
        ("pref_bco_weight: 1.0", {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.5, 0.5]}),
        (
            "pref_loss: hinge\npref_bco_weight: 3",
            {"loss_type": ["hinge", "bco_pair"], "loss_weights": [0.25, 0.75]},
        ),
        ("pref_loss: simpo\npref_bco_weight: 3\nsimpo_gamma: 1", {"loss_type": "simpo", "simpo_gamma": 1.0}),
        ("dpo_label_smoothing: 0.1\nld_alpha: 0.5", {"label_smoothing": 0.1, "ld_alpha": 0.5}),
        ("cutoff_len: 512", {"max_length": 512}),
        ("lora_rank: 64", {"lora_r": 64, "lora_alpha": 128}),
        ("lora_rank: 4\nlora_alpha: 4\nlora_dropout: 0.1", {"lora_r": 4, "lora_alpha": 4, "lora_dropout": 0.1}),
        ("lora_target: all", {"lora_target_modules": "all-linear"}),
        ("lora_target: q_proj, v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("lora_target: q_proj", {"lora_target_modules": ["q_proj"]}),
        ("additional_target: embed_tokens,lm_head", {"lora_modules_to_save": ["embed_tokens", "lm_head"]}),
        ("use_rslora: true\nuse_dora: true", {"use_rslora": True, "use_dora": True}),
        ("pissa_init: true\npissa_iter: 16", {"init_lora_weights": "pissa"}),
        ("ref_model: base", {"ref_model": "base"}),
        ("ref_model: base\nref_model_adapters: a,b", {"ref_model": "base", "ref_adapters": ["a", "b"]}),
        (
            "ref_model_quantization_bit: 8",
            {"ref_model_init_kwargs": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}},
        ),
        (
            "adapter_name_or_path: a,b\ncreate_new_adapter: true",
            {"adapter_name_or_path": ["a", "b"], "create_new_adapter": True},
        ),
        ("dataset: x, y", {"dataset_name": "x, y", "dataset_dir": "data"}),
        ("dataset: [x, y]\ndataset_dir: d", {"dataset_name": "x,y", "dataset_dir": "d"}),
        ("dataset: x\ndataset_dir: ONLINE", {"dataset_name": "x", "dataset_dir": None}),
        ("eval_dataset: z", {"eval_dataset_name": "z"}),
        ("val_size: 0.1", {"test_split_size": 0.1}),
        ("val_size: 50", {"test_split_size": 50.0}),
        ("val_size: 0.0\neval_dataset: z", {"eval_dataset_name": "z"}),
        ("max_samples: 1000", {"max_samples": 1000}),
        ("preprocessing_num_workers: 16", {"dataset_num_proc": 16}),
        ("mask_history: true", {"scored_turns": "last"}),
        ("moe_aux_loss_coef: 0.01", {"router_aux_loss_coef": 0.01}),
        ("flash_attn: auto", {"attn_implementation": None}),
        ("flash_attn: fa2", {"attn_implementation": "flash_attention_2"}),
        ("flash_attn: disabled", {"attn_implementation": "eager"}),
        ("enable_liger_kernel: true", {"use_liger_kernel": True}),
        ("disable_gradient_checkpointing: true", {"gradient_checkpointing": False}),
        ("disable_shuffling: true", {"train_sampling_strategy": "sequential"}),
        ("pure_bf16: true", {"dtype": "bfloat16"}),
        ("quantization_bit: 4", {"load_in_4bit": True, "use_bnb_nested_quant": True}),
        (
            "quantization_bit: 4\nquantization_type: fp4\ndouble_quantization: false\nquantization_method: bnb",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": False},
        ),
        ("use_swanlab: true\nreport_to: none", {"report_to": ["swanlab"]}),
        ("use_swanlab: true\nreport_to: [wandb]", {"report_to": ["wandb", "swanlab"]}),
        ("warmup_ratio: 0.1\nwarmup_steps: 0", {"warmup_steps": 0.1}),
        ("evaluation_strategy: steps\neval_steps: 5", {"eval_strategy": "steps", "eval_steps": 5.0}),
        ("bf16: true\nddp_timeout: 180000000\noverwrite_output_dir: true", {"bf16": True, "ddp_timeout": 180000000}),
        ("kto_chosen_weight: 2\nkto_rejected_weight: 3", {}),
        ("precompute_ref_log_probs: true", {"precompute_ref_log_probs": True}),
        ("packing: false\nuse_unsloth: false\nresume_from_checkpoint: null\nlora_alpha: null\nref_model: null", {}),
    ],
)
def test_what_keys_become(values: Callable[..., dict[str, Any]], text: str, becomes: dict[str, Any]):
    assert values(text) == {**ALWAYS, **LORA, **becomes}


def test_a_whole_configuration_with_comments_and_sections(values: Callable[..., dict[str, Any]]):
    text = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid  # choices: [sigmoid (dpo), orpo, simpo]

### dataset
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
    assert values(text) == {
        **LORA,
        "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "trust_remote_code": True,
        "beta": 0.1,
        "loss_type": "sigmoid",
        "dataset_name": "dpo_en_demo",
        "dataset_dir": "data",
        "max_length": 2048,
        "max_samples": 1000,
        "dataset_num_proc": 16,
        "dataloader_num_workers": 4,
        "output_dir": "saves/llama3-8b/lora/dpo",
        "logging_steps": 10.0,
        "save_steps": 500.0,
        "save_only_model": False,
        "report_to": "none",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 5e-6,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "bf16": True,
        "ddp_timeout": 180000000,
    }


def test_a_method_other_than_a_fresh_lora(values: Callable[..., dict[str, Any]]):
    assert values("finetuning_type: full\nlora_rank: 64") == ALWAYS
    assert values("finetuning_type: freeze") == {**ALWAYS, "freeze_trainable_layers": 2}
    arguments = values("finetuning_type: freeze\nfreeze_trainable_layers: -3\nfreeze_trainable_modules: self_attn,mlp")
    assert arguments["freeze_trainable_layers"] == -3
    assert arguments["freeze_trainable_modules"] == ["self_attn", "mlp"]
    # an adapter that goes on has its own rank and targets
    arguments = values("finetuning_type: lora\nadapter_name_or_path: sft\nlora_rank: 64\nlora_target: all")
    assert arguments == {**ALWAYS, "adapter_name_or_path": ["sft"]}


def test_the_command_line_goes_before_the_file_under_either_name(values: Callable[..., dict[str, Any]]):
    text = "pref_beta: 0.1\nlora_rank: 8\ncutoff_len: 512\nref_model: base"
    arguments = values(text, "pref_beta=0.2", "lora_rank=16", "--max_length", "64", "ref_model=null")
    lora = {**LORA, "lora_r": 16, "lora_alpha": 32}
    assert arguments == {**ALWAYS, **lora, "beta": 0.2, "max_length": 64, "ref_model": None}
    assert values(text, "--beta", "0.4", "--max_length=none")["max_length"] is None
    assert values(text, "--beta", "0.4")["beta"] == 0.4
    arguments = values("pref_bco_weight: 1", "--loss_type", "hinge")
    assert (arguments["loss_type"], arguments["loss_weights"]) == (["hinge", "bco_pair"], [0.5, 0.5])
    # without a file, as LLaMA-Factory's own command takes them
    assert parse(["--stage", "dpo", "--pref_beta", "0.4", "--lora_target", "q_proj,v_proj"]).values == {
        **ALWAYS,
        **LORA,
        "beta": 0.4,
        "lora_target_modules": ["q_proj", "v_proj"],
    }


def test_a_file_in_place_of_a_name_needs_no_dataset_info(
    values: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}")
    for arguments in (["dataset=pairs.jsonl"], ["-d", "pairs.jsonl, pairs.jsonl"]):
        assert "dataset_dir" not in values("dataset: x", *arguments)
    assert values("dataset: x", "dataset=pairs.jsonl,y")["dataset_dir"] == "data"
    assert values("dataset: pairs.jsonl\neval_dataset: z")["dataset_dir"] == "data"
    assert values("dataset: x\ndataset_dir: d", "dataset=pairs.jsonl")["dataset_dir"] == "d"


def test_one_log_line_says_the_defaults_and_one_what_has_no_effect(
    values: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        values("template: qwen\nplot_loss: true\noverwrite_cache: true\nexport_dir: out\ndo_sample: true\nlora_rank: 4")
    first, second = caplog.messages
    assert first.endswith(
        "dpo.yaml is a LLaMA-Factory configuration; its defaults hold for cutoff_len 2048, learning_rate 5e-05, "
        "lora_dropout 0.0, lora_target_modules all-linear."
    )
    assert second == (
        "no effect here: template (the tokenizer's own template is used), plot_loss (curves are drawn for every run), "
        "overwrite_cache (nothing is cached), export_dir (it belongs to `fastdpo merge`), do_sample (it belongs to "
        "inference)."
    )


@pytest.mark.parametrize("name", sorted(LLAMA_FACTORY.why_not))
def test_what_has_no_effect_is_said_only_where_it_asks_for_something(
    values: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture, name: str
):
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        assert values(f"{name}: true") == {**ALWAYS, **LORA}
        assert caplog.messages[1] == f"no effect here: {name} ({LLAMA_FACTORY.why_not[name]})."
        caplog.clear()
        values(f"{name}: false")
        assert len(caplog.messages) == 1


# what is refused


@pytest.mark.parametrize("name", sorted(LLAMA_FACTORY.refused))
def test_what_would_change_training_and_is_not_built_is_refused(values: Callable[..., dict[str, Any]], name: str):
    assert values(f"{name}: false") == {**ALWAYS, **LORA}
    with pytest.raises(UsageError, match=rf"dpo\.yaml:2: {name} is not supported: "):
        values(f"{name}: 3")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("do_train: false", "{file}:2: do_train is false, and `fastdpo train` trains: set it to true"),
        ("finetuning_type: oft", "{file}:2: finetuning_type is oft, which is not supported: use lora, freeze or full"),
        (
            "finetuning_type: lore",
            "{file}:2: finetuning_type should be one of lora, full, freeze, oft, got 'lore'; did you mean 'lora'?",
        ),
        ("pref_beta: high", "{file}:2: pref_beta should be a number (float), got 'high'"),
        ("quantization_bit: 3", "{file}:2: quantization_bit should be 4 or 8, got 3"),
        (
            "quantization_method: hqq",
            "{file}:2: quantization_method is hqq, and bitsandbytes (bnb) is what models are quantized with",
        ),
        (
            "val_size: 0.1\neval_dataset: z",
            "{file}:2: val_size and eval_dataset both name pairs to evaluate on: give one",
        ),
        (
            "finetuning_type: full\nadapter_name_or_path: a",
            "{file}:3: adapter_name_or_path goes with finetuning_type lora, got full: merge the adapter first",
        ),
        ("pref_beta: 0.1\nbeta: 0.1", "{file}:3: beta and pref_beta are the same argument: give one"),
        (
            "max_length: 512",
            "{file}:2: max_length is a length of generation in LLaMA-Factory: write cutoff_len for training",
        ),
        ("lora_rnk: 8", "{file}:2: there is no key 'lora_rnk': did you mean 'lora_rank'?"),
        ("zzzzzz: 8", "{file}:2: there is no key 'zzzzzz', neither LLaMA-Factory's nor fastdpo's"),
        ("mix_strategy: interleave_under", "{file}:2: mix_strategy is interleave_under: datasets are put together "),
        ("pref_bco_weight: -1", "{file}:2: pref_bco_weight should be a number of 0 or more, got -1.0"),
        ("dataset_dir: 'REMOTE:a/b'", "{file}:2: dataset_dir is REMOTE:a/b: download that folder, and give its path"),
        ("flash_attn: fa9", "{file}:2: flash_attn should be one of auto, disabled, sdpa, fa2, fa3, got 'fa9'; did you"),
    ],
)
def test_a_wrong_key_is_one_sentence_with_file_and_line(
    values: Callable[..., dict[str, Any]], tmp_path: Path, text: str, sentence: str
):
    with pytest.raises(UsageError) as caught:
        values(text)
    assert str(caught.value).startswith(sentence.format(file=tmp_path / "dpo.yaml"))


def test_another_stage_is_refused_and_a_file_of_ours_stays_ours(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nstage: sft\n")
    with pytest.raises(UsageError, match=r"run.yaml:2: stage is sft, and fastdpo trains dpo: set it to dpo, or use l"):
        parse([str(path)])
    path.write_text("stage: kto\nkto_chosen_weight: 2\n")
    assert parse([str(path)]).values == {**ALWAYS, **LORA, "loss_type": "kto", "desirable_weight": 2.0}
    path.write_text("beta: 0.1\ncutoff_len: 512\nlora_rank: 8\n")
    with pytest.raises(UsageError, match=r"run.yaml:2: there is no key 'cutoff_len': here it is 'max_length'"):
        parse([str(path)])
    path.write_text("beta: 0.1\ntemplate: qwen\n")
    with pytest.raises(UsageError, match=r"'template' outside a LLaMA-Factory configuration, which has stage: dpo"):
        parse([str(path)])
    path.write_text("pref_beta: 0.1\ncutoff_len: 512\n")
    assert parse([str(path)]).values == {**ALWAYS, **LORA, "beta": 0.1, "max_length": 512}
