"""What `fastdpo train` finds wrong with models and data before it trains, in one sentence each."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

PAIR = {"prompt": "What is two plus two?", "chosen": " Four.", "rejected": " Five, I think."}


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


@pytest.fixture
def no_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input must be found before any weight is read."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_missing_model_and_data(run: Callable[..., tuple[int, str, str]], model_dir: str, tmp_path: Path):
    code, _, err = run("-d", "pairs.jsonl")
    assert code == 2
    assert err.startswith("fastdpo train: error: --model_name_or_path (-m) is missing: ")
    code, _, err = run("-m", model_dir)
    assert code == 2
    assert err.startswith("fastdpo train: error: --dataset_name (-d) is missing: ")
    code, _, err = run("-m", "./no/such/model", "-d", "x")
    assert (code, err) == (2, "fastdpo train: error: no such model: the folder ./no/such/model does not exist\n")
    code, _, err = run("-m", str(tmp_path), "-d", "x")
    assert (code, err) == (2, f"fastdpo train: error: no such model: the folder {tmp_path} holds no config.json\n")
    code, _, err = run("-m", model_dir, "-d", "x", "--lora_r", "8")
    assert (code, err) == (
        2,
        "fastdpo train: error: --lora_r is set but --use_peft is not: add --use_peft to train a LoRA adapter\n",
    )


def test_a_name_that_is_no_model(run: Callable[..., tuple[int, str, str]], write: Callable[..., str], tmp_path: Path):
    code, out, err = run("-m", "no-such-model-here", "-d", write("p.jsonl", PAIR), "--output_dir", str(tmp_path / "o"))
    assert (code, out) == (2, "")
    assert last_line(err) == (
        "fastdpo train: error: no such model: no-such-model-here is neither a folder with a config.json nor a model "
        "that can be read from the hub"
    )
    assert "Traceback" not in err


@pytest.mark.usefixtures("no_model_loads")
@pytest.mark.parametrize(
    ("rows", "mentions"),
    [
        ([PAIR, '{"prompt": "a", "chosen": ', PAIR], ["{file}:2"]),
        (
            [PAIR, {"prompt": "a", "chosen": "b"}, {"prompt": "a", "rejected": "b"}],
            ["{file}:2", "rejected", "{file}:3"],
        ),
        ([PAIR, {**PAIR, "chosen": ""}], ["{file}:2", "chosen"]),
        ([PAIR, {**PAIR, "rejected": None}], ["{file}:2", "rejected"]),
        ([], ["{file}"]),
        ([{**PAIR, "prompt": "word " * 400}], ["max_length"]),
    ],
    ids=["broken line", "missing column", "empty completion", "null", "empty file", "all rows dropped"],
)
def test_bad_data_is_listed_before_the_model_loads(
    run: Callable[..., tuple[int, str, str]],
    write: Callable[..., str],
    model_dir: str,
    tmp_path: Path,
    rows: list[Any],
    mentions: list[str],
):
    file = write("pairs.jsonl", *rows)
    code, out, err = run("-m", model_dir, "-d", file, "--output_dir", str(tmp_path / "out"), "--max_length", "128")
    assert (code, out) == (2, "")
    message = err[err.index("fastdpo train: error: ") :]
    for text in mentions:
        assert text.format(file=file) in message
    assert "Traceback" not in err


@pytest.mark.usefixtures("no_model_loads")
def test_data_and_folders_that_are_not_there(
    run: Callable[..., tuple[int, str, str]], write: Callable[..., str], model_dir: str, tmp_path: Path
):
    out = ["--output_dir", str(tmp_path / "out")]
    code, _, err = run("-m", model_dir, "-d", "./nowhere.jsonl", *out)
    assert code == 2
    assert last_line(err).startswith("fastdpo train: error: ./nowhere.jsonl does not exist")
    file = write("p.jsonl", PAIR)
    code, _, err = run("-m", model_dir, "-d", file, "--output_dir", file)
    assert (code, last_line(err)) == (2, f"fastdpo train: error: --output_dir {file} is a file; give a folder")
    code, _, err = run("-m", model_dir, "-d", file, *out, "--eval_strategy", "epoch")
    assert code == 2
    assert last_line(err).startswith(
        "fastdpo train: error: eval_strategy is 'epoch' and there are no pairs to evaluate"
    )
    code, _, err = run("-m", model_dir, "-d", file, *out, "--beta", "-1")
    assert code == 2
    assert "beta" in last_line(err)
    code, _, err = run("-m", model_dir, "-d", file, *out, "--resume_from_checkpoint", "gone/checkpoint-3")
    assert (code, last_line(err)) == (
        2,
        "fastdpo train: error: --resume_from_checkpoint: there is no checkpoint folder gone/checkpoint-3",
    )


def test_debug_shows_the_traceback(run: Callable[..., tuple[int, str, str]]):
    code, _, err = run("--beta", "abc", "--debug")
    assert code == 2
    assert err.startswith("Traceback (most recent call last):")
    assert last_line(err) == "fastdpo train: error: --beta should be a number (float), got 'abc'"


def test_a_failure_of_the_program_is_not_blamed_on_the_input(
    run: Callable[..., tuple[int, str, str]],
    write: Callable[..., str],
    model_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    from fastdpo.training.trainer import DPOTrainer

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("shapes\ndo not match")

    monkeypatch.setattr(DPOTrainer, "compute_loss", broken)
    code, _, err = run("-m", model_dir, "-d", write("p.jsonl", PAIR), "--output_dir", str(tmp_path / "out"))
    assert code == 1
    assert last_line(err) == ("fastdpo train: failed: ValueError: shapes do not match (--debug shows the traceback)")
    assert "Traceback" not in err


def test_a_model_folder_that_cannot_be_read(
    run: Callable[..., tuple[int, str, str]], write: Callable[..., str], model_dir: str, tmp_path: Path
):
    arguments = ["-d", write("p.jsonl", PAIR), "--output_dir", str(tmp_path / "out")]

    def answer(damage: Callable[[Path], Any]) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model_dir, folder)
        damage(folder)
        code, _, err = run("-m", str(folder), *arguments)
        assert code == 2, err
        assert "Traceback" not in err
        return last_line(err)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    def without_tokenizer(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                path.unlink()

    name = tmp_path / "model"
    sentence = answer(lambda folder: cut(folder / "config.json"))
    assert sentence.startswith(f"fastdpo train: error: the config.json of the model {name} is not readable: ")
    for damage in (without_tokenizer, lambda folder: cut(folder / "tokenizer.json")):
        sentence = answer(damage)
        assert sentence.startswith(f"fastdpo train: error: the model {name} has no tokenizer that can be read: ")
    sentence = answer(lambda folder: cut(folder / "model.safetensors"))
    assert sentence.startswith(f"fastdpo train: error: cannot load model '{name}': ")


def test_which_split_is_evaluated(tmp_path: Path, write: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    from datasets import Dataset, DatasetDict

    from fastdpo.cli.train.data import load_eval_dataset

    train, test = Dataset.from_list([PAIR] * 3), Dataset.from_list([PAIR] * 2)
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    common: dict[str, Any] = {"dataset_dir": None, "skip_bad_rows": False}

    def rows(name: str, split: str = "test", train_name: str = "other") -> int:
        option = {"eval_dataset_name": name, "dataset_test_split": split, "dataset_name": train_name}
        return len(load_eval_dataset({**option, "dataset_config": None, "dataset_dir": None}, common))

    assert rows(str(tmp_path / "both")) == 2
    assert rows(str(tmp_path / "both"), split="train") == 3
    assert rows(write("pairs.jsonl", PAIR)) == 1
    assert rows(str(tmp_path / "one")) == 3
    assert "has no split 'test', its split 'train' is used" in capsys.readouterr().err
    # LLaMA-Factory's example evaluates on what it trains on
    assert rows(str(tmp_path / "one"), train_name=str(tmp_path / "one")) == 3
    assert "its split 'train' is used: the pairs that are trained on" in capsys.readouterr().err
    with pytest.raises(ValueError, match="only the split train"):
        rows(str(tmp_path / "one"), split="dev")
