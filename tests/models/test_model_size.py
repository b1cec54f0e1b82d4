"""Absurd sizes in a config.json are refused by their numbers, before anything is built; honest ones are not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DogeConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
)

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.load import load_policy
from fastdpo.models.saved import load_model
from fastdpo.models.size import check_model_size, check_parts, checked_config

SMALL: Any = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROWS: Any = {**SMALL, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**ROWS),
    "llama, tied": LlamaConfig(**ROWS, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**ROWS, head_dim=8),
    "mixtral": MixtralConfig(**ROWS, num_local_experts=4),
    "gpt2": GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "gptj": GPTJConfig(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=1024, rotary_dim=4),
    "doge": DogeConfig(**ROWS),  # its default names 16,384 experts, and it has none
    "mamba": MambaConfig(**SMALL, hidden_size=16, num_hidden_layers=2, state_size=4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, config in CONFIGS.items():
        found[name] = tmp_path_factory.mktemp("model")
        AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


def changed(folder: Path, to: Path, **fields: Any) -> str:
    """A copy of the folder with other values in its config.json."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **fields}))
    return str(to)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_its_own_size(folders: dict[str, Path], name: str) -> None:
    state = torch.get_rng_state()
    check_model_size(checked_config(str(folders[name])), str(folders[name]))
    # TRL draws an adapter's weights after its own seed: nothing may be drawn on the way
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("llama", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10,000,000, and its weights are 21 tensors"),
        ("llama", {"num_hidden_layers": 10**300}, "num_hidden_layers is a number of 301 digits"),
        ("qwen3", {"num_hidden_layers": 10**10}, "num_hidden_layers is 10,000,000,000, and"),  # a list of its types
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers is -1; give the config.json"),
        ("gpt2", {"n_layer": 10**7}, "n_layer is 10,000,000, and"),
        ("mixtral", {"num_local_experts": 10**7}, "num_local_experts is 10,000,000, and"),
        ("llama", {"extra": {"deeper": {"decoder_layers": 10**6}}}, "decoder_layers is 1,000,000, and"),
        ("llama", {"hidden_size": 10**7}, "makes a model with .* weights, and its files hold .* weights"),
        ("llama", {"vocab_size": 10**12}, "makes a model with .* weights, and its files hold .* weights"),
        ("llama", {"intermediate_size": 10**18}, "cannot be built|makes a model with"),
        ("gpt2", {"n_positions": 10**9}, "makes a model with .* weights, and its files hold .* weights"),
        ("gptj", {"n_positions": 10**9}, "makes a model with tables of .* numbers, and its files hold"),
        ("mamba", {"state_size": 10**8}, "makes a model with .* weights, and its files hold .* weights"),
        ("llama", {"num_attention_heads": 10**9}, "not a multiple of the number of attention heads"),
    ],
)
def test_an_absurd_size_is_refused_at_once(
    folders: dict[str, Path], tmp_path: Path, name: str, fields: dict[str, Any], says: str
) -> None:
    folder = changed(folders[name], tmp_path, **fields)
    began = sum(os.times()[:4])
    with pytest.raises(ValueError, match=says):
        check_model_size(checked_config(folder), folder)
    for load in (load_model, lambda path: load_policy(path, DPOConfig(output_dir=str(tmp_path / "out")))):
        with pytest.raises(ValueError, match=says):
            load(folder)
    assert sum(os.times()[:4]) - began < 5


def test_without_weights_there_is_a_bound_too(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **{**ROWS, "num_hidden_layers": 126})
    config.save_pretrained(tmp_path)
    check_parts(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "num_hidden_layers": 10**7}))
    with pytest.raises(ValueError, match="num_hidden_layers is 10,000,000, and more than 1,000 are not built"):
        check_parts(str(tmp_path))


def test_a_config_that_is_only_a_little_off_gets_the_tensors_name(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["llama"], tmp_path, hidden_size=32)
    with pytest.raises(ValueError, match=r"its weights have \S+ of shape \(.*, and its config.json makes it"):
        load_model(folder)
