"""`fastdpo train` on LLaMA-Factory configurations, with its dataset_info.json: real runs of a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo.cli import main
from fastdpo.training.report import metric_files


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
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> Callable[[str], str]:
    """adapter_dir(name): a LoRA of its own over the tiny model, saved; it adds something."""

    def make(name: str) -> str:
        folder = tmp_path_factory.mktemp("adapters") / name
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of so short a run's time, and is tested elsewhere."""
    monkeypatch.setattr(metric_files, "curves_png", lambda *_: b"")


@pytest.fixture
def train(
    tmp_path: Path, shared_data: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """train(text, *arguments): summary.json and stderr of a run on real pairs; two steps, into tmp_path/out."""

    def run(text: str, *arguments: str) -> tuple[dict[str, Any], str]:
        path = tmp_path / "dpo.yaml"
        path.write_text(
            f"### model\nmodel_name_or_path: {model_dir}\n\n### method\nstage: dpo\ndo_train: true\n{text}\n\n"
            f"### dataset\ndataset: dpo_en_demo\ndataset_dir: {shared_data}\ntemplate: default\nmax_samples: 12\n"
            "cutoff_len: 96\noverwrite_cache: true\npreprocessing_num_workers: 1\ndataloader_num_workers: 0\n\n"
            f"### output\noutput_dir: {tmp_path / 'out'}\nlogging_steps: 1\nsave_strategy: 'no'\nplot_loss: true\n\n"
            "### train\nper_device_train_batch_size: 2\nlearning_rate: 1.0e-3\nmax_steps: 2\n"
            "lr_scheduler_type: cosine\nwarmup_ratio: 0.1\n"
        )
        code = main(["train", str(path), *arguments])
        _, err = capsys.readouterr()
        assert code == 0, err
        return json.loads((tmp_path / "out/dpo_metrics/summary.json").read_text()), err

    return run


def test_the_yaml_that_llama_factory_users_have(train: Callable[..., Any], tmp_path: Path, shared_data: Path):
    text = "finetuning_type: lora\nlora_rank: 4\nlora_target: all\npref_beta: 0.2\npref_loss: hinge"
    text += "\nval_size: 0.25\nevaluation_strategy: steps\neval_steps: 2\nper_device_eval_batch_size: 1"
    summary, err = train(text, "pref_loss=ipo", "--max_length", "400")
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (4, 8, 0.0)
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} == set(
        adapter["target_modules"]
    )
    settings = summary["settings"]
    assert (settings["loss_type"], settings["beta"], settings["max_length"]) == (["ipo"], 0.2, 400)
    assert (settings["lr_scheduler_type"], settings["learning_rate"]) == ("cosine", 1e-3)
    assert summary["data"]["pairs_read"] == {"train": 9, "eval": 3}
    history = json.loads((tmp_path / "out/dpo_metrics/log_history.json").read_text())
    first = next(row for row in history if "loss" in row)
    # ipo at the start, where the policy is the reference: (1 / (2 beta))^2; sigmoid would be ln 2
    assert first["loss"] == pytest.approx(6.25, abs=1e-3)
    assert any("eval_loss" in row for row in history)
    # what was taken is said beside what was read
    assert (summary["data"]["max_samples"], summary["data"]["test_split_size"]) == (12, 0.25)
    assert "its defaults hold for lora_dropout 0.0." in err
    assert "FutureWarning" not in err
    assert "reference: the base model of the policy, its adapter switched off" in err


@pytest.mark.usefixtures("no_curves")
def test_its_example_evaluates_on_the_pairs_that_it_trains_on(train: Callable[..., Any]):
    summary, err = train("finetuning_type: full\neval_dataset: dpo_en_demo\neval_strategy: steps\neval_steps: 2")
    assert summary["data"]["pairs_read"] == {"train": 12, "eval": 12}
    assert "dpo_en_demo has no split 'test', its split 'train' is used: the pairs that are trained on" in err


