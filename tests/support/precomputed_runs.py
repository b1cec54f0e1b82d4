"""Trainers that precompute their reference's log-probs, and what lies on disk of them."""

from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor

import tiny_runs
from fastdpo.data.collate import REFERENCE_COLUMNS
from fastdpo.training.trainer import DPOTrainer
from tiny_runs import lora, model


def adapted(name: str = "default", seed: int = 5, **options: Any) -> PeftModel:
    policy = cast(PeftModel, get_peft_model(model(), lora(**options), adapter_name=name))
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def two_adapters() -> PeftModel:
    policy = cast(PeftModel, get_peft_model(model(), lora(init_lora_weights=False), adapter_name="dpo_train"))
    policy.add_adapter("reference", lora(init_lora_weights=False))
    return policy


def pairs(count: int = 14, seed: int = 1) -> Dataset:
    return tiny_runs.pairs(count, seed, longest=11)


def rows(prompts: list[list[int]], chosen: list[list[int]]) -> Dataset:
    columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": [[7, 0]] * len(prompts)}
    return Dataset.from_dict(columns)


def make(folder: Path, policy: Any = None, **options: Any) -> DPOTrainer:
    usual = {"train_dataset": pairs(), "per_device_eval_batch_size": 3, "precompute_ref_log_probs": True}
    return tiny_runs.make(folder, policy, **{**usual, **options})


def columns(trainer: DPOTrainer) -> dict[str, Tensor]:
    data = cast(Dataset, trainer.train_dataset)
    return {name: torch.tensor(data[name][:]) for name in REFERENCE_COLUMNS}


def shards(folder: Path, name: str = "train") -> list[Path]:
    return sorted((folder / "ref_logps" / name).glob("shard-*"))
