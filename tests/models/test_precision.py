"""16-bit weights that a learning rate cannot change are said once; what needs a GPU is refused before weights load."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.models.precision import stuck_share
from tiny_runs import lora, make, model

WORDS = "too small to change"


def changed_share(folder: Path, dtype: torch.dtype, rate: float) -> tuple[float, Any]:
    policy = model().to(dtype)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer = make(folder, policy, learning_rate=rate, max_steps=8, lr_scheduler_type="constant")
    trainer.train()
    changed = sum(int((p != before[name]).sum()) for name, p in policy.named_parameters())
    return changed / sum(p.numel() for p in policy.parameters()), trainer


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 5e-7), (torch.float16, 5e-7)])
def test_weights_that_do_not_move_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype, rate: float
) -> None:
    with caplog.at_level(logging.WARNING):
        share, _ = changed_share(tmp_path / "coarse", dtype, rate)
    (line,) = [line for line in caplog.messages if WORDS in line]
    assert f"of the trained weights are {str(dtype).removeprefix('torch.')} numbers" in line
    assert "load the model in float32" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fine, _ = changed_share(tmp_path / "fine", torch.float32, rate)
    assert not [line for line in caplog.messages if WORDS in line]
    assert share < 0.1 < 0.3 < fine


def test_the_share_is_that_of_a_step(tmp_path: Path) -> None:
    weights = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.05
    for rate in (1e-6, 1e-5, 1e-4, 1e-3):
        unchanged = float((weights - rate == weights).float().mean())
        assert stuck_share([weights], rate) == pytest.approx(unchanged, abs=0.06)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (lambda: model().bfloat16(), {"learning_rate": 1e-2}),
        (lambda: model().bfloat16(), {"learning_rate": 5e-7, "peft_config": lora()}),
        (lambda: model().bfloat16(), {"learning_rate": 5e-7, "optim": "sgd"}),
        (lambda: model().bfloat16(), {"learning_rate": 5e-7, "optim_args": "bf16_stochastic_round=True"}),
        (model, {"learning_rate": 5e-7}),
    ],
)
def test_a_healthy_run_hears_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: Any, options: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING):
        make(tmp_path, policy(), **options)
    assert not [line for line in caplog.messages if WORDS in line]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel needs a GPU, since its kernels are Triton's"),
        ({"fp16": True}, "fp16=True needs a GPU, and this run is on the CPU"),
        ({"optim": "adamw_bnb_8bit"}, "needs bitsandbytes, which is not installed"),
        ({"optim": "paged_adamw_32bit"}, "needs bitsandbytes, which is not installed"),
    ],
)
def test_what_is_not_here_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("fastdpo.models.precision.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=words):
        make(tmp_path, "no such model", **options)
