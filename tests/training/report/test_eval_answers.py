"""generate_during_eval: answers of policy and reference at each evaluation, and the same training with and without."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from fastdpo import DPOConfig, DPOTrainer


def trained(folder: Path, peft: bool, **options: Any) -> DPOTrainer:
    set_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 0}
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 61)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>")
    rows = [{"prompt_ids": [1, 2, n], "chosen_ids": [4, n, 0], "rejected_ids": [5, 6, 0]} for n in range(3, 15)]
    args = {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 4}
    args |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "save_strategy": "no"}
    args |= {"eval_strategy": "steps", "eval_steps": 2, "disable_dropout": False, "learning_rate": 1e-2}
    trainer = DPOTrainer(
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.5, attention_dropout=0.1)),
        args=DPOConfig(**{**args, **options}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:5]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
    )
    trainer.train()
    return trainer


def losses(trainer: DPOTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("peft", [False, True])
def test_answers_are_written_and_training_is_as_without(tmp_path: Path, peft: bool) -> None:
    run = trained(tmp_path / "with", peft, generate_during_eval=True)
    rows = [json.loads(line) for line in (tmp_path / "with" / "dpo_metrics" / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4]
    assert [row["prompt"] for row in rows] == ["w1 w2 w3", "w1 w2 w4", "w1 w2 w5"] * 2
    # the reference stays, the policy moves away from it
    assert [row["reference"] for row in rows[:3]] == [row["reference"] for row in rows[3:]]
    assert all(row["reference"] for row in rows)
    assert [row["policy"] for row in rows[3:]] != [row["reference"] for row in rows[3:]]
    assert losses(run) == losses(trained(tmp_path / "without", peft))


def test_where_nothing_can_answer_a_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, False, generate_during_eval=True, precompute_ref_log_probs=True)
    assert any("the policy alone answers" in line for line in caplog.messages)
    rows = [json.loads(line) for line in (tmp_path / "dpo_metrics" / "answers.jsonl").read_text().splitlines()]
    assert all("reference" not in row and row["policy"] for row in rows)
