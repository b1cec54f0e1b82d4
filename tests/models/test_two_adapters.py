"""The two-adapter script that TRL up to 0.28 ran, with the import changed: training, saving, merging, resuming."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from fastdpo import DPOConfig, DPOTrainer

WORDS = 40
STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model with its tokenizer, two different adapters of it, and pairs; all on disk, as a user has them."""
    root = tmp_path_factory.mktemp("script")
    found = {name: root / name for name in ("base", "train_adapter", "ref_adapter", "data", "output", "merged")}
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, initializer_range=0.2, eos_token_id=0, **sizes))
    base.save_pretrained(found["base"])
    words = {"</s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue] untyped setter
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokens.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokens.save_pretrained(found["base"])
    for name in ("train_adapter", "ref_adapter"):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(found["base"]), lora).save_pretrained(found[name])
    make = random.Random(1)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{make.randrange(2, WORDS)}" for _ in range(make.randint(low, high)))

    rows = [{"prompt": text(3, 14) + " ", "chosen": text(2, 6), "rejected": text(2, 6)} for _ in range(16)]
    Dataset.from_list(rows).save_to_disk(found["data"])
    return found


def load_policy(folders: dict[str, Path]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folders["base"], torch_dtype=torch.float32)
    model.config.use_cache = False
    model = PeftModel.from_pretrained(model, str(folders["train_adapter"]), is_trainable=True, adapter_name="dpo_train")
    model.load_adapter(str(folders["ref_adapter"]), adapter_name="reference")
    return model


def build(folders: dict[str, Path], output: Path, **options: Any) -> DPOTrainer:
    """The script up to its trainer; quantization, CUDA and wandb left out."""
    tokenizer = AutoTokenizer.from_pretrained(folders["base"], trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "left"
    training_args = DPOConfig(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=5e-3,
        output_dir=str(output),
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        beta=0.05,
        bf16=False,
        fp16=False,
        gradient_checkpointing=True,
        max_prompt_length=8,
        max_length=16,
        model_adapter_name="dpo_train",
        ref_adapter_name="reference",
        report_to=["tensorboard"],
        run_name="dpo-mistral-train",
        use_cpu=True,
        disable_tqdm=True,
        max_steps=STEPS,
    )
    return DPOTrainer(
        model=load_policy(folders),
        args=training_args,
        train_dataset=load_from_disk(str(folders["data"])),  # pyright: ignore[reportArgumentType] no DatasetDict
        tokenizer=tokenizer,
        **options,
    )


@pytest.fixture(scope="module")
def finished(folders: dict[str, Path]) -> DPOTrainer:
    pytest.importorskip("tensorboard")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = build(folders, folders["output"])
    trainer.train()
    torch.set_num_threads(threads)
    return trainer


def adapter(model: Any, name: str) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if f".{name}." in key}


def test_the_script_trains_one_adapter_against_the_other(folders: dict[str, Path], finished: DPOTrainer) -> None:
    before, after = load_policy(folders), finished.model
    logs = [line for line in finished.state.log_history if "loss" in line]
    assert len(logs) == STEPS
    assert finished.reference_description == "the adapter 'reference' of the same model"
    assert finished.reference_origin == {"kind": "adapter", "name": "reference"}
    # two adapters that differ: the first loss is not that of a policy which is its own reference
    assert logs[0]["rewards/chosen"] != 0.0
    for key, value in adapter(before, "reference").items():
        assert torch.equal(adapter(after, "reference")[key], value)
    assert any(
        not torch.equal(adapter(after, "dpo_train")[key], value) for key, value in adapter(before, "dpo_train").items()
    )
    rows: Any = load_from_disk(str(folders["data"]))
    long = sum(len(row["prompt"].split()) > 8 for row in rows)
    assert finished.tokenize_reports["train"].shortened_prompts == long > 0
    assert max(len(row["prompt_ids"]) for row in cast(Any, finished.train_dataset)) == 8
    assert list(folders["output"].rglob("events.out.tfevents.*"))


def test_the_first_loss_is_that_of_the_two_adapters(folders: dict[str, Path], finished: DPOTrainer) -> None:
    policy = load_policy(folders).eval()
    trainer = build(folders, folders["output"].with_name("unused"))
    trainer.data_collator = replace(trainer.data_collator, layout="padded")
    batch = next(iter(trainer.get_train_dataloader()))
    sums = {}
    with torch.no_grad():
        for name in ("dpo_train", "reference"):
            policy.set_adapter(name)
            logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            tokens = logits.flatten(0, 1)[batch["rows"]].log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
            sums[name] = torch.stack([part.sum() for part in tokens.split(batch["offsets"].diff().tolist())])
    margin = (sums["dpo_train"] - sums["reference"]).view(2, -1)
    wanted = -torch.nn.functional.logsigmoid(0.05 * (margin[0] - margin[1])).mean()
    trainer.model.eval()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch).detach(), wanted, rtol=1e-5, atol=1e-6)


def test_the_output_folder_holds_the_trained_adapter_and_merges(folders: dict[str, Path], finished: DPOTrainer) -> None:
    output = folders["output"]
    # the script never calls save_model; it may
    finished.save_model(str(output))
    assert (output / "adapter_model.safetensors").is_file()
    assert not (output / "reference").exists()
    assert not (output / "dpo_train").exists()
    newest = output / f"checkpoint-{STEPS}"
    assert (newest / "dpo_train" / "adapter_model.safetensors").is_file()
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]

    base = AutoModelForCausalLM.from_pretrained(folders["base"], torch_dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, str(output)).merge_and_unload()
    merged.save_pretrained(folders["merged"])
    AutoTokenizer.from_pretrained(folders["base"]).save_pretrained(folders["merged"])
    ids = torch.tensor([[5, 6, 7, 8]])
    again = AutoModelForCausalLM.from_pretrained(folders["merged"]).eval()
    trained = finished.model.eval()
    torch.testing.assert_close(again(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)
    untouched = AutoModelForCausalLM.from_pretrained(folders["base"]).eval()
    assert not torch.allclose(again(ids).logits, untouched(ids).logits, atol=1e-3)


def test_the_killed_run_goes_on_to_the_same_weights(
    folders: dict[str, Path], finished: DPOTrainer, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    output = tmp_path / "output"
    first = build(folders, output, callbacks=[Stop()])
    first.train()
    assert first.state.global_step == 3
    second = build(folders, output)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == STEPS
    for name in ("dpo_train", "reference"):
        wanted = adapter(finished.model, name)
        assert wanted
        for key, value in adapter(second.model, name).items():
            assert torch.equal(value, wanted[key]), key
    saved = [load_file(folder / "adapter_model.safetensors") for folder in (output, folders["output"])]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (second, finished)]
    assert losses[0] == losses[1]
