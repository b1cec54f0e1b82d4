"""A run of `DPOTrainer` in Python leaves the metric files of a command's run, and the commands take it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.cli import main
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.runs.saved_run import read_run, reference_path
from fastdpo.training.report.metric_files import FILES
from fastdpo.training.trainer import DPOTrainer

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIRS = [{"prompt": "Two and two?", "chosen": f" Four{n * '.'}", "rejected": " Five, I think."} for n in range(5)]
OPTIONS: dict[str, Any] = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "max_steps": 2, "beta": 0.25}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer that knows every text."""
    folder = tmp_path_factory.mktemp("base") / "model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({"</s>": 0, **{letter: i for i, letter in enumerate(letters, start=1)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make(model: Any, out: Path, lora: bool = False, **options: Any) -> DPOTrainer:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    data = Dataset.from_list(PAIRS)
    return DPOTrainer(
        model,
        args=DPOConfig(output_dir=str(out), **{**OPTIONS, **options}),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        peft_config=config if lora else None,
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_commands_take_a_run_in_python(
    base: Path, tmp_path: Path, lora: bool, capsys: pytest.CaptureFixture[str], drawn: None
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    make(str(base), out, lora).train()
    assert sorted(path.name for path in (out / "dpo_metrics").iterdir()) == sorted(FILES)
    summary = json.loads((out / "dpo_metrics/summary.json").read_text())
    wanted: dict[str, Any] = {"name_or_path": str(base), "trained_as": "lora" if lora else "full"}
    if lora:
        wanted |= {"lora_r": 2, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]}
        wanted |= {"use_rslora": False, "use_dora": False}
    assert summary["model"] == wanted
    assert summary["data"]["pairs"] == {"train": 5, "eval": 2}
    assert summary["data"]["tokenized"]["train"]["rows"] == 5
    assert summary["settings"]["beta"] == 0.25
    assert summary["last"]["step"] == summary["steps"] == 2
    described = (
        "the base model of the policy, its adapter switched off" if lora else "a frozen copy of the starting policy"
    )
    assert summary["reference"] == {"kind": "base" if lora else "start", "description": described}

    run = read_run(str(out))
    assert (run.is_adapter, run.base, run.beta) == (lora, str(base), 0.25)
    assert reference_path(run) == (None if lora else str(base))

    capsys.readouterr()
    assert main(["report", str(out), "--out", str(page), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["rewards/margins"] == [summary["last"]["rewards/margins"]]
    assert report["arguments"]["model.name_or_path"] == [str(base)]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Two and two?\n")
    asked = ["compare", str(out), "--prompts", str(prompts), "--raw", "--max_new_tokens", "2", "--device", "cpu"]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["beta"] == 0.25
    if lora:
        assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) == 0
        assert (tmp_path / "merged/model.safetensors").is_file()


def test_a_model_without_a_name_has_none(base: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, **SIZES))
    args = DPOConfig(output_dir=str(tmp_path), loss_type="simpo", **OPTIONS)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    trainer.train()
    summary = json.loads((tmp_path / "dpo_metrics/summary.json").read_text())
    assert summary["model"] == {"name_or_path": None, "trained_as": "full"}
    assert summary["reference"]["kind"] == "none"


def test_an_evaluation_alone_leaves_the_files_of_the_run(base: Path, tmp_path: Path) -> None:
    make(str(base), tmp_path).train()
    before = {name: (tmp_path / "dpo_metrics" / name).read_bytes() for name in FILES}
    later = make(str(tmp_path), tmp_path)
    later.evaluate()
    assert {name: (tmp_path / "dpo_metrics" / name).read_bytes() for name in FILES} == before
    # of a trainer that has trained it belongs to the run
    later.train()
    later.evaluate()
    with open(tmp_path / "dpo_metrics/training_metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["eval_loss"]) > 0
    assert json.loads((tmp_path / "dpo_metrics/summary.json").read_text())["last_eval"]["step"] == 2


def test_an_argument_turns_the_files_off(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(str(base), tmp_path / "python", metric_files=False).train()
    assert not (tmp_path / "python/dpo_metrics").exists()
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "command"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    command = f"train -m {base} -d {pairs} --output_dir {out} --use_cpu --max_steps 1 --metric_files false"
    assert main(command.split()) == 0
    assert "metrics" not in capsys.readouterr().out
    assert not (out / "dpo_metrics").exists()
    assert main(["report", str(out)]) == 2
    assert "training_metrics.csv, which a run writes unless metric_files is off" in capsys.readouterr().err