@pytest.mark.usefixtures("no_curves")
def test_full_and_freeze(train: Callable[..., Any], tmp_path: Path, model_dir: str):
    def changed() -> set[str]:
        before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        return {name for name in before if not torch.equal(before[name].float(), after[name].float())}

    _, err = train(
        "finetuning_type: freeze\nfreeze_trainable_layers: 1\nfreeze_trainable_modules: mlp\nfreeze_extra_modules: norm"
    )
    mlp = {f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert changed() == mlp | {"model.norm.weight"}
    assert "freeze: 6176 parameters are trained, in the last 1 of 3 layers" in err
    train("finetuning_type: freeze\nfreeze_trainable_layers: -2")
    assert {name.split(".")[2] for name in changed()} == {"0", "1"}
    summary, _ = train("finetuning_type: full")
    assert "model.embed_tokens.weight" in changed()
    assert summary["model"]["trained_as"] == "full"


@pytest.mark.usefixtures("no_curves")
def test_wrong_freeze_names_are_one_sentence(
    train: Callable[..., Any], tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
):
    train("finetuning_type: full")  # writes the file
    path = tmp_path / "dpo.yaml"
    text = path.read_text()
    for keys, sentence in (
        ("freeze_trainable_modules: mlpp", "freeze_trainable_modules names mlpp, and the model has input_layernorm, "),
        (
            "freeze_extra_modules: head",
            "freeze_extra_modules names head, and the model has embed_tokens, lm_head, norm",
        ),
        ("freeze_trainable_layers: 0", "freeze_trainable_layers is 0: give a number of last layers, or of first ones"),
    ):
        path.write_text(text.replace("finetuning_type: full", f"finetuning_type: freeze\n{keys}"))
        assert main(["train", str(path)]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"fastdpo train: error: {sentence}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits.float()


@pytest.mark.usefixtures("no_curves")
def test_an_adapter_goes_on(train: Callable[..., Any], tmp_path: Path, adapter_dir: Callable[[str], str]):
    sft = adapter_dir("sft")
    summary, err = train(f"adapter_name_or_path: {sft}\nlora_rank: 64")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (2, ["q_proj", "v_proj"])
    assert "lora_rank (the adapter goes on with its own)" in err
    assert "the reference is the adapter's start, where LLaMA-Factory takes the base model (ref_model)." in err
    assert "as it was at the start" in summary["reference"]["description"]
    assert summary["model"]["trained_as"] == "lora"


@pytest.mark.usefixtures("no_curves")
def test_an_adapter_is_merged_and_a_fresh_one_trained(
    train: Callable[..., Any],
    tmp_path: Path,
    model_dir: str,
    adapter_dir: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
):
    sft = adapter_dir("sft")
    # a learning rate of 0 leaves the fresh adapter adding nothing: log-probs are those of the merged model
    summary, err = train(
        f"adapter_name_or_path: {sft}\ncreate_new_adapter: true\nlora_rank: 3\nlora_target: k_proj", "learning_rate=0"
    )
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    # the base model alone would be the wrong one
    assert (config["r"], config["base_model_name_or_path"]) == (3, None)
    assert summary["model"]["name_or_path"] == f"{model_dir} with {sft} merged"
    assert f"{sft}: merged into {model_dir} for this run; the model that the new adapter belongs to is what" in err
    assert summary["reference"]["description"] == "the base model of the policy, its adapter switched off"
    assert f"An adapter for `{model_dir} with {sft} merged`" in (tmp_path / "out/README.md").read_text()
    for command in (["merge", "--out", str(tmp_path / "whole")], ["compare", "--prompts", str(tmp_path / "dpo.yaml")]):
        assert main([command[0], str(tmp_path / "out"), *command[1:]]) == 2
        assert capsys.readouterr().err.endswith(
            f"the adapter {tmp_path / 'out'} was trained over {model_dir} with {sft} merged: write that model with "
            f"`fastdpo merge {sft} --out FOLDER`, and give FOLDER as --base\n"
        )
    history = json.loads((tmp_path / "out/dpo_metrics/log_history.json").read_text())
    merged = next(row for row in history if "loss" in row)["logps/chosen"]
    train(f"adapter_name_or_path: {sft}", "learning_rate=0")
    history = json.loads((tmp_path / "out/dpo_metrics/log_history.json").read_text())
    assert merged == pytest.approx(next(row for row in history if "loss" in row)["logps/chosen"], rel=1e-5)
    train("lora_rank: 3", "learning_rate=0")
    history = json.loads((tmp_path / "out/dpo_metrics/log_history.json").read_text())
    assert merged != pytest.approx(next(row for row in history if "loss" in row)["logps/chosen"], rel=1e-5)


@pytest.mark.usefixtures("no_curves")
def test_references(train: Callable[..., Any], tmp_path: Path, model_dir: str, adapter_dir: Callable[[str], str]):
    ours, theirs = adapter_dir("ours"), adapter_dir("theirs")

    def margin_and_reference(text: str) -> tuple[float, str]:
        summary, _ = train(text, "learning_rate=0")
        history = json.loads((tmp_path / "out/dpo_metrics/log_history.json").read_text())
        row = next(row for row in history if "loss" in row)
        return row["rewards/margins"], summary["reference"]["description"]

    # a reference of its own, with an adapter, equals the same adapter beside the trained one
    apart, what = margin_and_reference(
        f"adapter_name_or_path: {ours}\nref_model: {model_dir}\nref_model_adapters: {theirs}"
    )
    assert what == f"the model given as ref_model ({theirs})"
    beside, what = margin_and_reference(f"adapter_name_or_path: {ours}\nref_model_adapters: {theirs}")
    assert what == "the adapter 'reference' of the same model"
    assert not (tmp_path / "out/reference").exists()
    assert apart == pytest.approx(beside, abs=1e-5)
    assert abs(apart) > 1e-3
    fresh, what = margin_and_reference(f"ref_model_adapters: {theirs}\nlora_rank: 2")
    assert what == "the adapter 'reference' of the same model"
    full, what = margin_and_reference(f"finetuning_type: full\nref_model_adapters: {theirs}")
    assert what == f"the model given as ref_model ({theirs})"
    assert fresh == pytest.approx(full, abs=1e-5)
    plain, what = margin_and_reference(f"ref_model: {model_dir}\nlora_rank: 2")
    assert (plain, what) == (0.0, f"the model given as ref_model ({model_dir})")


@pytest.mark.usefixtures("no_curves")
def test_pissa_starts_from_the_base_model_and_is_saved_to_be_read(
    train: Callable[..., Any], tmp_path: Path, model_dir: str
):
    summary, _ = train("pissa_init: true\nlora_rank: 4", "learning_rate=0")
    assert "as it was at the start" in summary["reference"]["description"]
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = logits(base)
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "out")
    assert torch.allclose(logits(read), expected, atol=1e-5)
