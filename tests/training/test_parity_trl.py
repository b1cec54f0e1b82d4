"""DPOTrainer against TRL 1.16's on the same model, data, seed and arguments: 20 steps in fp32 on real pairs."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl_runs import STEPS, train

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.trainer import DPOTrainer

trl = pytest.importorskip("trl")

RELATIVE = ("loss", "grad_norm", "logps/chosen", "logps/rejected")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
EXACT = ("num_tokens", "learning_rate", "epoch")
STATISTICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """torch.empty as it is.

    A patched one, or one that torch met while it was patched, escapes `with torch.device("meta")`:
    from_pretrained then draws random numbers, and TRL seeds its adapter before it loads.
    """


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
    tmp_path: Path, model_folder: Path, real_pairs: Dataset, peft: bool, options: dict[str, Any]
) -> None:
    ours = train(DPOTrainer, DPOConfig, tmp_path / "ours", model_folder, real_pairs, peft, **options)
    if isinstance(options.get("loss_type"), str):
        options = {**options, "loss_type": [options["loss_type"]]}
    theirs = train(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", model_folder, real_pairs, peft, **options)
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


def test_a_wrong_beta_is_seen(tmp_path: Path, model_folder: Path, real_pairs: Dataset) -> None:
    """The comparison's own check: 1 % of beta is outside its bounds."""
    runs = [
        train(DPOTrainer, DPOConfig, tmp_path, model_folder, real_pairs, False, beta=beta, gradient_checkpointing=False)
        for beta in (0.1, 0.101)
    ]
    assert any(
        abs(a[name] - b[name]) > 1e-3 * abs(b[name]) + 2e-4 for a, b in zip(*runs, strict=True) for name in REWARDS
    )
