"""A training step never waits for the device: nothing in it reads a tensor's value on the host."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo import DPOConfig, DPOTrainer

aten = torch.ops.aten
# what copies a value, or a number of results, to the host
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.is_nonzero, aten.equal}


pytestmark = pytest.mark.usefixtures("as_on_a_gpu")  # on a CPU the ops look at values, which costs nothing there


class Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def trainer(folder: Path, peft: bool, layout: str, **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 0}
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 61)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>")
    rows = [{"prompt_ids": [1, 2, n], "chosen_ids": [4] * n, "rejected_ids": [5, 6]} for n in range(3, 9)]
    args = {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "logging_steps": 100, "max_steps": 3}
    args |= {"per_device_train_batch_size": 2, "save_strategy": "no", "batch_layout": layout, **options}
    return DPOTrainer(
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)),
        args=DPOConfig(**args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4) if peft else None,
    )


def reads_of_steps(run: DPOTrainer) -> list[str]:
    """What `training_step` (batch to device, forward, loss, metrics, backward) read in all steps but the first."""
    names: list[str] = []
    steps = 0
    training_step = run.training_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        with Reads() as reads:
            loss = training_step(*args, **kwargs)
        names.extend(reads.names if steps > 1 else [])
        return loss

    run.training_step = watched  # pyright: ignore[reportAttributeAccessIssue] on this instance only
    run.train()
    assert steps == 3
    return names


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_no_step_reads_a_value(tmp_path: Path, peft: bool, layout: str) -> None:
    assert reads_of_steps(trainer(tmp_path, peft, layout)) == []


@pytest.mark.parametrize(
    "options",
    [{"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, {"use_weighting": True}, {"ld_alpha": 0.5}],
    ids=["two losses", "WPO", "LD-DPO"],
)
def test_no_loss_reads_a_value(tmp_path: Path, options: dict[str, Any]) -> None:
    assert reads_of_steps(trainer(tmp_path, False, "shared", **options)) == []


def test_batches_by_tokens_read_no_value(tmp_path: Path) -> None:
    assert reads_of_steps(trainer(tmp_path, False, "shared", max_tokens_per_batch=30)) == []


def test_a_value_that_is_read_is_seen(tmp_path: Path) -> None:
    run = trainer(tmp_path, False, "shared")
    compute_loss = run.compute_loss

    def reading(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        assert loss > 0
        return loss

    run.compute_loss = reading  # pyright: ignore[reportAttributeAccessIssue] on this instance only
    assert reads_of_steps(run) == ["aten._local_scalar_dense.default"] * 2
