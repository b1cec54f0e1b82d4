"""Who is compared in `train_step`: models, pairs and arguments -> a trainer that is ready to `train()`."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..measure.entries import Entry, Factory, installed, own_version
from .cases import SHAPES, YARDSTICK, TrainCase

# of fastdpo's batches; "fastdpo" alone is the default of its `batch_layout`
LAYOUTS = ("padded", "packed", "shared")
LORA_RANK = 16
# large enough that a few steps move the rewards, and what is wrong about them shows
LEARNING_RATES = {"full": 1e-4, "lora": 1e-3}


@dataclass(frozen=True)
class Setup:
    """What each entry gets. `reference` None: the policy without its adapter."""

    policy: Any
    reference: Any
    adapter: LoraConfig | None
    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]


def trainer_of(trainer: type, config: type, setup: Setup, **own: Any) -> Trainer:
    """Both libraries' trainers are made alike."""
    return trainer(
        setup.policy,
        setup.reference,
        config(**setup.arguments, **own),
        train_dataset=setup.rows,
        processing_class=setup.tokenizer,
        peft_config=setup.adapter,
    )


def _own(name: str) -> Entry:
    from fastdpo import DPOConfig, DPOTrainer

    layout = name.partition(" ")[2]
    # TRL's trainer writes no such files, and a picture takes longer than a step
    own = {"metric_files": False, **({"batch_layout": layout} if layout else {})}
    return Entry(name, own_version(), partial(trainer_of, DPOTrainer, DPOConfig, **own))


def _trl(name: str) -> Entry:
    package = installed("trl")
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    return Entry(name, package, partial(trainer_of, DPOTrainer, DPOConfig))


FACTORIES = (
    Factory("fastdpo", _own),
    *(Factory(f"fastdpo {layout}", _own) for layout in LAYOUTS),
    Factory(YARDSTICK, _trl),
)


def arguments(case: TrainCase, device: str, steps: int, folder: str) -> dict[str, Any]:
    """Of both libraries' DPOConfig; what is not here has its default, which is the same in both.

    Every epoch has the same batches where transformers can be told so; else they are shuffled, alike for all entries.
    """
    order = {"train_sampling_strategy": "sequential"}
    known = {field.name for field in fields(TrainingArguments)}
    return {
        **{name: value for name, value in order.items() if name in known},
        "output_dir": folder,
        "use_cpu": device == "cpu",
        "bf16": case.dtype == "bf16",
        "per_device_train_batch_size": case.pairs,
        "max_length": case.length,
        "max_steps": steps,
        "learning_rate": LEARNING_RATES[case.mode],
        "lr_scheduler_type": "constant",
        "seed": 0,
        "data_seed": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Models:
    """One model's weights, and any number of models made of them.

    What is not trained (a reference, what lies under an adapter) is one storage for all: five trainers stand beside
    each other in the memory of little more than one.
    """

    def __init__(self, case: TrainCase, device: str) -> None:
        self._full = case.mode == "full"
        # a trained weight is in fp32 under autocast, as both trainers load it; a frozen one in the case's dtype
        dtype = torch.bfloat16 if case.dtype == "bf16" and not self._full else torch.float32
        self._base = _from_folder(case.folder, dtype) if case.folder else _random(case.head, dtype, device)
        self._base.to(device).requires_grad_(False)

    def policy(self) -> Any:
        return deepcopy(self._base).requires_grad_() if self._full else self._shared()

    def reference(self) -> Any:
        return self._shared() if self._full else None

    def adapter(self) -> LoraConfig | None:
        if self._full:
            return None
        return LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )

    def _shared(self) -> Any:
        return deepcopy(self._base, {id(parameter): parameter for parameter in self._base.parameters()})


def _from_folder(folder: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def _random(head: str, dtype: torch.dtype, device: str) -> Any:
    """Weights drawn on the device, wide enough that attention and logits are peaked: a wrong mask shows in the loss."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    sizes = {field.name: getattr(SHAPES[head], field.name) for field in fields(SHAPES[head])}
    make = LlamaConfig if sizes.pop("family") == "llama" else Qwen2Config
    wide = 1.6 / sizes["hidden_size"] ** 0.5
    config = make(**sizes, max_position_embeddings=8192, initializer_range=wide, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
