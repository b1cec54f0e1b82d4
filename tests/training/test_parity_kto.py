"""Losses of single answers against TRL 1.16's KTOTrainer on the same model, data and arguments: 20 steps in fp32."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl_runs import STEPS, train

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.trainer import DPOTrainer

trl = pytest.importorskip("trl")

RELATIVE = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "entropy", "logits/chosen", "logits/rejected")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")
EXACT = ("num_tokens", "learning_rate", "epoch")


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """torch.empty as it is: see test_parity_trl.py."""


@pytest.fixture(scope="module")
def answers(real_pairs: Dataset) -> Dataset:
    """Each pair gives one answer or the other, and some both."""
    rows = []
    for index, row in enumerate(real_pairs):
        sides = [("chosen", True), ("rejected", False)]
        for side, label in sides if index % 3 == 0 else [sides[index % 2]]:
            rows.append({"prompt": row["prompt"], "completion": row[side], "label": label})
    return Dataset.from_list(rows[:54])


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) == STEPS
    assert {name for line in theirs for name in line} - {"kl"} <= {name for line in ours for name in line}
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in RELATIVE:
            assert mine.get(name) == pytest.approx(other.get(name), rel=2e-3), (step, name)
        for name in REWARDS:
            if name in mine or name != "kl":
                assert mine.get(name) == pytest.approx(other.get(name), rel=1e-3, abs=2e-4), (step, name)
        for name in EXACT:
            assert mine[name] == other[name], (step, name)


@pytest.mark.parametrize(
    ("peft", "options"),
    [
        (False, {"desirable_weight": 1.2, "per_device_train_batch_size": 3}),
        (True, {"gradient_checkpointing": True, "undesirable_weight": 0.7, "beta": 0.3}),
        (False, {"loss_type": "apo_zero_unpaired"}),
    ],
    ids=["full", "lora, checkpointing", "apo_zero_unpaired"],
)
def test_twenty_steps_equal_trl_s(
    tmp_path: Path, model_folder: Path, answers: Dataset, peft: bool, options: dict[str, Any]
) -> None:
    options = {"gradient_checkpointing": False, "loss_type": "kto", **options}
    ours = train(DPOTrainer, DPOConfig, tmp_path / "ours", model_folder, answers, peft, **options)
    theirs = train(trl.KTOTrainer, trl.KTOConfig, tmp_path / "trl", model_folder, answers, peft, **options)
    # the comparison means something: the runs move, and the estimate of the KL is not 0 throughout
    assert max(abs(line.get("rewards/margins", 0)) for line in theirs) > 2e-2
    assert options["loss_type"] != "kto" or sum(line["kl"] > 0.01 for line in theirs) > 3
    compare(ours, theirs)


def test_a_wrong_weight_is_seen(tmp_path: Path, model_folder: Path, answers: Dataset) -> None:
    """The comparison's own check: 1 % of a weight is outside its bounds."""
    options = {"gradient_checkpointing": False, "loss_type": "kto"}
    runs = [
        train(DPOTrainer, DPOConfig, tmp_path, model_folder, answers, False, desirable_weight=weight, **options)
        for weight in (1.0, 1.01)
    ]
    with pytest.raises(AssertionError, match="loss"):
        compare(*runs)
