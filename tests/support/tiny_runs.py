"""A tiny Llama, random pairs and a trainer on them, for tests of training: each time the same ones.

A module and no fixtures: processes that a test starts import it too (`SUPPORT` is its folder).
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.forward import model_call
from fastdpo.training.trainer import DPOTrainer

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
# of processes that a test starts
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
}
VOCABULARY = 61
_TRAINER_ARGUMENTS = (
    *("train_dataset", "eval_dataset", "peft_config", "ref_model", "callbacks"),
    *("data_collator", "compute_metrics"),
)


def model(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


def moved(policy: PeftModel, name: str = "default", seed: int = 3) -> PeftModel:
    """As if the adapter had been trained before."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in policy.named_parameters():
        if f".{name}" in key:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def trained(**options: Any) -> PeftModel:
    return moved(cast(PeftModel, get_peft_model(model(), lora(**options))))


def two_adapters() -> PeftModel:
    policy = cast(PeftModel, get_peft_model(model(), lora(), adapter_name="dpo_train"))
    policy.add_adapter("reference", lora(r=2, lora_alpha=3))
    return moved(moved(policy, "dpo_train"), "reference", seed=4)


def pairs(count: int = 8, seed: int = 1, longest: int = 8) -> Dataset:
    """Pairs of random ids; each part has 2 to `longest` of them, and answers end with the EOS token."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    rows = [{"prompt_ids": ids(), "chosen_ids": [*ids(), 0], "rejected_ids": [*ids(), 0]} for _ in range(count)]
    return Dataset.from_list(rows)


def tokenizer() -> PreTrainedTokenizerFast:
    """Without a pad token: the trainer takes the EOS token, and masks come from lengths."""
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )


def make(folder: Path, policy: Any = None, train: Any = None, **options: Any) -> DPOTrainer:
    """A trainer of 4 steps on the CPU; options: of the trainer's own, of DPOConfig all others."""
    arguments = {name: options.pop(name) for name in _TRAINER_ARGUMENTS if name in options}
    usual = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 4,
        "save_strategy": "no",
    }
    arguments.setdefault("train_dataset", pairs() if train is None else train)
    return DPOTrainer(
        model() if policy is None else policy,
        args=DPOConfig(**{**usual, **options}),
        processing_class=tokenizer(),
        **arguments,
    )


def losses(trainer: DPOTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def batch_of(trainer: DPOTrainer) -> dict[str, Tensor]:
    """Four pairs as padded rows."""
    return replace(trainer.data_collator, layout="padded")([cast(dict, pairs()[row]) for row in range(4)])


def by_definition(policy: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs of the targets from the model's own logits."""
    with torch.no_grad():
        logits = policy.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.flatten(0, 1)[batch["rows"]].log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]


def reference_logps(trainer: DPOTrainer, batch: dict[str, Tensor]) -> Tensor:
    with trainer._logprob_forward.installed():
        logps = trainer._reference(cast(Any, trainer.model), model_call(batch))
    assert logps is not None
    assert not logps.requires_grad
    return logps


class Killed(Exception):
    """Stands for a kill inside one process."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed
