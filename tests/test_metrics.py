"""What the trainer logs beside TRL's metrics: lengths, quantiles of margins, speed and memory."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastdpo.training import metrics, speed
from fastdpo.training.config import DPOConfig
from fastdpo.training.metrics import COLUMNS, MetricSums, margin_quantiles
from fastdpo.training.speed import Stopwatch, peak_memory_gb
from fastdpo.training.trainer import DPOTrainer

CPU = torch.device("cpu")
VOCABULARY = 29


def table(margins: list[float]) -> torch.Tensor:
    rows = torch.zeros(len(margins), len(COLUMNS), dtype=torch.float64)
    rows[:, COLUMNS.index("pairs")] = 1
    rows[:, COLUMNS.index("rewards/margins")] = torch.tensor(margins, dtype=torch.float64)
    return rows


def make(folder: Path, **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, eos_token_id=0, **sizes))
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )
    chance = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return chance.integers(1, VOCABULARY, length).tolist()

    # chosen has 3, 4, 5, ... tokens, rejected always 4
    rows = [{"prompt_ids": ids(3), "chosen_ids": ids(3 + n), "rejected_ids": ids(4)} for n in range(8)]
    args = DPOConfig(
        **{
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "logging_steps": 4,
            "max_steps": 4,
            "save_strategy": "no",
            **options,
        }
    )
    data = Dataset.from_list(rows)
    return DPOTrainer(model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def test_quantiles_are_numpys_and_leave_padding_out() -> None:
    values = torch.tensor([3.0, -1.0, float("nan"), 0.5, 2.0, float("nan")], dtype=torch.float64)
    found = margin_quantiles(values)
    assert list(found) == ["rewards/margins_p10", "rewards/margins_p50", "rewards/margins_p90"]
    assert list(found.values()) == pytest.approx(np.quantile([3.0, -1.0, 0.5, 2.0], [0.1, 0.5, 0.9]))
    assert margin_quantiles(torch.zeros(0)) == {}
    assert all(np.isnan(value) for value in margin_quantiles(torch.tensor([float("nan")])).values())


def test_the_window_keeps_every_margin_and_goes_through_a_checkpoint() -> None:
    sums, numbers = MetricSums(), torch.arange(3000, dtype=torch.float64).tolist()
    for start in range(0, 3000, 2):
        sums.add(table(numbers[start : start + 2]))
    assert sums.margins(CPU).tolist() == numbers
    assert len(sums._margins) < 1024, "a small tensor takes a block of its own on a GPU"
    again = MetricSums()
    again.load(sums.tensor(CPU).tolist(), sums.margins(CPU).tolist(), CPU)
    again.add(table([7.0]))
    assert again.margins(CPU).tolist() == [*numbers, 7.0]
    assert again.tensor(CPU)[COLUMNS.index("pairs")] == 3001
    again.clear()
    assert again.margins(CPU).shape == (0,)
    assert metrics.averages(again.tensor(CPU).tolist()) == {}


def test_logs_have_lengths_quantiles_speed_and_memory(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    tables = []

    class Keep(MetricSums):
        def add(self, table: torch.Tensor) -> None:
            tables.append(table)
            super().add(table)

    trainer._sums = {"train": Keep(), "eval": Keep()}
    trainer.train()
    line = next(log for log in trainer.state.log_history if "loss" in log)
    margins = torch.cat(tables)[:, COLUMNS.index("rewards/margins")].numpy()
    assert len(margins) == 8
    for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
        assert line[f"rewards/margins_{name}"] == pytest.approx(np.quantile(margins, q))
    assert line["rewards/margins_p10"] < line["rewards/margins"] < line["rewards/margins_p90"]
    assert (line["length/chosen"], line["length/rejected"]) == (6.5, 4.0)
    assert 0 < line["tokens_per_second"] < 1e7
    assert line["peak_memory_gb"] == pytest.approx(peak_memory_gb(CPU), rel=0.05)
    tables.clear()
    found = trainer.evaluate()
    margins = torch.cat(tables)[:, COLUMNS.index("rewards/margins")].numpy()
    assert found["eval_rewards/margins_p50"] == pytest.approx(np.median(margins))
    assert found["eval_length/chosen"] == 6.5
    assert "eval_tokens_per_second" not in found


class Clock(TrainerCallback):
    """Time goes by in steps (1 s), evaluations (100 s a batch) and after checkpoints (1000 s) only."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.now += 1

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.now += 100

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.now += 1000


def test_evaluations_and_checkpoints_are_no_part_of_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(tmp_path, save_strategy="steps", save_steps=1, **options)
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    trainer.add_callback(clock)
    trainer.train()
    assert clock.now > 4000
    lines = [log for log in trainer.state.log_history if "loss" in log]
    tokens = [lines[0]["num_tokens"], lines[1]["num_tokens"] - lines[0]["num_tokens"]]
    assert [line["tokens_per_second"] for line in lines] == [count / 2 for count in tokens]


def test_a_resumed_run_counts_its_own_tokens_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window began before the checkpoint: its means have all of it, its speed the part that this process ran."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    resumed = make(tmp_path / "whole", **options)
    monkeypatch.setattr(resumed._stopwatch, "lap", lambda: 2.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    first, again = (next(log for log in t.state.log_history if "loss" in log) for t in (whole, resumed))
    for log in (first, again):
        log["peak_memory_gb"] = 0.0
    assert {**first, "tokens_per_second": 0.0} == {**again, "tokens_per_second": 0.0}
    assert 0 < again["tokens_per_second"] * 2 < first["num_tokens"]


def test_the_stopwatch_runs_only_between_start_and_stop() -> None:
    watch = Stopwatch()
    assert watch.lap() == 0.0
    watch.run()
    time.sleep(0.02)
    with watch.paused(), watch.paused():
        time.sleep(0.1)
    assert 0.02 <= watch.lap() < 0.1
    assert watch.lap() < 0.02
    watch.stop()
    assert watch.lap() == 0.0
