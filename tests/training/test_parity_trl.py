"""DPOTrainer against TRL 1.16's on the same model, data, seed and arguments: 20 steps in fp32 on real pairs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._device
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.trainer import DPOTrainer

trl = pytest.importorskip("trl")

STEPS = 20
RELATIVE = ("loss", "grad_norm", "logps/chosen", "logps/rejected")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
EXACT = ("num_tokens", "learning_rate", "epoch")
STATISTICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """torch.empty as it is.

    A patched one, or one that torch met while it was patched, escapes `with torch.device("meta")`:
    from_pretrained then draws random numbers, and TRL seeds its adapter before it loads.
    """


@pytest.fixture(scope="module")
def pairs(shared_data: Path) -> Dataset:
    """The shorter of the real pairs, prompts of several turns included, as conversations."""
    rows = json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))
    conversations = [
        {
            "prompt": [{"role": ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]],
            "chosen": [{"role": "assistant", "content": row["chosen"]["value"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]["value"]}],
        }
        for row in rows
        if sum(len(m["value"]) for m in row["conversations"]) < 600
    ]
    return Dataset.from_list(conversations[:44])


@pytest.fixture(scope="module")
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


def train(trainer: type, config: type, folder: Path, model: Path, pairs: Dataset, peft: bool, **options: Any) -> Any:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    arguments = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=2,
        max_steps=STEPS,
        max_length=256,
        learning_rate=1e-3,
        logging_steps=1,
        **options,
    )
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    running = trainer(
        str(model),
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=adapter if peft else None,
    )
    running.train()
    return [line for line in running.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    ("peft", "options"),
    [
        (False, {"gradient_checkpointing": False}),
        (True, {"gradient_checkpointing": True}),
        pytest.param(
            True,
            {"gradient_checkpointing": False, "loss_type": "ipo", "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["full", "lora, checkpointing", "lora, ipo, accumulation"],
)
def test_twenty_steps_equal_trl_s(
    tmp_path: Path, model_folder: Path, pairs: Dataset, peft: bool, options: dict[str, Any]
) -> None:
    ours = train(DPOTrainer, DPOConfig, tmp_path / "ours", model_folder, pairs, peft, **options)
    if isinstance(options.get("loss_type"), str):
        options = {**options, "loss_type": [options["loss_type"]]}
    theirs = train(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", model_folder, pairs, peft, **options)
    assert len(ours) == len(theirs) == STEPS
    assert set(theirs[0]) <= set(ours[0])
    # the comparison means something: the runs move
    assert max(abs(line["rewards/margins"]) for line in theirs) > 2e-2
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in RELATIVE:
            assert mine[name] == pytest.approx(other[name], rel=2e-3), (step, name)
        for name in REWARDS:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=2e-4), (step, name)
        # token means: TRL averages them over micro-batches, here tokens weigh the same
        if options.get("gradient_accumulation_steps", 1) == 1:
            for name in STATISTICS:
                assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), (step, name)
        for name in EXACT:
            assert mine[name] == other[name], (step, name)


def test_a_wrong_beta_is_seen(tmp_path: Path, model_folder: Path, pairs: Dataset) -> None:
    """The comparison's own check: 1 % of beta is outside its bounds."""
    runs = [
        train(DPOTrainer, DPOConfig, tmp_path, model_folder, pairs, False, beta=beta, gradient_checkpointing=False)
        for beta in (0.1, 0.101)
    ]
    assert any(
        abs(a[name] - b[name]) > 1e-3 * abs(b[name]) + 2e-4 for a, b in zip(*runs, strict=True) for name in REWARDS
    )
