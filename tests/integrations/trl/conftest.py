"""A model, a batch and TRL's own trainers, for the tests of `patch_trl`; they compare with TRL 1.16."""

import functools
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._device
from datasets import Dataset
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastdpo.demo import demo_paths
from fastdpo.integrations.trl import TrlPatch


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """torch.empty as it is: patched, it escapes the meta device on which models are built before they are loaded."""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    trl = pytest.importorskip("trl")
    if not hasattr(importlib.import_module("trl.trainer.utils"), "_use_triton"):
        pytest.skip(f"TRL 1.16 is what these compare with, {trl.__version__} is installed")
    yield
    left = len(TrlPatch._in_force)
    for handle in list(TrlPatch._in_force):
        handle.undo()
    assert left == 0, "a test left the patch on"


@pytest.fixture(scope="session")
def small_model() -> Callable[..., Any]:
    """A causal LM of one layer and peaked logits: llama, gemma2 (a softcap), cohere or granite (a scale)."""

    def make(kind: str = "llama", **options: Any) -> Any:
        size: dict[str, Any] = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            **options,
        }
        classes = {
            "llama": (LlamaForCausalLM, LlamaConfig),
            "gemma2": (Gemma2ForCausalLM, functools.partial(Gemma2Config, head_dim=8, final_logit_softcapping=3.0)),
            "cohere": (CohereForCausalLM, functools.partial(CohereConfig, logit_scale=0.25)),
            "granite": (GraniteForCausalLM, functools.partial(GraniteConfig, logits_scaling=3.0)),
        }
        model, config = classes[kind]
        torch.manual_seed(0)
        return model(config(**size))

    return make


@pytest.fixture(scope="session")
def batch() -> Callable[..., dict[str, Tensor]]:
    """Three rows of 11 tokens: each with a prompt of 4, the second without a scored token."""

    def make(vocabulary: int = 97) -> dict[str, Tensor]:
        ids = torch.randint(1, vocabulary, (3, 11))
        labels = ids.clone()
        labels[:, :4] = -100
        labels[1] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return make


@functools.cache
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in demo_paths().train.read_text(encoding="utf-8").splitlines()[:40]]


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [len(completion[0]["content"]) / 40 for completion in completions]


def dataset(kind: str) -> Dataset:
    if kind == "kto":
        both = [(row, side) for row in rows() for side in ("chosen", "rejected")]
        return Dataset.from_list(
            [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r, side in both]
        )
    columns = {"dpo": ("prompt", "chosen", "rejected"), "sft": ("prompt", "chosen")}.get(kind, ("prompt",))
    chosen = {"chosen": "completion"} if kind == "sft" else {}
    return Dataset.from_list([{chosen.get(name, name): row[name] for name in columns} for row in rows()])


@pytest.fixture(scope="session")
def trainer_of() -> Callable[..., Any]:
    """TRL's trainer on the demo's model and pairs; on-policy ones generate a few tokens."""

    def make(kind: str, folder: Path, model: Any = None, peft_config: Any = None, **options: Any) -> Any:
        sampling = {"num_generations": 4, "max_completion_length": 12, "temperature": 0.9, "beta": 0.1}
        arguments = {
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "max_steps": 20,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            **(sampling if kind in ("grpo", "rloo") else {}),
            **options,
        }
        first = [str(demo_paths().model) if model is None else model, *([reward] if kind in ("grpo", "rloo") else [])]
        trl = importlib.import_module("trl")
        config, trainer = (getattr(trl, f"{kind.upper()}{name}") for name in ("Config", "Trainer"))
        return trainer(*first, args=config(**arguments), train_dataset=dataset(kind), peft_config=peft_config)

    return make


@pytest.fixture(scope="session")
def train(trainer_of: Callable[..., Any]) -> Callable[..., Any]:
    """`trainer_of` trains: its logs with a loss."""

    def run(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        running = trainer_of(*arguments, **options)
        running.train()
        return [line for line in running.state.log_history if "loss" in line]

    return run


@pytest.fixture(scope="session")
def compare() -> Callable[..., None]:
    """Two runs' logs are the same, but for their time."""

    def check(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps: int) -> None:
        assert len(ours) == len(theirs) == steps
        for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
            assert mine.keys() == other.keys()
            for name, value in other.items():
                if name != "step_time":
                    # a metric near zero is a difference of log-probs, of which fp32 keeps 1e-4 nats
                    small = 1e-6 if name == "loss" else 2e-4
                    assert mine[name] == pytest.approx(value, rel=1e-3, abs=small), (step, name)

    return check
