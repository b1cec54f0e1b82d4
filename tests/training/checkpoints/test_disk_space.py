"""A disk that cannot hold a run's files is found before the first step."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerState, TrainingArguments

from fastdpo.cli import main
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.files import DiskError, check_writable
from fastdpo.training.checkpoints.disk_space import check_room, checkpoints_to_come, model_size, optimizer_size
from fastdpo.training.checkpoints.folders import checkpoints_by_step
from fastdpo.training.trainer import DPOTrainer

GB = 10**9
SIZES: dict[str, Any] = {"intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}


def make(folder: Path, hidden_size: int = 64, peft: bool = False, **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=hidden_size, eos_token_id=0, **SIZES))
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 11)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )
    args = DPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
            "max_steps": 6,
            "save_steps": 2,
            **options,
        }
    )
    data = Dataset.from_list([{"prompt_ids": [3, 4], "chosen_ids": [5, 0], "rejected_ids": [7, 0]}] * 4)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]) if peft else None
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def free(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(count)))


@pytest.mark.parametrize("peft", [False, True])
def test_the_estimate_is_about_what_a_checkpoint_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"hidden_size": 256, "peft": peft, "max_steps": 1}
    make(tmp_path / "real", **options).train()
    weights = ("*.safetensors", "optimizer.pt")
    files = [path for name in weights for path in (tmp_path / "real" / "checkpoint-1").glob(name)]
    checkpoint = sum(path.stat().st_size for path in files)
    final = sum(path.stat().st_size for path in (tmp_path / "real").glob("*.safetensors"))
    # headers and a zip's directory beside the tensors
    free(monkeypatch, checkpoint + final)
    make(tmp_path / "enough", **options).train()
    assert "free" not in caplog.text
    free(monkeypatch, 0.7 * (checkpoint + final))
    trainer = make(tmp_path / "short", **options)
    with pytest.raises(DiskError, match=r"short has .* free, too little for one checkpoint \(.*\) and the final"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert list((tmp_path / "short").iterdir()) == [], "nothing half written stays"


def test_too_many_checkpoints_are_said_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path / "out")
    model = trainer.model
    one = model_size(model) + optimizer_size(model, "adamw_torch")
    free(monkeypatch, model_size(model) + 2.5 * one)
    trainer.train()
    assert "this run will keep 3 checkpoints" in caplog.text
    assert "give a save_total_limit or a larger save_steps" in caplog.text
    caplog.clear()
    make(tmp_path / "limited", save_total_limit=1).train()
    assert "this run will keep" not in caplog.text


def test_without_checkpoints_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 0)
    trainer = make(tmp_path, save_strategy="no", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("options", "state", "there", "count"),
    [
        ({}, {}, 0, 3),
        ({"save_steps": 4}, {"save_steps": 4}, 0, 2),
        ({"save_total_limit": 1}, {}, 0, 2),
        ({"save_total_limit": 2}, {}, 0, 3),
        ({"save_total_limit": 2}, {"max_steps": 100}, 2, 1),
        ({}, {"global_step": 2}, 1, 2),
        ({}, {"global_step": 6}, 3, 0),
        ({"save_strategy": "epoch"}, {"num_train_epochs": 3}, 0, 3),
        ({"save_strategy": "epoch"}, {"num_train_epochs": 3, "epoch": 1.5}, 0, 2),
    ],
)
def test_how_many_checkpoints_there_will_be(
    tmp_path: Path, options: dict[str, Any], state: dict[str, Any], there: int, count: int
) -> None:
    for number in range(there):
        (tmp_path / f"checkpoint-{number + 1}").mkdir()
    assert len(checkpoints_by_step(tmp_path)) == there
    args = TrainingArguments(
        **{"output_dir": str(tmp_path), "use_cpu": True, "save_strategy": "steps", "save_steps": 2, **options}
    )
    assert checkpoints_to_come(TrainerState(**{"max_steps": 6, "save_steps": 2, **state}), args) == count


def test_sizes_of_adapters_and_optimizers() -> None:
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, tie_word_embeddings=True, **SIZES))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert model_size(model) == 4 * weights
    for name, per_weight in (
        ("adamw_torch_fused", 8.0),
        ("AdamW", 8.0),
        ("paged_adamw_8bit", 2.0),
        ("adamw_torch_4bit", 1.0),
        ("ademamix", 12.0),
        ("lion_32bit", 4.0),
        ("sgd", 0.0),
        ("adafactor", 0.0),
        ("galore_adamw", 0.0),
    ):
        assert optimizer_size(model, name) == per_weight * weights, name
    peft: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    peft.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    one = 4 * 2 * 64 * 4
    assert (model_size(peft), model_size(peft, all_adapters=True)) == (one, one + one // 2)
    assert optimizer_size(peft, "adamw_torch") == 2 * one


def test_the_sentence_has_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 3 * GB)
    with pytest.raises(DiskError) as error:
        check_room("out", final=2 * GB, checkpoint=6 * GB, count=4)
    assert "out has 3 GB free, too little for one checkpoint (6 GB) and the final model (2 GB)" in str(error.value)
    with pytest.raises(DiskError, match=r"too little for the final model \(4 GB\)"):
        check_room("out", final=4 * GB, checkpoint=0, count=0)
    check_room("out", final=2 * GB, checkpoint=6 * GB, count=0)


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_the_command_answers_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    free(monkeypatch, 1000)
    options = ["--output_dir", str(tmp_path / "out"), "--save_strategy", strategy, "--batch_layout", "padded"]
    assert main(["train", "--demo", *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fastdpo train: error: the disk of output_dir {tmp_path / 'out'} has 0.001 MB free")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"output_dir .*file is a file; give a folder"):
        check_writable(tmp_path / "file", "output_dir")
    with pytest.raises(DiskError, match=r"output_dir .*below cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "below", "output_dir")
    with pytest.raises(DiskError, match="cannot be written"):
        make(tmp_path / "file" / "below")
    check_writable(tmp_path / "new" / "folder", "output_dir")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
