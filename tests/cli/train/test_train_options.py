"""`fastdpo train` with old names, adapters, quantized weights and minimind's file: what the plain command takes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo.cli import main
from fastdpo.cli.train import checks
from fastdpo.cli.train.command import DEFAULTS, build_peft_config
from fastdpo.cli.train.parsing import UsageError, parse
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.load import load_policy
from fastdpo.training.report import metric_files


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> str:
    """A LoRA of rank 2 over the tiny model, saved without a tokenizer; it adds something."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def minimind_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows as in minimind's dpo.jsonl: whole conversations on both sides."""
    path = tmp_path_factory.mktemp("data") / "dpo.jsonl"
    asked = [{"role": "user", "content": "How do you spell two?"}, {"role": "assistant", "content": "T, w, o."}]
    with path.open("w", encoding="utf-8") as file:
        for number in range(6):
            turns = [*asked, {"role": "user", "content": f"And what is {number} plus one?"}]
            answers = (f"It is {number + 1}.", "I do not know.")
            sides = [[*turns, {"role": "assistant", "content": answer}] for answer in answers]
            file.write(json.dumps({"chosen": sides[0], "rejected": sides[1]}, ensure_ascii=False) + "\n")
    return str(path)


@pytest.fixture
def train(
    tmp_path: Path, minimind_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """train(*arguments): exit code, stderr and summary.json ({} where it failed) of two steps into tmp_path/out."""
    # drawing takes most of so short a run's time, and is tested elsewhere
    monkeypatch.setattr(metric_files, "curves_png", lambda *_: b"")

    def run(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        small = (
            "--max_steps 2 --logging_steps 1 --per_device_train_batch_size 2 --save_strategy no --learning_rate 1e-3"
        )
        code = main(["train", "-d", minimind_file, "--output_dir", str(tmp_path / "out"), *small.split(), *arguments])
        err = capsys.readouterr().err
        summary = tmp_path / "out/dpo_metrics/summary.json"
        return code, err, json.loads(summary.read_text()) if code == 0 else {}

    return run


# old names


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--evaluation_strategy", "steps"], {"eval_strategy": "steps"}),
        (["--warmup-ratio=0.1"], {"warmup_steps": 0.1}),
        (["warmup_ratio=0.1", "--warmup_steps", "0"], {"warmup_steps": 0.1}),
        (["--warmup_ratio", "0.1", "--warmup_steps", "20"], {"warmup_steps": 20.0}),
        (["--group_by_length"], {"train_sampling_strategy": "group_by_length"}),
        (["--group_by_length", "false"], {}),
        (["--no_cuda"], {"use_cpu": True}),
        (["--torch_dtype", "bfloat16"], {"dtype": "bfloat16"}),
        (["--torch_dtype", "bfloat16", "--dtype", "float16"], {"dtype": "float16"}),
        (["--per_gpu_train_batch_size", "3"], {"per_device_train_batch_size": 3}),
        (["--max_target_length", "64"], {"max_completion_length": 64}),
        (["--streaming", "false"], {"dataset_streaming": False}),
        (["--overwrite_output_dir", "--use_peft"], {"use_peft": True}),
        (["--is_encoder_decoder", "none"], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_old_names_are_flags_and_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, argv: list[str], values: dict[str, Any]
):
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        assert parse(argv).values == values
    assert len(caplog.messages) == (0 if "none" in argv else 1)
    path = tmp_path / "run.yaml"
    pairs: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or "=" in word:
            name, _, value = word.removeprefix("--").partition("=")
            pairs.append([name.replace("-", "_"), value or "true"])
        else:
            pairs[-1][1] = word
    path.write_text("".join(f"{name}: {value}\n" for name, value in pairs))
    assert parse([str(path)]).values == values


def test_an_old_name_on_the_command_line_goes_before_todays_in_a_file(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("warmup_steps: 100\neval_strategy: epoch\n")
    arguments = parse([str(path), "warmup_ratio=0.2", "evaluation_strategy=no"]).values
    assert arguments == {"warmup_steps": 0.2, "eval_strategy": "no"}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--warmup_ratio", "2"], "warmup_ratio must be in [0, 1], got 2."),
        (["--warmup_ratio", "abc"], "warmup_ratio must be in [0, 1], got abc."),
        (["--evaluation_strategy", "stepz"], "--evaluation_strategy should be one of no, steps, epoch, got 'stepz'; "),
        (
            ["--is_encoder_decoder"],
            "is_encoder_decoder is True, and fastdpo trains causal language models; leave it out.",
        ),
        (
            ["--template", "qwen"],
            "there is no argument '--template' outside a LLaMA-Factory configuration, which has s",
        ),
        (["--pref_beta", "1"], "there is no argument '--pref_beta': here it is '--beta'"),
        (["--warmup_rato", "0.1"], "there is no argument '--warmup_rato': did you mean '--warmup_steps'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_ones_are_one_sentence(argv: list[str], sentence: str):
    with pytest.raises(UsageError) as caught:
        parse(argv)
    assert str(caught.value).startswith(sentence)


# adapters


def test_an_adapter_folder_as_the_model_is_trained_further(
    train: Callable[..., Any], tmp_path: Path, adapter_dir: str, model_dir: str
):
    code, err, summary = train("-m", adapter_dir)
    assert code == 0, err
    assert summary["model"]["adapter_name_or_path"] == [adapter_dir]
    assert (summary["model"]["name_or_path"], summary["model"]["trained_as"]) == (model_dir, "lora")
    assert "reference: the adapter 'default' as it was at the start" in err
    before = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter_dir).state_dict()
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "out").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".lora_" in name for name in moved)


def test_lora_options_reach_peft():
    argv = ["--use_peft", "--lora_target_modules", "q_proj", "--init_lora_weights", "gaussian", "--lora_r", "3"]
    config = build_peft_config({**DEFAULTS, **parse(argv).values}, "llama")
    # PEFT takes a text for a pattern of whole names, which no module's name would match
    assert (config.target_modules, config.init_lora_weights, config.r) == ({"q_proj"}, "gaussian", 3)
    argv = ["--use_peft", "--lora_target_modules", r".*\.(q|v)_proj", "--init_lora_weights", "false"]
    config = build_peft_config({**DEFAULTS, **parse(argv).values}, "llama")
    assert (config.target_modules, config.init_lora_weights) == (r".*\.(q|v)_proj", False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["-m", "{adapter}", "--use_peft"],
            "--use_peft is about a fresh adapter, and {adapter} goes on being trained as it is: leave it out, or add "
            "--use_peft --create_new_adapter to merge that adapter first",
        ),
        (
            ["-m", "{adapter}", "--lora_r", "8"],
            "--lora_r is about a fresh adapter, and {adapter} goes on being trained",
        ),
        (["-m", "{model}", "--create_new_adapter"], "--create_new_adapter merges an adapter first: name it in --adapt"),
        (
            ["-m", "{adapter}", "--create_new_adapter"],
            "--create_new_adapter trains a fresh adapter: add --use_peft",
        ),
        (
            ["-m", "{model}", "--adapter_name_or_path", "nowhere"],
            "no such adapter: nowhere is no folder with an adapter_config.json",
        ),
        (
            ["-m", "{model}", "--ref_adapters", "{model}"],
            "no such adapter: {model} is no folder with an adapter_config",
        ),
        (["-m", "{model}", "--ref_model", "./gone"], "no such reference: the folder ./gone does not exist"),
        (
            ["-m", "{model}", "--use_peft", "--freeze_trainable_layers", "1"],
            "--freeze_trainable_layers is for training without an adapter: leave it or the adapter out",
        ),
        (
            ["-m", "{model}", "--freeze_trainable_modules", "mlp"],
            "--freeze_trainable_modules is set but --freeze_trainable_layers is not: say how many layers train",
        ),
        (
            ["-m", "{adapter}", "--use_peft", "--create_new_adapter", "--ref_adapters", "{adapter}"],
            "--ref_adapters: this reference is not the trained base model: give that as --ref_model",
        ),
        (
            ["-m", "{model}", "--load_in_4bit"],
            "--load_in_4bit: quantized weights cannot be trained: add --use_peft to ",
        ),
        (
            ["-m", "{model}", "--use_peft", "--load_in_4bit", "--load_in_8bit"],
            "--load_in_4bit and --load_in_8bit exclude each other: give one",
        ),
        (
            ["-m", "{adapter}", "--use_peft", "--create_new_adapter", "--load_in_8bit"],
            "--load_in_8bit: an adapter is not merged into quantized weights: run fastdpo merge first",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    train: Callable[..., Any], model_dir: str, adapter_dir: str, arguments: list[str], sentence: str
):
    names = {"model": model_dir, "adapter": adapter_dir}
    code, err, _ = train(*(argument.format(**names) for argument in arguments))
    assert code == 2
    assert err.strip().splitlines()[-1].startswith(f"fastdpo train: error: {sentence.format(**names)}")


def test_an_adapter_that_names_no_model_or_one_that_is_gone(
    train: Callable[..., Any], tmp_path: Path, adapter_dir: str, model_dir: str
):
    config = json.loads(Path(adapter_dir, "adapter_config.json").read_text())
    folder = tmp_path / "adapter"
    folder.mkdir()
    fix = "give the model as --model_name_or_path, and the adapter as --adapter_name_or_path"
    for base, says in (
        (None, f"the adapter {folder} does not say which model it belongs to: {fix}"),
        ("", f"the adapter {folder} does not say which model it belongs to: {fix}"),
        (
            "/no/such/model",
            f"the adapter {folder} belongs to /no/such/model, and there is no such model: the folder /no/such/model "
            f"does not exist: {fix}",
        ),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        assert train("-m", str(folder))[:2] == (2, f"fastdpo train: error: {says}\n")
    # the fix works
    (folder / "adapter_model.safetensors").write_bytes(Path(adapter_dir, "adapter_model.safetensors").read_bytes())
    code, err, _ = train("-m", model_dir, "--adapter_name_or_path", str(folder))
    assert code == 0, err


# quantized weights


def test_bitsandbytes_that_is_not_installed_is_said_before_anything_loads(
    train: Callable[..., Any], model_dir: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    says = "needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave it out"
    for bits in ("4", "8"):
        code, err, _ = train("-m", model_dir, "--use_peft", f"--load_in_{bits}bit")
        assert (code, err) == (2, f"fastdpo train: error: --load_in_{bits}bit {says}\n")
    path = tmp_path / "dpo.yaml"
    path.write_text(f"stage: dpo\nmodel_name_or_path: {model_dir}\nref_model_quantization_bit: 4\n")
    code, err, _ = train("--config", str(path))
    assert err.strip().splitlines()[-1] == f"fastdpo train: error: {path}:3: ref_model_quantization_bit {says}"


def test_a_quantized_model_trains_an_adapter(train: Callable[..., Any], model_dir: str, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quant`)")
    code, err, summary = train("-m", model_dir, "--use_peft", "--lora_r=4", "--load_in_4bit", "--use_bnb_nested_quant")
    assert code == 0, err
    assert summary["model"]["load_in_4bit"] is True
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    path = tmp_path / "dpo.yaml"
    path.write_text(
        f"stage: dpo\nmodel_name_or_path: {model_dir}\nquantization_bit: 8\nref_model: {model_dir}\n"
        "ref_model_quantization_bit: 4\nlora_rank: 2\n"
    )
    code, err, summary = train("--config", str(path))
    assert code == 0, err
    assert summary["reference"]["description"] == f"the model given as ref_model ({model_dir})"


def test_quantized_weights_keep_their_gradient_after_a_pass_without(model_dir: str):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quant`)")
    args = DPOConfig(use_cpu=True)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    ids = torch.arange(30).view(2, 15)

    def gradients(dequantized: bool) -> list[torch.Tensor]:
        model: Any = load_policy(model_dir, args, quantization_config=config)
        model = model.dequantize() if dequantized else model
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        with torch.no_grad():
            model.eval()(ids)  # as a reference's pass or an evaluation
        model.train()(ids).logits.log_softmax(-1)[..., 3].sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for gradient, expected in zip(gradients(False), gradients(True), strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()


# minimind's file


def test_minimind_rows_are_trained_on(train: Callable[..., Any], model_dir: str):
    code, err, summary = train("-m", model_dir)
    assert code == 0, err
    assert summary["data"]["pairs_read"]["train"] == 6
    assert "6 tokens scored: >>>It is 1.<|im_end|>" in err
    assert summary["first"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    # minimind itself scores the answer in the prompt too
    code, err, all_turns = train("-m", model_dir, "--scored_turns", "all")
    assert code == 0, err
    assert all_turns["first"]["length/chosen"] > summary["first"]["length/chosen"] + 5
