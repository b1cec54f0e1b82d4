"""`fastdpo merge`: the merged folder computes what base and adapter compute, and nothing is left where it does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo.cli.merge import main
from fastdpo.runs import merge as merging

IDS = torch.tensor([[5, 77, 300, 4000, 12, 9]])
ALL_LAYERS = ["q_proj", "v_proj", "down_proj"]
Merge = Callable[..., tuple[int, str, str]]


def make_base(folder: Path, data: Path, tied: bool, dtype: torch.dtype = torch.float32) -> str:
    tokenizer = AutoTokenizer.from_pretrained(data / "minimind_tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        # large enough that every part of an adapter moves the logits
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> dict[bool, str]:
    """Folders of a base model by whether its head is tied."""
    folder = tmp_path_factory.mktemp("bases")
    return {tied: make_base(folder / f"tied_{tied}", shared_data, tied) for tied in (False, True)}


def make_adapter(folder: Path, base: str, **options: Any) -> str:
    """An adapter with random weights in all its parts."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **{"target_modules": ALL_LAYERS, **options})
    peft_model = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    peft_model.save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.double()


def with_adapter(base: str, adapter: str) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter))


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Merge:
    def call(*arguments: Any) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize(
    ("tied", "options", "untied"),
    [
        (False, {}, False),
        (True, {}, False),
        (False, {"target_modules": [*ALL_LAYERS, "lm_head"]}, False),
        (True, {"target_modules": [*ALL_LAYERS, "lm_head"]}, True),
        (True, {"target_modules": [*ALL_LAYERS, "embed_tokens"]}, True),
        (True, {"modules_to_save": ["lm_head"]}, True),
        (False, {"modules_to_save": ["embed_tokens"]}, False),
        (True, {"use_dora": True}, False),
        (False, {"use_rslora": True, "bias": "lora_only"}, False),
    ],
    ids=[
        "plain",
        "tied",
        "head",
        "tied head",
        "tied embedding",
        "tied saved head",
        "saved embedding",
        "DoRA",
        "rsLoRA",
    ],
)
def test_the_merged_model_is_base_plus_adapter(
    merge: Merge, bases: dict[bool, str], tmp_path: Path, tied: bool, options: dict[str, Any], untied: bool
):
    base, adapter = bases[tied], make_adapter(tmp_path / "adapter", bases[tied], **options)
    out = tmp_path / "merged"
    code, text, err = merge(adapter, "--out", out, "--json")
    assert code == 0, err
    report = json.loads(text)
    merged = AutoModelForCausalLM.from_pretrained(out)
    expected, plain = with_adapter(base, adapter), logits(AutoModelForCausalLM.from_pretrained(base))
    assert (plain - expected).abs().max() > 0.1
    assert (logits(merged) - expected).abs().max() < 1e-4
    assert report["check"]["difference"] < 1e-5 < report["check"]["adapter_effect"]
    assert report["untied_head"] == untied
    assert merged.config.tie_word_embeddings == (tied and not untied)
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    names = {path.name for path in out.iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt")) or "adapter" in name]
    assert not list(tmp_path.glob(".*"))
    if untied and "embed_tokens" not in options.get("target_modules", []):
        start = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
        assert torch.equal(merged.get_input_embeddings().weight, start)


def test_dtype_and_shards(merge: Merge, bases: dict[bool, str], tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter", bases[False])
    out = tmp_path / "merged"
    out.mkdir()  # an empty folder is as good as none
    code, text, err = merge(adapter, "--out", out, "--dtype", "bfloat16", "--max-shard-size", "500KB")
    assert code == 0, err
    assert "bfloat16" in text
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118 no mapping
    merged = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    expected = with_adapter(bases[False], adapter)
    assert (merged - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_larger_dtype_than_the_base_models_is_merged_in_it(merge: Merge, shared_data: Path, tmp_path: Path):
    base = make_base(tmp_path / "base", shared_data, tied=False, dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    code, _, err = merge(adapter, "--out", tmp_path / "merged", "--dtype", "float32")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(model, adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert (logits(merged) - expected).abs().max() < 1e-4


def test_embeddings_that_were_resized_for_training(merge: Merge, bases: dict[bool, str], tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(bases[False])
    rows = model.config.vocab_size + 3
    model.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=ALL_LAYERS, modules_to_save=["embed_tokens", "lm_head"])
    peft_model = get_peft_model(model, config)
    peft_model.save_pretrained(tmp_path / "adapter")
    code, _, err = merge(tmp_path / "adapter", "--out", tmp_path / "merged")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == rows
    assert (logits(merged) - logits(peft_model)).abs().max() < 1e-4


def test_a_merge_that_went_wrong_leaves_nothing(
    merge: Merge, bases: dict[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter = make_adapter(tmp_path / "adapter", bases[True], target_modules=["lm_head"])
    # without untying, the reload ties head and embedding again, and the adapter is lost
    monkeypatch.setattr(merging, "_untie", lambda model: False)
    code, text, err = merge(adapter, "--out", tmp_path / "deep" / "merged")
    assert (code, text) == (1, "")
    assert err.strip().splitlines()[-1].startswith("fastdpo merge: failed: MergeCheckFailed: the merged model's logits")
    assert "Traceback" not in err
    assert not list((tmp_path / "deep").iterdir())


def test_a_full_disk_leaves_nothing(
    merge: Merge, bases: dict[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter = make_adapter(tmp_path / "adapter", bases[False])

    def full(folder: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "sync_tree", full)
    code, _, err = merge(adapter, "--out", tmp_path / "merged")
    assert code == 1
    assert "merged cannot be written: No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_wrong_input_is_one_sentence(merge: Merge, bases: dict[bool, str], tmp_path: Path):
    adapter = make_adapter(tmp_path / "adapter", bases[False])
    out = tmp_path / "merged"
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    nested = tmp_path / "nested"
    (nested / "dpo_train").mkdir(parents=True)
    (nested / "dpo_train" / "adapter_config.json").write_text("{}")
    pickled, broken, other = (Path(make_adapter(tmp_path / name, bases[False])) for name in ("pickled", "broken", "x"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = json.loads(Path(bases[False], "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    wider = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    LlamaForCausalLM(wider).save_pretrained(tmp_path / "wider")
    for folder in (quantized, tmp_path / "wider"):
        AutoTokenizer.from_pretrained(bases[False]).save_pretrained(folder)
    for arguments, sentence in (
        ([], "ADAPTER is missing"),
        ([adapter], "--out is missing"),
        ([adapter, "--out", full], "exists and is not an empty folder"),
        ([tmp_path / "none", "--out", out], "none does not exist"),
        ([bases[False], "--out", out], "holds a whole model, not an adapter"),
        ([full, "--out", out], "holds no adapter (adapter_config.json)"),
        ([nested, "--out", out], "give one of its sub-folders: dpo_train"),
        ([pickled, "--out", out], "only the pickle file adapter_model.bin, which is not read"),
        ([broken, "--out", out], "broken cannot be read"),
        ([other, "--out", out], "does not say which model it belongs to"),
        ([adapter, "--base", tmp_path / "gone", "--out", out], "gone does not exist"),
        ([adapter, "--base", adapter, "--out", out], "holds an adapter"),
        ([adapter, "--base", tmp_path / "wider", "--out", out], "does not fit the base model"),
        ([adapter, "--out", out, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        ([adapter, "--out", out, "--max_shard_size", "big"], "--max_shard_size should be a size such as 500MB"),
        ([adapter, "--out", out, "--dytpe", "float16"], "did you mean '--dtype'?"),
        ([adapter, adapter, "--out", out], "is one argument too many"),
    ):
        code, text, err = merge(*arguments)
        assert (code, text) == (2, ""), err
        assert sentence in err, err
        assert len(err.strip().splitlines()) == 1, err
        assert not out.exists()
    if not merging.find_spec("bitsandbytes"):
        code, _, err = merge(adapter, "--base", quantized, "--out", out)
        assert code == 2
        assert "is stored quantized, and dequantizing it needs bitsandbytes" in err
    code, _, err = merge(adapter, "--out", full, "--debug")
    assert code == 2
    assert "Traceback" in err
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_tokens_that_an_adapter_trains_alone(merge: Merge, bases: dict[bool, str], tmp_path: Path):
    """The base grows to the adapter's tokenizer before the adapter goes over it: to merge, and to train further."""
    model: Any = AutoModelForCausalLM.from_pretrained(bases[False])
    rows = model.get_input_embeddings().weight.shape[0] + 3
    model.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [rows - 2, rows - 1]},
        task_type="CAUSAL_LM",
    )
    adapter = tmp_path / "adapter"
    get_peft_model(model, config).save_pretrained(adapter)
    written = json.loads((adapter / "adapter_config.json").read_text())
    written["base_model_name_or_path"] = bases[False]
    (adapter / "adapter_config.json").write_text(json.dumps(written))
    report = merging.merge_adapter(str(adapter), str(tmp_path / "merged"), base=bases[False])
    assert report["check"]["difference"] <= report["check"]["tolerance"]
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == rows
    assert merged.config.vocab_size == rows
