"""`fastdpo train`: names and values, one sentence for every bad input, and a real run on real pairs."""

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo.cli import main
from fastdpo.cli.train import fields, generate_fields
from fastdpo.cli.train.parsing import UsageError, parse

ROOT = Path(__file__).resolve().parents[2]

PAIR = {"prompt": "What is two plus two?", "chosen": " Four.", "rejected": " Five, I think."}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster on one thread, above all where other tests want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> str:
    """A tiny random Llama, saved with a real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "minimind_tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, *rows): a jsonl file; a row that is text is written as it is."""

    def to_file(name: str, *rows: Any) -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return to_file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run(*arguments): exit code, stdout and stderr of `fastdpo train`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["train", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


# names and values


def test_help_is_fast_and_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from fastdpo.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    for arguments, shown, hidden in (
        (["--help"], "train", "--beta"),
        (["train", "--help"], "--beta", "--adam_epsilon"),
        (["train", "--help-all"], "--adam_epsilon", "fastdpo train --help-all"),
        (["train", "-m", "x", "-d", "y", "--bta", "1"], "did you mean '--beta'?", "usage"),
    ):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
            times.append(time.perf_counter() - start)
        assert done.returncode == (2 if "--bta" in arguments else 0), done.stderr
        assert shown in done.stdout + done.stderr
        assert hidden not in done.stdout + done.stderr
        assert min(times) < 0.5, f"{arguments}: {times}"


def test_main_help_has_groups_and_every_argument_is_in_help_all(run: Callable[..., tuple[int, str, str]]):
    code, main_help, _ = run("--help")
    assert code == 0
    for group in ("model:", "data:", "DPO:", "training:", "LoRA:", "evaluation:", "output:"):
        assert f"\n{group}\n" in main_help
    code, all_help, _ = run("--help-all")
    assert code == 0
    missing = [field.name for field in fields.FIELDS if f"--{field.name} " not in all_help]
    assert not missing
    assert all(f"--{field.name} " in main_help for field in fields.FIELDS if field.main)


def test_version_and_commands(capsys: pytest.CaptureFixture[str]):
    from fastdpo import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdpo {__version__}\n"
    assert main(["tran"]) == 2
    assert capsys.readouterr().err == "fastdpo: error: there is no command 'tran'; did you mean 'train'?\n"
    assert main([]) == 2


def test_the_table_of_fields_equals_the_dataclasses():
    expected = {field.name: field for field in generate_fields.fields_of_dataclasses()}
    found = {field.name: field for field in fields.FIELDS}
    if transformers.__version__ != fields.TRANSFORMERS:
        # TrainingArguments changes with each release; what fastdpo defines must agree with any of them
        inherited = set(transformers.TrainingArguments.__dataclass_fields__) - set(
            generate_fields.DPOConfig.__annotations__
        )
        expected = {name: field for name, field in expected.items() if name not in inherited}
        found = {name: field for name, field in found.items() if name not in inherited}
    assert found == expected, "run python -m fastdpo.cli.train.generate_fields"
    assert all(field.help for field in found.values())


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
    found = parse(argv).values[name]
    assert found == value
    assert type(found) is type(value)


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


# the config file


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


# what is checked before the model loads


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
    found = answer(lambda folder: cut(folder / "config.json"))
    assert found.startswith(f"fastdpo train: error: the config.json of the model {name} is not readable: ")
    for damage in (without_tokenizer, lambda folder: cut(folder / "tokenizer.json")):
        found = answer(damage)
        assert found.startswith(f"fastdpo train: error: the model {name} has no tokenizer that can be read: ")
    found = answer(lambda folder: cut(folder / "model.safetensors"))
    assert found.startswith(f"fastdpo train: error: cannot load model '{name}': ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is meant")
def test_a_result_that_cannot_be_printed(tmp_path: Path):
    code = (
        "import sys; from fastdpo.cli import main; from fastdpo.cli.train import command; "
        "command.run = lambda request: 'result'; sys.exit(main(['train']))"
    )
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "fastdpo train: failed: training is done and saved, but its result cannot be printed to stdout: "
        "No space left on device\n"
    )


def test_output_dir_none_is_the_default_folder():
    from fastdpo.cli.train.command import build_config

    assert build_config(parse(["--output_dir", "none"])).output_dir == "output"


# real runs


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


# the demo


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
