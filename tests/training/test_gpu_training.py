"""Training on a GPU: FlexAttention over shared rows, equal to padded ones, and no wait for the device inside a step.

`pytest -m gpu` runs these, as tests/test_gpu.py says.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.models import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted; run pytest -m gpu"),
]


def trainer(folder: Path, layout: str = "auto", peft: bool = False, **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1999, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, initializer_range=0.1))
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 1999)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>")
    draw = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(1, 1999, (length,), generator=draw).tolist()

    rows = [{"prompt_ids": ids(50, 200), "chosen_ids": ids(20, 90), "rejected_ids": ids(20, 90)} for _ in range(32)]
    args = {"output_dir": str(folder), "disable_tqdm": True, "logging_steps": 1, "max_steps": 6, "save_strategy": "no"}
    args |= {"per_device_train_batch_size": 4, "learning_rate": 1e-4, "batch_layout": layout, **options}
    return DPOTrainer(
        model,
        args=DPOConfig(**args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8) if peft else None,
    )


def losses(run: DPOTrainer) -> list[float]:
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def test_flex_attention_passes_its_trial() -> None:
    assert attention._trial(torch.device("cuda"), torch.bfloat16) < 2e-2


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_shared_rows_train_as_padded_ones(tmp_path: Path, peft: bool, checkpointing: bool) -> None:
    options = {"peft": peft, "gradient_checkpointing": checkpointing}
    shared = trainer(tmp_path, **options)
    assert shared.data_collator.layout == "shared", shared.layout_description
    assert shared._logprob_forward.attention == attention.FLEX
    assert losses(shared) == pytest.approx(losses(trainer(tmp_path, "padded", **options)), abs=2e-2)
    assert shared.model.config._attn_implementation == "sdpa"


def test_in_fp32_they_are_equal(tmp_path: Path) -> None:
    options = {"bf16": False, "tf32": False}
    assert losses(trainer(tmp_path, "shared", **options)) == pytest.approx(
        losses(trainer(tmp_path, "padded", **options)), abs=1e-4
    )


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_step_does_not_wait_for_the_device(tmp_path: Path, peft: bool) -> None:
    run = trainer(tmp_path, peft=peft)
    run.train()  # what is compiled or looked up once
    batches = [run._prepare_inputs(batch) for batch in run.get_train_dataloader()]
    run.model.train()
    torch.cuda.synchronize()
    with run._logprob_forward.installed():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[:3]:
                with run.compute_loss_context_manager():
                    loss = run.compute_loss(run.model, batch)
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
