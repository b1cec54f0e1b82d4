"""Recipes of the alignment-handbook, ms-swift's arguments, unsloth's and a YAML of TRL: what they become."""

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.parsing import parse
from fastdpo.cli.train.translations.axolotl_data import read_dataset
from fastdpo.cli.train.translations.handbook import HANDBOOK
from fastdpo.cli.train.translations.tool import translate
from fastdpo.cli.train.values import Argument

SWIFT = {
    "model_name_or_path": "m",
    "use_peft": True,
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": "all-linear",
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "max_length": None,
    "on_overlong": "drop",
    "beta": 0.1,
    "eval_strategy": "no",
}
LORA = {name for name in SWIFT if name.startswith("lora_") or name == "use_peft"}
UNSLOTH_LORA = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture
def values(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """values(text, *arguments): the values of a configuration file."""

    def read(text: str, *arguments: str) -> dict[str, Any]:
        (tmp_path / "run.yaml").write_text(text)
        return parse([str(tmp_path / "run.yaml"), *arguments]).values

    return read


# alignment-handbook


def test_a_mixture_of_weights(values: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture):
    text = """
model_name_or_path: m
torch_dtype: bfloat16
dataset_mixture:
  datasets:
  - {id: a, config: default, split: train_prefs, columns: [chosen, rejected], weight: 1.0}
  - {id: b, weight: 0.25}
  seed: 0
  test_split_size: 2000
"""
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        assert values(text) == {
            "model_name_or_path": "m",
            "dtype": "bfloat16",
            "datasets": [
                {"path": "a", "name": "default", "split": "train_prefs", "columns": ["chosen", "rejected"]},
                {"path": "b", "rate": 0.25},
            ],
            "test_split_size": 2000.0,
        }
    assert caplog.messages[0].endswith("run.yaml is an alignment-handbook configuration.")
    assert caplog.messages[1] == "no effect here: dataset_mixture.seed (the run's seed draws)."
    # the command line goes first
    assert "datasets" not in values(text, "-d", "other.jsonl")
    assert values(text, "--test_split_size", "0.1")["test_split_size"] == 0.1


def test_an_older_mixer(values: Callable[..., dict[str, Any]]):
    text = "model_name_or_path: m\ndataset_mixer:\n  a: 1.0\n  b: 0.5\ndataset_splits: [train_prefs, test_prefs]\n"
    train = [{"path": "a", "split": "train_prefs"}, {"path": "b", "split": "train_prefs", "rate": 0.5}]
    assert values(text) == {"model_name_or_path": "m", "datasets": train}
    assert values(f"{text}eval_strategy: steps\npreprocessing_num_workers: 2\nuse_flash_attention_2: true") == {
        "model_name_or_path": "m",
        "datasets": train,
        "eval_strategy": "steps",
        "eval_dataset_name": "a,b",
        "dataset_test_split": "test_prefs",
        "dataset_num_proc": 2,
        "attn_implementation": "flash_attention_2",
    }


def test_wrong_mixtures(values: Callable[..., dict[str, Any]]):
    with pytest.raises(UsageError, match=r"run\.yaml:1: dataset_mixture\.datasets\[0\]: there is no key 'path'"):
        values("dataset_mixture:\n  datasets:\n  - path: a")
    with pytest.raises(UsageError, match=r"run\.yaml:1: dataset_mixture should have datasets"):
        values("dataset_mixture:\n  a: 1.0")


# ms-swift


@pytest.mark.parametrize(
    ("words", "becomes"),
    [
        ("", {}),
        ("--dataset a b", {"dataset_name": "a,b"}),
        ("--dataset a#500", {"dataset_name": "a", "max_samples": 500}),
        ("--dataset hf::a:sub", {"datasets": [{"path": "a", "name": "sub"}]}),
        ('--dataset a --columns \'{"q": "query"}\'', {"datasets": [{"path": "a", "columns": {"query": "q"}}]}),
        ("--target_modules q_proj v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
        (
            "--torch_dtype bfloat16 --attn_impl flash_attn",
            {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"},
        ),
        ("--truncation_strategy left", {"on_overlong": "truncate", "truncation_mode": "keep_end"}),
        ("--per_device_train_batch_size 3", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 6}),
        ("--quant_bits 4", {"load_in_4bit": True, "use_bnb_nested_quant": True}),
        ("--loss_type sigmoid sft --loss_weights 1 0.5", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        (
            "--split_dataset_ratio 0.01 --eval_steps 50",
            {"test_split_size": 0.01, "eval_strategy": "steps", "eval_steps": 50.0},
        ),
        (
            "--val_dataset c --save_steps 20",
            {"eval_dataset_name": "c", "eval_strategy": "steps", "eval_steps": 20.0, "save_steps": 20.0},
        ),
        ("--use_chat_template true --deepspeed my.json", {"deepspeed": "my.json"}),
    ],
)
def test_arguments_of_ms_swift(words: str, becomes: dict[str, Any]):
    assert parse(shlex.split(f"--rlhf_type dpo --model m {words}")).values == {**SWIFT, **becomes}


@pytest.mark.parametrize(
    ("method", "becomes"),
    [
        ("orpo", {"loss_type": "orpo", "scored_turns": "all"}),
        ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "rpo_alpha": 1.0}),
        ("simpo --cpo_alpha 0", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "rpo_alpha": 0.0}),
        ("cpo", {"loss_type": "cpo"}),
        ("kto --desirable_weight 2", {"loss_type": "kto", "desirable_weight": 2.0}),
    ],
)
def test_methods_of_ms_swift(method: str, becomes: dict[str, Any]):
    assert parse(shlex.split(f"--model m --train_type lora --rlhf_type {method}")).values == {**SWIFT, **becomes}


