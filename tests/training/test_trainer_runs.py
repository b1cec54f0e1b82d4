"""DPOTrainer's datasets, arguments and saved files, and the Trainer's known traps."""

import logging
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.trainer import DPOTrainer
from tiny_runs import VOCABULARY, lora, make, model, pairs, tokenizer


def train_logs(trainer: DPOTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def test_model_is_left_as_it_was_found_and_saved(tmp_path: Path) -> None:
    policy = model()
    assert policy.config.use_cache is True
    trainer = make(tmp_path, policy, save_strategy="steps", save_steps=2)
    trainer.train()
    assert "forward" not in vars(policy)
    assert policy.config.use_cache is True
    assert policy.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.use_cache is True
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), policy.parameters(), strict=True))
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == VOCABULARY
    # still usable: the private forward comes back for it
    assert trainer.evaluate(pairs(2))["eval_loss"] > 0
    assert "forward" not in vars(policy)


def test_adapter_is_saved_and_loads(tmp_path: Path) -> None:
    trainer = make(tmp_path, peft_config=lora(), save_strategy="steps", save_steps=4)
    trainer.train()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(model(), tmp_path).eval()
    ids = torch.tensor([[5, 6, 7]])
    trained = trainer.model.eval()
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
    assert not torch.allclose(loaded(ids).logits, model()(ids).logits)


def test_bf16_keeps_fp32_weights_and_starts_at_ln_2(tmp_path: Path) -> None:
    policy = model()
    trainer = make(tmp_path, policy, bf16=True, max_steps=2, eval_dataset=pairs(2), eval_on_start=True)
    trainer.train()
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert trainer.state.log_history[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert train_logs(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert train_logs(trainer)[1]["loss"] != train_logs(trainer)[0]["loss"]
    assert "forward" not in vars(policy)


def test_training_twice_and_evaluating_before(tmp_path: Path) -> None:
    trainer = make(tmp_path, bf16=True, eval_dataset=pairs(2))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    trainer.train()
    first = train_logs(trainer)[-1]["num_tokens"]
    trainer.train()
    assert train_logs(trainer)[-1]["num_tokens"] == first


def test_streamed_dataset_and_tokenizer_alias(tmp_path: Path) -> None:
    def rows() -> Any:
        yield from pairs(8)

    args = DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
    )
    stream = IterableDataset.from_generator(rows)
    trainer = DPOTrainer(model(), args=args, train_dataset=stream, tokenizer=tokenizer())
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.tokenizer.pad_token == "</s>"


def test_streamed_messages_without_a_prompt_are_normalized(tmp_path: Path) -> None:
    def rows() -> Any:
        for i in range(1, 9):
            question = {"role": "user", "content": f"w{i} w2"}
            answers = ({"role": "assistant", "content": f"w{i + shift} w4"} for shift in (3, 5))
            chosen, rejected = ([question, answer] for answer in answers)
            yield {"chosen": chosen, "rejected": rejected}

    chat = tokenizer()
    chat.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, save_strategy="no", per_device_train_batch_size=2
    )
    streamed, whole = (
        cast(Any, DPOTrainer(model(), args=args, train_dataset=dataset, processing_class=chat).train_dataset)
        for dataset in (IterableDataset.from_generator(rows), Dataset.from_list(list(rows())))
    )
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert [[row[name] for name in ids] for row in streamed] == [[row[name] for name in ids] for row in whole]
    assert next(iter(streamed))["chosen_ids"] == [4, 4]
    DPOTrainer(model(), args=args, train_dataset=streamed, processing_class=chat).train()


def test_predict_takes_text(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}] * 3)
    trainer = make(tmp_path)
    metrics = trainer.predict(rows).metrics
    assert metrics["test_loss"] == pytest.approx(math.log(2))
    assert metrics["test_loss"] == trainer.evaluate(rows)["eval_loss"]


@pytest.mark.skipif("train_sampling_strategy" not in TrainingArguments.__dataclass_fields__, reason="another name")
def test_grouping_by_length_sees_the_longer_side(tmp_path: Path) -> None:
    trainer = make(tmp_path, train=pairs(16), train_sampling_strategy="group_by_length")
    rows = cast(Any, trainer.train_dataset)
    wanted = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    assert rows["length"] == wanted
    trainer.train()
    assert len(train_logs(trainer)) == 4
    trainer.evaluate(rows)


def test_ids_and_vocabularies_that_do_not_fit_are_named(tmp_path: Path) -> None:
    rows = pairs(4).to_list()
    rows[2]["chosen_ids"][1] = VOCABULARY
    with pytest.raises(
        ValueError, match=r"train_dataset\[2\].chosen_ids has the id 61, and the model embeds ids 0 to 60"
    ):
        make(tmp_path, train=Dataset.from_list(rows))
    with pytest.raises(ValueError, match=r"eval_dataset\[2\].chosen_ids has the id 61"):
        make(tmp_path, eval_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="the tokenizer has 61 tokens and the reference embeds 40"):
        make(tmp_path, ref_model=model(vocab_size=40))


def test_text_rows_are_tokenized(tmp_path: Path) -> None:
    rows = [{"prompt": "w3 w4 ", "chosen": "w5 w6", "rejected": "w7"}] * 4
    tokens = tokenizer()
    from tokenizers.pre_tokenizers import Whitespace

    tokens.backend_tokenizer.pre_tokenizer = Whitespace()
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, max_length=16)
    trainer = DPOTrainer(model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokens)
    assert trainer.tokenize_reports["train"].rows == 4
    assert trainer.train_dataset[0]["prompt_ids"] == [3, 4]


def test_arguments_that_cannot_work_are_refused(tmp_path: Path) -> None:
    same = model()
    with pytest.raises(ValueError, match="same object"):
        make(tmp_path, same, ref_model=same)
    with pytest.raises(TypeError, match="must be a fastdpo DPOConfig, got dict"):
        DPOTrainer(model(), args=cast(Any, {"use_cpu": True}), train_dataset=pairs())
    with pytest.raises(TypeError, match="got list"):
        make(tmp_path, train=[{"prompt_ids": [1]}])
    with pytest.raises(ValueError, match="embeds 30"):
        make(tmp_path, model(vocab_size=30))
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        make(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


def test_a_subclass_may_use_names_of_its_own(tmp_path: Path) -> None:
    """What the trainer keeps for itself has an underscore; what it documents can be assigned."""
    trainer = make(tmp_path)
    plain = Trainer(trainer.model, TrainingArguments(str(tmp_path / "plain"), use_cpu=True))
    documented = {"tokenizer", "tokenize_reports", "reference_description", "reference_origin", "layout_description"}
    documented |= {"advisor", "report", "card_details", "parts", "file_parts"}
    assert {name for name in vars(trainer).keys() - vars(plain).keys() if name[0] != "_"} == documented
    trainer.reference_description = "mine"
    trainer.train()
    assert trainer.reference_description == "mine"


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPOConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process.*CUDA_VISIBLE_DEVICES"):
        make(tmp_path)


def test_rows_that_lose_a_completion_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs(4).to_list()
    rows[0] |= {"chosen_ids": [], "rejected_ids": []}
    rows[1] |= {"chosen_ids": []}
    make(tmp_path, train=Dataset.from_list(rows))
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (line,) = [line for line in said if line.startswith("train: 3 pairs")]
    assert "dropped 1 without a scored token; 1 with no scored token in one of the completions" in line
