"""`fastdpo train` on real pairs and on the demo: what a run says and leaves behind."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIR = {"prompt": "What is two plus two?", "chosen": " Four.", "rejected": " Five, I think."}


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


def small(model_dir: str, file: str, out: Path, *more: str) -> list[str]:
    options = {"max_length": 96, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    options |= {"learning_rate": 1e-3, "save_strategy": "no"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return ["-m", model_dir, "-d", file, "--output_dir", str(out), *flags, *more]


def test_odd_rows_are_counted_and_training_goes_on(
    run: Callable[..., tuple[int, str, str]], write: Callable[..., str], model_dir: str, tmp_path: Path
):
    same = {**PAIR, "rejected": PAIR["chosen"]}
    rows = [PAIR, PAIR, same, {**PAIR, "prompt": "word " * 400}, "not json"]
    file = write("pairs.jsonl", *rows)
    code, out, err = run(*small(model_dir, file, tmp_path / "out", "--skip_bad_rows", "--max_steps=1"))
    assert code == 0, err
    assert "3 pairs" in err
    assert err.count("identical in 1 of 4 rows") == 1, err
    assert any("dropped 1" in line for line in err.splitlines()), err
    assert f"{file}: skipped 1 bad row of 5: {file}:5: broken JSON: Expecting value (column 1)" in err.splitlines(), err
    assert "on 3 pairs" in out
    summary = json.loads((tmp_path / "out/dpo_metrics/summary.json").read_text())
    assert summary["data"]["tokenized"]["train"]["dropped_long_prompt"] == 1
    assert summary["reference"] == {"kind": "start", "description": "a frozen copy of the starting policy"}
    assert f"reference: {summary['reference']['description']}." in err
    assert f"batches: {summary['batches']}." in err


@pytest.fixture(scope="module")
def eight_pairs(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> str:
    """Eight of the real pairs with short prompts, in LLaMA-Factory's form."""
    rows = json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))
    rows = sorted(rows, key=lambda row: sum(len(turn["value"]) for turn in row["conversations"]))[:8]
    path = tmp_path_factory.mktemp("data") / "pairs.json"
    path.write_text(json.dumps(rows))
    return str(path)


def check_files(out: Path, steps: list[str]) -> dict[str, Any]:
    folder = out / "dpo_metrics"
    with open(folder / "training_metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == steps
    assert float(rows[0]["loss"]) == pytest.approx(0.6931, abs=1e-4)
    assert float(rows[-1]["rewards/margins"]) != 0
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "log_history.json").read_text())[0]["step"] == 1
    return json.loads((folder / "summary.json").read_text())


def test_full_fine_tuning_from_a_config_file(
    run: Callable[..., tuple[int, str, str]], model_dir: str, eight_pairs: str, tmp_path: Path, drawn: None
):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {model_dir}\ndataset_name: {eight_pairs}\neval_dataset_name: {eight_pairs}\n"
        "max_length: 96\nmax_steps: 2\nlogging_steps: 1\nper_device_train_batch_size: 2\nlearning_rate: 1.0e-3\n"
    )
    folder = tmp_path / "out"
    code, out, err = run(str(config), f"output_dir={folder}", "--max_steps", "3", "--save_steps", "2")
    assert code == 0, err
    assert out.startswith("trained to step 3 on 8 pairs in ")
    assert f"model and tokenizer: {folder}\n" in out
    assert "held out, step 3: loss " in out
    assert "reference: a frozen copy of the starting policy" in err
    assert ">>>" in err
    assert "step 1/3  loss 0.6931  margin +0.0000" in err
    summary = check_files(folder, ["1", "2", "3"])
    assert (folder / "dpo_metrics/training_curves.png").stat().st_size > 5000
    assert summary["model"]["trained_as"] == "full"
    assert summary["data"]["pairs_read"] == {"train": 8, "eval": 8}
    assert summary["last_eval"]["eval_loss"] < 0.6931
    trained = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(model_dir)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(folder).chat_template

    # the newest checkpoint is of step 3, so resuming trains steps 4 and 5 and keeps the lines before them
    code, _, err = run(
        str(config), f"output_dir={folder}", "--max_steps=5", "--save_steps=2", "--resume_from_checkpoint"
    )
    assert code == 0, err
    check_files(folder, ["1", "2", "3", "4", "5"])


def test_lora(run: Callable[..., tuple[int, str, str]], model_dir: str, eight_pairs: str, tmp_path: Path):
    folder = tmp_path / "out"
    code, out, err = run(*small(model_dir, eight_pairs, folder, "--use_peft", "--lora_r", "4", "--dtype", "bfloat16"))
    assert code == 0, err
    assert f"adapter and tokenizer: {folder}\n" in out
    assert "its adapter switched off" in err
    assert check_files(folder, ["1", "2", "3"])["model"]["lora_r"] == 4
    assert not (folder / "model.safetensors").exists()
    made = small(model_dir, eight_pairs, folder, "--save_strategy=steps", "--save_steps=3")
    assert run(*made, "--use_peft", "--lora_r", "4")[0] == 0
    for resume in ("true", str(folder / "checkpoint-3")):
        code, _, err = run(*made, "--resume_from_checkpoint", resume)
        assert code == 2
        assert last_line(err).startswith(f"fastdpo train: error: cannot resume from {folder / 'checkpoint-3'}: it is a")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    adapted = PeftModel.from_pretrained(base, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    changed = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert changed
    assert any(p.abs().max() > 0 for p in changed)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_demo_changes_what_the_model_prefers(run: Callable[..., tuple[int, str, str]], tmp_path: Path):
    from fastdpo.demo import SAMPLE_PROMPTS

    folder = tmp_path / "out"
    code, out, err = run("--demo", "--output_dir", str(folder))
    assert code == 0, err
    summary = json.loads((folder / "dpo_metrics/summary.json").read_text())
    before, after = summary["demo"]["held_out"]["before"], summary["demo"]["held_out"]["after"]
    assert 0.4 < before["accuracy"] < 0.6
    assert after["accuracy"] > 0.9
    assert after["rewards_margin"] > 0.1
    # the table's numbers come from the model's logits, the report's from the trainer: two ways to one value
    assert after["rewards_margin"] == pytest.approx(summary["last_eval"]["eval_rewards/margins"], abs=1e-4)
    assert f"{before['accuracy']:.0%}" in out
    assert len(SAMPLE_PROMPTS) >= 2
    assert all(f"question: {prompt}\n  before: " in out for prompt in SAMPLE_PROMPTS)
    assert any(answer["before"] != answer["after"] for answer in summary["demo"]["answers"])
    steps = [row["step"] for row in csv.DictReader((folder / "dpo_metrics/training_metrics.csv").open())]
    assert steps == [str(step) for step in range(5, 101, 5)]
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


def test_the_demo_takes_no_model_or_data(run: Callable[..., tuple[int, str, str]]):
    code, _, err = run("--demo", "-d", "pairs.jsonl")
    assert (code, err) == (
        2,
        "fastdpo train: error: --demo brings its own model and pairs: leave out --dataset_name, or --demo\n",
    )