def test_all_weights_and_an_adapter_of_ms_swift():
    whole = {**{name: value for name, value in SWIFT.items() if name not in LORA}, "learning_rate": 1e-5}
    assert parse(shlex.split("--rlhf_type dpo --model m --tuner_type full --lora_rank 8")).values == whole
    goes_on = {**whole, "learning_rate": 1e-4, "adapter_name_or_path": ["sft"], "ref_adapters": ["sft"]}
    assert parse(shlex.split("--rlhf_type dpo --model m --adapters sft --ref_adapters sft")).values == goes_on


def test_its_deepspeed_configurations_have_names():
    config = parse(shlex.split("--rlhf_type dpo --model m --deepspeed zero3_offload")).values["deepspeed"]
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--rlhf_type grpo", "--rlhf_type is grpo, and fastdpo trains dpo, orpo, simpo, kto, cpo"),
        ("--rlhf_type dpo --tuner_type adalora", "--tuner_type is adalora, which is not supported: use lora or full"),
        ("--rlhf_type dpo --dataset a#5 b", "--dataset: a number of rows (#) should be the same for all datasets"),
        ("--rlhf_type dpo --deepspeed zero9", "--deepspeed is zero9: give zero0 to zero3"),
        ("--rlhf_type dpo --lora_rnk 8", "there is no argument '--lora_rnk'"),
    ],
)
def test_a_wrong_argument_of_ms_swift(words: str, sentence: str):
    with pytest.raises(UsageError) as raised:
        parse(shlex.split(f"--model m {words}"))
    assert str(raised.value).startswith(sentence)


# unsloth


def test_a_notebook_of_unsloth(values: Callable[..., dict[str, Any]]):
    text = "model_name: m\nmax_seq_length: 64\nuse_gradient_checkpointing: unsloth\nrandom_state: 1\nbias: none\n"
    taken = {"model_name_or_path": "m", "max_length": 64, "gradient_checkpointing": True, **UNSLOTH_LORA}
    assert values(text) == {**taken, "load_in_4bit": True}
    assert values(f"{text}load_in_4bit: false\nr: 4\nmax_length: 32") == {
        **taken,
        "load_in_4bit": False,
        "lora_r": 4,
        "max_length": 32,
    }
    whole = {name: value for name, value in taken.items() if name not in UNSLOTH_LORA}
    assert values(f"{text}full_finetuning: true") == {**whole, "load_in_4bit": False}
    with pytest.raises(UsageError, match=r"run\.yaml:6: rope_scaling is not supported: set it in the model's config"):
        values(f"{text}rope_scaling: 2")


# TRL


def test_a_yaml_of_trl(values: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture):
    datasets = "datasets:\n- path: a\n  split: train\n  fraction: 0.5\n- path: b\n  fraction: 0.5\n"
    text = f"model_name_or_path: m\n{datasets}ignore_bias_buffers: true\ntorch_dtype: bfloat16\nstreaming: true\n"
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        taken = values(text)
    assert taken["datasets"][0] == {"path": "a", "split": "train", "fraction": 0.5}
    assert (taken["dtype"], taken["dataset_streaming"]) == ("bfloat16", True)
    assert caplog.messages == ["no effect here: ignore_bias_buffers (a distributed run does not need it)."]
    with pytest.raises(UsageError, match=r"num_processes is not supported: start it with accelerate launch"):
        values("model_name_or_path: m\nnum_processes: 4")


# values of another kind, inside of mappings

OF_ANY_KIND = ("x", 1, [1], {"a": 1}, None, [{"a": 1}], {"a": [1]}, {"prompt_format": 1}, {"role": 1}, {"user": 1})


@pytest.mark.parametrize("value", OF_ANY_KIND, ids=str)
def test_datasets_of_any_kind_are_read_or_answered(value: Any):
    """A sentence or a value, and no traceback."""
    for kind in ("chat_template", "chatml.intel", None):
        for key in ("path", "type", "split", "field_messages", "message_property_mappings", "roles", "shards"):
            try:
                assert isinstance(read_dataset({"path": "a", "type": kind, key: value}, "here", "dpo")[0], dict)
            except UsageError as error:
                assert str(error).startswith("here")  # noqa: PT017 both are right
    mixer = [Argument("dataset_mixer", {"a": value}, "f:1"), Argument("dataset_splits", value, "f:2")]
    mixture = [Argument("dataset_mixture", {"datasets": value}, "f:1")]
    for arguments in (mixer, mixture):
        try:
            assert translate(HANDBOOK, arguments, "f")
        except UsageError as error:
            assert str(error).startswith("f:1")  # noqa: PT017 both are right
