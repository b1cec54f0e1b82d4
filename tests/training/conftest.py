"""Real pairs and a tiny model with their tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.fixture(scope="session")
def real_pairs(shared_data: Path) -> Dataset:
    """The shorter of the real pairs, prompts of several turns included, as conversations."""
    rows = json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))
    conversations = [
        {
            "prompt": [{"role": _ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]],
            "chosen": [{"role": "assistant", "content": row["chosen"]["value"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]["value"]}],
        }
        for row in rows
        if sum(len(m["value"]) for m in row["conversations"]) < 600
    ]
    return Dataset.from_list(conversations[:44])


@pytest.fixture(scope="session")
def model_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path, since TRL's trainer reads its reference from one."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "minimind_tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
