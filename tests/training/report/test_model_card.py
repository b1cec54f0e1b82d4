"""README.md beside a trained model: valid for the hub, true to the run, and nobody's own file is lost."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastdpo
from fastdpo.cli.train.show import command_text
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.report.model_card import on_hub
from fastdpo.training.trainer import DPOTrainer

PAIR = {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 0], "rejected_ids": [7, 0]}


def make(folder: Path, base: str = "org/base-1b", **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, eos_token_id=0, **sizes))
    model.config._name_or_path = model.name_or_path = base
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 11)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )
    peft = options.pop("peft_config", None)
    args = DPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "max_steps": 2,
            **options,
        }
    )
    data = Dataset.from_list([PAIR] * 4)
    return DPOTrainer(
        model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, peft_config=peft
    )


def test_the_card_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "polite-1b"
    options: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.25}
    trainer = make(out, eval_strategy="steps", eval_steps=2, label_smoothing=0.1, **options)
    trainer.card_details = {"data": ["org/pairs", "./local.jsonl"], "command": "fastdpo train -m org/base-1b"}
    trainer.train()
    text = (out / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "base_model": "org/base-1b",
        "datasets": ["org/pairs"],
        "model_name": "polite-1b",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "fastdpo"],
    }
    for line in (
        "# polite-1b",
        "`org/base-1b` fine-tuned, trained on preference pairs",
        "| data | org/pairs, ./local.jsonl |",
        "| pairs | 4 |",
        "| loss | sigmoid + 0.5 x sft |",
        "| beta | 0.25 |",
        "| label_smoothing | 0.1 |",
        f"| reference | {trainer.reference_description} |",
        "| pairs a step | 2 (2 x 1 accumulated x 1 processes) |",
        "|  | training, step 2 | evaluation, step 2 |",
        "```\nfastdpo train -m org/base-1b\n```",
        f"fastdpo {fastdpo.__version__}, torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ):
        assert line in text, line
    loss = trainer.state.log_history[-2]["eval_loss"]
    assert any(row.startswith("| loss | ") and row.endswith(f"| {loss:.4g} |") for row in text.splitlines())


def test_an_adapters_card_replaces_pefts_empty_form(tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = make(tmp_path / "out", base="./a/folder", peft_config=lora)
    trainer.train()
    for _ in range(2):  # what PEFT adds to a card on saving is not piled up
        trainer.save_model()
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.to_dict()["library_name"] == "peft"
    assert "lora" in (card.data.tags or [])
    assert card.data.base_model is None, "the hub refuses a card whose base_model is a path"
    assert "An adapter for `./a/folder`" in text
    assert "Model Card for Model ID" not in text
    assert text.count("# out\n") == 1


def test_arguments_of_trainer_create_model_card(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.create_model_card(
        language="en",
        license="apache-2.0",
        tags=["polite", "dpo"],
        model_name="mine",
        finetuned_from="org/other",
        dataset="org/data",
    )
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["language"] == "en"
    assert data["license"] == "apache-2.0"
    assert data["tags"] == ["dpo", "fastdpo", "polite"]
    assert (data["model_name"], data["base_model"], data["datasets"]) == ("mine", "org/other", ["org/data"])


def test_a_readme_of_ones_own_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    trainer = make(tmp_path)
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert "is not a generated model card, so it is left as it is" in caplog.text


def test_push_to_hub_uploads_a_folder_that_has_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[dict[str, Any]] = []

    def upload_folder(**arguments: Any) -> str:
        arguments["card"] = (Path(arguments["folder_path"]) / "README.md").read_text()
        uploads.append(arguments)
        return "done"

    hub = transformers.trainer
    if hasattr(hub, "hf_api"):
        monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    else:  # an older transformers
        monkeypatch.setattr(hub, "upload_folder", upload_folder)
    trainer = make(tmp_path / "out")
    trainer.hub_model_id = "me/polite"
    trainer.args.hub_model_id = "me/polite"
    trainer.push_to_hub(tags="polite", dataset_name="me/pairs", revision="draft")
    assert len(uploads) == 1
    assert uploads[0]["revision"] == "draft"
    assert "me/pairs" in uploads[0]["card"]
    assert uploads[0]["repo_id"] == "me/polite"
    card = ModelCard(uploads[0]["card"])
    assert card.data.to_dict()["model_name"] == "polite"
    assert set(card.data.tags or []) >= {"dpo", "fastdpo", "polite"}
    assert 'model="me/polite"' in uploads[0]["card"]


def test_names_of_the_hub_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model").mkdir()
    names = {"org/model": True, "gpt2": True, "a/model": False, "./a/b": False, "/abs/path": False, "a/b/c": False}
    assert {name: on_hub(name) for name in names} == names


def test_the_command_has_no_secret_and_no_default() -> None:
    option: dict[str, Any] = {
        "model_name_or_path": "my model",
        "dataset_name": "pairs.jsonl",
        "beta": 0.1,
        "bf16": False,
        "loss_type": ["sigmoid", "sft"],
        "hub_token": "hf_secret",
        "model_init_kwargs": {"token": "hf_secret", "cache_dir": "x"},
        "max_length": None,
    }
    text = command_text(option)
    assert "secret" not in text
    assert "--beta" not in text
    assert text.startswith("fastdpo train '--model_name_or_path=my model' --dataset_name=pairs.jsonl ")
    for word in ("--loss_type sigmoid sft", "--bf16=false", "--max_length=none", json.dumps({"cache_dir": "x"})):
        assert word in text
