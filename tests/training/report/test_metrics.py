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

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.report import metrics, speed
from fastdpo.training.report.metric_files import metric_rows, summarize
from fastdpo.training.report.metrics import PAIRS, MetricSums, margin_quantiles
from fastdpo.training.report.speed import Stopwatch, peak_memory_gb
from fastdpo.training.trainer import DPOTrainer

CPU = torch.device("cpu")
COLUMNS = PAIRS.names
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
    assert PAIRS.averages(again.tensor(CPU).tolist()) == {}


def test_logs_have_lengths_quantiles_speed_and_memory(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    tables = []

    class Keep(MetricSums):
        def add(self, table: torch.Tensor) -> None:
            tables.append(table)
            super().add(table)

    trainer._metrics.training, trainer._metrics.evaluation = Keep(), Keep()
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


def test_a_checkpoint_that_a_later_callback_asks_for_is_no_part_of_the_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = True

    trainer = make(tmp_path, save_strategy="no", logging_steps=1)
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    for callback in (clock, Asks()):
        trainer.add_callback(callback)
    trainer.train()
    assert clock.now > 2000
    lines = [log for log in trainer.state.log_history if "loss" in log]
    tokens = np.diff([0, *(line["num_tokens"] for line in lines)])
    assert [line["tokens_per_second"] for line in lines] == tokens.tolist()


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


class StopAt(TrainerCallback):
    """Ends a run early; `event`: where the callback is called."""

    def __init__(self, step: int, event: str) -> None:
        self.step = step
        setattr(self, event, self._stop)

    def _stop(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


class Signal(TrainerCallback):
    """What a SIGTERM does at step 3."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.trainer._signals.stop(control)


def train_lines(trainer: DPOTrainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The logs of four steps, one each."""
    trainer = make(tmp_path_factory.mktemp("alone"), logging_steps=1, lr_scheduler_type="constant")
    trainer.train()
    return train_lines(trainer)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_steps": 10}, [3]),
        ({"logging_steps": 2}, [2, 3]),
        ({"logging_steps": 1}, [1, 2, 3]),
        ({"logging_steps": 0.4}, [2, 3]),
        ({"logging_steps": 10, "logging_first_step": True}, [1, 3]),
        ({"logging_strategy": "epoch"}, [3]),
        ({"max_steps": -1, "num_train_epochs": 1, "logging_strategy": "epoch"}, [4]),
        ({"max_steps": -1, "num_train_epochs": 1, "logging_steps": 3}, [3, 4]),
        ({"logging_strategy": "no", "logging_first_step": True}, [1]),
    ],
)
def test_the_last_window_is_logged_once(
    tmp_path: Path, alone: list[dict[str, float]], options: dict[str, Any], steps: list[int]
) -> None:
    trainer = make(tmp_path, **{"max_steps": 3, "lr_scheduler_type": "constant", **options})
    output = trainer.train()
    lines = train_lines(trainer)
    assert [line["step"] for line in lines] == steps
    for line, before in zip(lines, [0, *steps], strict=False):
        assert line.keys() == alone[0].keys()
        window = alone[before : int(line["step"])]
        for name in ("rewards/margins", "length/chosen", "loss"):
            assert line[name] == pytest.approx(np.mean([one[name] for one in window])), (name, line["step"])
        # the step's own
        assert [line["num_tokens"], line["epoch"]] == [window[-1]["num_tokens"], window[-1]["epoch"]]
    known = alone[: trainer.state.global_step]
    assert output.training_loss == pytest.approx(np.mean([one["loss"] for one in known]))
    # nothing is said twice: the run's own record has a window only where no log took it
    assert ("rewards/margins" in trainer.state.log_history[-1]) == (options.get("logging_strategy") == "no")


def test_without_logs_the_run_s_record_has_the_metrics_and_the_table_a_line(tmp_path: Path) -> None:
    whole = make(tmp_path / "logged", save_strategy="steps", save_steps=2)
    whole.train()
    folder = tmp_path / "silent"
    silent = make(folder, logging_strategy="no", save_strategy="steps", save_steps=2)
    silent.train()
    resumed = make(folder, logging_strategy="no", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    (line,) = train_lines(whole)
    for trainer in (silent, resumed):
        (record,) = trainer.state.log_history
        assert "loss" not in record
        for name in metrics.LOGGED & line.keys() - {"tokens_per_second", "peak_memory_gb"}:
            assert record[name] == line[name], name
        (row,) = metric_rows(trainer.state.log_history)
        assert row.keys() <= metrics.LOGGED | {"step", "epoch"}
        assert row["rewards/margins"] == line["rewards/margins"]
        runtime = summarize(trainer.state, trainer.args, {})["runtime"]
        assert runtime.keys() == {key for key in record if key.startswith("train_")}


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate", "on_save", "on_epoch_end"])
def test_a_run_that_a_callback_stops_logs_its_last_window(tmp_path: Path, event: str) -> None:
    often = {"on_log": {"logging_steps": 2}, "on_epoch_end": {"max_steps": 12}}.get(event, {"logging_steps": 10})
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, **{"max_steps": 8, "logging_steps": 10, **every, **often})
    trainer.add_callback(StopAt(2, event))
    trainer.train()
    stopped = 4 if event == "on_epoch_end" else 2
    assert trainer.state.global_step == stopped
    assert [line["step"] for line in train_lines(trainer)] == [stopped]


def test_a_resumed_run_ends_with_the_same_window(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "max_steps": 5}
    whole = make(tmp_path, **options)
    whole.train()
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    clock = ("tokens_per_second", "peak_memory_gb")
    wanted = [{name: value for name, value in line.items() if name not in clock} for line in train_lines(whole)]
    assert [line["step"] for line in wanted] == [3, 5]
    for trainer in (resumed, again):
        lines = [{name: value for name, value in line.items() if name not in clock} for line in train_lines(trainer)]
        assert lines == wanted


def test_a_run_that_a_signal_ends_leaves_its_window_to_the_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 10}
    first = make(tmp_path, **options)
    first.add_callback(Signal(first))
    with pytest.raises(SystemExit):
        first.train()
    assert train_lines(first) == []
    second = make(tmp_path, **options)
    second.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole")
    whole.train()
    (line,), (wanted,) = train_lines(second), train_lines(whole)
    for name in ("step", "loss", "rewards/margins", "num_tokens"):
        assert line[name] == wanted[name], name


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
