"""A run of 12 steps that saves every 4 and draws random numbers at every step: killed and resumed, it logs the same."""

import json
from pathlib import Path
from typing import Any

import tiny_runs
from fastdpo.training.trainer import DPOTrainer

STEPS = 12
# the first logged loss after a resume averages steps from before and after the checkpoint
OPTIONS: dict[str, Any] = {"max_steps": STEPS, "save_steps": 4, "logging_steps": 3}


def make(folder: Path, peft: bool = False, callbacks: Any = None, **options: Any) -> DPOTrainer:
    # random numbers are drawn at every step, so that a wrong generator state shows
    usual = {**OPTIONS, "gradient_accumulation_steps": 2, "disable_dropout": False, "save_strategy": "steps"}
    return tiny_runs.make(
        folder,
        tiny_runs.model(attention_dropout=0.1),
        tiny_runs.pairs(18),
        callbacks=callbacks,
        peft_config=tiny_runs.lora(lora_dropout=0.1) if peft else None,
        **{**usual, **options},
    )


def history(folder: Path, step: int = STEPS) -> list[dict[str, float]]:
    """The logged lines without what depends on the clock."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "loss" in line]
    return [{name: value for name, value in line.items() if not on_clock(name)} for line in lines]


def on_clock(name: str) -> bool:
    """Whether a metric is of the machine, not of the training."""
    return name.endswith(("runtime", "_per_second", "peak_memory_gb"))
