"""Names and values of `fastdpo train`, from the command line and from a config file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli.train.parsing import UsageError, parse


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--learning_rate", "5e-6"], "learning_rate", 5e-6),
        (["--learning-rate=5e-6"], "learning_rate", 5e-6),
        (["learning_rate=5e-6"], "learning_rate", 5e-6),
        (["--use_peft"], "use_peft", True),
        (["--use_peft", "false"], "use_peft", False),
        (["--use-peft", "beta=0.2"], "use_peft", True),
        (["--no_gradient_checkpointing"], "gradient_checkpointing", False),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules=q_proj,v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules", "all-linear"], "lora_target_modules", "all-linear"),
        (["--loss_type", "sigmoid", "ipo", "beta=1"], "loss_type", ["sigmoid", "ipo"]),
        (["--max_length", "none"], "max_length", None),
        (["--report_to", "none"], "report_to", "none"),
        (["--run_name", "lr=3"], "run_name", "lr=3"),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "out/checkpoint-3"], "resume_from_checkpoint", "out/checkpoint-3"),
        (["--lr_scheduler_kwargs", '{"min_lr": 1e-8}'], "lr_scheduler_kwargs", {"min_lr": 1e-8}),
        (["-m", "model"], "model_name_or_path", "model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_have_their_types(argv: list[str], name: str, value: Any):
    read = parse(argv).values[name]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--learnig_rate", "1"], "there is no argument '--learnig_rate': did you mean '--learning_rate'?"),
        (["--lora-rank", "8"], "there is no argument '--lora_rank': here it is '--lora_r'"),
        (["btea=0.1"], "there is no argument '--btea': did you mean '--beta'?"),
        (["--zzzzzz"], "there is no argument '--zzzzzz' (see fastdpo train --help-all)"),
        (["--beta"], "--beta: expected one argument"),
        (["--beta", "abc"], "--beta should be a number (float), got 'abc'"),
        (["--max_steps", "2.5"], "--max_steps should be a whole number (int), got '2.5'"),
        (["--use_peft", "maybe"], "--use_peft should be true or false, got 'maybe'"),
        (
            ["--eval_strategy", "step"],
            "--eval_strategy should be one of no, steps, epoch, got 'step'; did you mean 'steps'?",
        ),
        (["pairs.jsonl"], "'pairs.jsonl' stands alone: arguments are --name value, --name=value or name=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_named_in_one_sentence(
    run: Callable[..., tuple[int, str, str]], argv: list[str], sentence: str
):
    assert run(*argv) == (2, "", f"fastdpo train: error: {sentence}\n")


def test_config_file_with_overrides(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset-name: d\nlearning_rate: 5e-6\nbeta: 5.0e-2\nnum_train_epochs: 1\n"
        "save_strategy: no\nuse_peft: true\nlora_target_modules: [q_proj, v_proj]\nmax_length: null\nrun_name: 7\n"
    )
    for argv in (["--config", str(path), "--beta", "0.3"], ["beta=0.3", f"--config={path}"], [str(path), "beta=0.3"]):
        assert parse(argv).values == {
            "model_name_or_path": "m",
            "dataset_name": "d",
            "learning_rate": 5e-6,
            "beta": 0.3,
            "num_train_epochs": 1.0,
            "save_strategy": "no",
            "use_peft": True,
            "lora_target_modules": ["q_proj", "v_proj"],
            "max_length": None,
            "run_name": "7",
        }
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps({"beta": 0.2, "lr_scheduler_kwargs": {"min_lr": 0}}, indent="\t"))
    assert parse(["--config", str(as_json)]).values == {"beta": 0.2, "lr_scheduler_kwargs": {"min_lr": 0}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("beta: 0.1\nlearnig_rate: 1", "{file}:2: there is no key 'learnig_rate': did you mean 'learning_rate'?"),
        ("debug: true", "{file}:1: 'debug' belongs on the command line, not in a file"),
        ("pref_beta: 0.1", "{file}:1: there is no key 'pref_beta': here it is 'beta'"),
        ("\nlearning_rate: abc", "{file}:2: learning_rate should be a number (float), got 'abc'"),
        ("num_train_epochs: [1]", "{file}:1: num_train_epochs should be a number (float), got [1]"),
        ("max_steps: true", "{file}:1: max_steps should be a whole number (int), got True"),
        ("lora_modules_to_save: 3", "{file}:1: lora_modules_to_save should be a list (list[str]), got 3"),
        ("beta:\n  a: 1", "{file}:1: beta should be a number (float), got {{'a': 1}}"),
        ("learning_rate: null", "{file}:1: learning_rate should be a number (float), got None"),
        ("beta: 1\nbeta: 2", "{file}:2: 'beta' stands twice in this file"),
        ("- beta", "{file} should be 'name: value' lines, got list"),
        ("beta: [1", "{file}:1: not YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_a_wrong_config_file_is_named_with_line_and_key(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        parse(["--config", str(path)])
    assert str(caught.value) == sentence.format(file=path)


def test_a_missing_config_file(run: Callable[..., tuple[int, str, str]]):
    code, _, err = run("--config", "nowhere/run.yaml")
    assert (code, err) == (
        2,
        "fastdpo train: error: --config nowhere/run.yaml cannot be read: No such file or directory\n",
    )


def test_output_dir_none_is_the_default_folder():
    from fastdpo.cli.train.command import build_config

    assert build_config(parse(["--output_dir", "none"])).output_dir == "output"
