"""Ways in that are files of a user: TRL's quick-start script with the import changed, minimind's loop and dpo.jsonl.

The others have files of their own: test_two_adapters.py, test_llama_factory_yaml.py and test_accelerate_launch.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo.cli import main
from fastdpo.integrations import minimind

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "fastdpo" / "demo"

# TRL's documentation, with names of this machine, fp32 on the CPU and a log to compare
QUICK_START = """
import json
from {package} import DPOConfig, DPOTrainer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("{model}")
train_dataset = load_dataset("json", data_files="{data}", split="train")

training_args = DPOConfig(
    output_dir="quick-start", use_cpu=True, bf16=False, max_steps=4, logging_steps=1, learning_rate=1e-4,
    gradient_checkpointing=False,
)
trainer = DPOTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset)
trainer.train()
trainer.save_model("trained")
AutoModelForCausalLM.from_pretrained("trained")
print(json.dumps([line for line in trainer.state.log_history if "loss" in line]))
"""


def quick_start(package: str, folder: Path) -> list[dict[str, float]]:
    """What the script logs, run in `folder` by a process of its own."""
    folder.mkdir()
    script = folder / "train_dpo.py"
    script.write_text(QUICK_START.format(package=package, model=DEMO / "model", data=DEMO / "train.jsonl"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_trl_s_quick_start_runs_with_the_import_changed(tmp_path: Path) -> None:
    mine = quick_start("fastdpo", tmp_path / "fastdpo")
    assert [line["step"] for line in mine] == [1, 2, 3, 4]
    assert mine[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert mine[-1]["loss"] < 0.69


@pytest.mark.slow
def test_trl_s_quick_start_logs_the_same_with_its_own_import(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    mine, whole = (quick_start(package, tmp_path / package) for package in ("fastdpo", "trl"))
    for line, theirs in zip(mine, whole, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "learning_rate"):
            assert line[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5), name


# minimind


def conversation(turns: int, last: str, number: int) -> list[dict[str, str]]:
    """Messages of `turns` questions; `last` is the answer to the last one."""
    messages = []
    for turn in range(turns):
        answer = last if turn == turns - 1 else f"The answer to question {number}.{turn} is no secret."
        messages += [
            {"role": "user", "content": f"Question {number}.{turn}?"},
            {"role": "assistant", "content": answer},
        ]
    return messages


@pytest.fixture
def dpo_jsonl(tmp_path: Path) -> Path:
    """minimind's form: whole conversations on both sides, no prompt, of one turn and of several."""
    path = tmp_path / "dpo.jsonl"
    answers = {"chosen": "Yes, certainly it is.", "rejected": "No."}
    rows = [
        {side: conversation(1 + number % 3, answer, number) for side, answer in answers.items()} for number in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model_folder(tmp_path: Path, shared_data: Path) -> Path:
    """A tiny random Llama with minimind's tokenizer."""
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "minimind_tokenizer")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=2, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loss_mask(ids: list[int], tokenizer: Any) -> list[int]:
    """1 on what the assistant says, its end-of-turn and newline included; not on an empty think block, which minimind's
    data code takes out of most rows."""
    header, think, end = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<|im_start|>assistant\n", "<think>\n\n</think>\n\n", "<|im_end|>\n")
    )
    mask, place = [0] * len(ids), 0
    while place < len(ids):
        if ids[place : place + len(header)] != header:
            place += 1
            continue
        place += len(header)
        place += len(think) * (ids[place : place + len(think)] == think)
        while ids[place : place + len(end)] != end:
            mask[place] = 1
            place += 1
        mask[place : place + len(end)] = [1] * len(end)
    return mask


def batches(path: Path, tokenizer: Any, length: int = 160) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, y and mask of two pairs a batch, chosen rows first, as minimind's DPODataset and loop make them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    made = []
    for at in range(0, len(rows), 2):
        ids, masks = [], []
        for side in ("chosen", "rejected"):
            for row in rows[at : at + 2]:
                text = tokenizer.apply_chat_template(row[side], tokenize=False, add_generation_prompt=False)
                tokens = tokenizer(text)["input_ids"]
                assert len(tokens) <= length
                padding = [0] * (length - len(tokens))
                ids.append(tokens + padding)
                masks.append(loss_mask(tokens, tokenizer) + padding)
        whole, mask = torch.tensor(ids), torch.tensor(masks)
        made.append((whole[:, :-1], whole[:, 1:], mask[:, 1:]))
    return made


def their_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.gather(logits.log_softmax(2), 2, labels.unsqueeze(2)).squeeze(-1)


def their_loss(reference: Tensor, policy: Tensor, mask: Tensor, beta: float, aggregate: str) -> Tensor:
    assert aggregate == "sum"
    (chosen, rejected), (ref_chosen, ref_rejected) = (((x * mask).sum(1)).chunk(2) for x in (policy, reference))
    return -nn.functional.logsigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()


def loop(folder: Path, path: Path, log_probs: Callable[..., Tensor], loss: Callable[..., Tensor]) -> list[float]:
    """minimind's train_dpo.py: the losses of an epoch."""
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for x, y, mask in batches(path, AutoTokenizer.from_pretrained(folder)):
        with torch.no_grad():
            ref_log_probs = log_probs(reference(x).logits, y)
        dpo = loss(ref_log_probs, log_probs(model(x).logits, y), mask, beta=0.15, aggregate="sum")
        losses.append(dpo.item())
        dpo.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def test_minimind_s_loop_and_its_dpo_jsonl_train_the_same(dpo_jsonl: Path, model_folder: Path, tmp_path: Path) -> None:
    losses = loop(model_folder, dpo_jsonl, their_log_probs, their_loss)
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert min(abs(a - b) for a, b in pairwise(losses)) > 1e-3
    # its loss functions, by their own names
    mine = loop(model_folder, dpo_jsonl, minimind.logits_to_log_probs, minimind.dpo_loss)
    assert mine == pytest.approx(losses, rel=1e-4)
    # its file, by the command
    options = {"model_name_or_path": model_folder, "dataset_name": dpo_jsonl, "output_dir": tmp_path / "out"}
    options |= {"scored_turns": "all", "beta": 0.15, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    options |= {"num_train_epochs": 1, "lr_scheduler_type": "constant", "weight_decay": 0.01, "optim": "adamw_torch"}
    options |= {"train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no"}
    assert main(["train", *(f"--{name}={value}" for name, value in options.items())]) == 0
    history = json.loads((tmp_path / "out" / "dpo_metrics" / "log_history.json").read_text())
    assert [line["loss"] for line in history if "loss" in line] == pytest.approx(losses, rel=1e-4)
