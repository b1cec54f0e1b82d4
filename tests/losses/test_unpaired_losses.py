"""Losses of single answers against their definitions in float64, value and gradient; and what the options refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.losses import UNPAIRED_LOSSES, LossOptions, UnpairedOptions, kl_shift, unpaired_loss

# logits of up to +-300 after beta: where 1 - sigmoid rounds to 0 and exp overflows
LOGPS = torch.tensor([-3.0, -40.0, -0.01, -900.0, -120.0, -12.0], dtype=torch.float64)
REF = torch.tensor([-3.5, -12.0, -3.0, -20.0, -900.0, -12.0], dtype=torch.float64)
LABEL = torch.tensor([True, False, True, True, False, False])
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.25}
SHIFTS = {"kto": 0.3, "bco": -0.7, "apo_zero_unpaired": 0.0}


def by_definition(name: str, logps: list[float], ref: list[float], labels: list[bool], beta: float) -> list[float]:
    """Each loss as its paper writes it, a row at a time, with Python's numbers."""
    losses = []
    for mine, theirs, good in zip(logps, ref, labels, strict=True):
        weight = WEIGHTS["desirable_weight"] if good else WEIGHTS["undesirable_weight"]
        reward = beta * (mine - theirs)
        x = reward - SHIFTS[name] if good else SHIFTS[name] - reward
        if name == "bco":
            losses.append(weight * (math.log1p(math.exp(-abs(x))) + max(-x, 0.0)))
        else:
            losses.append(weight / (1 + math.exp(min(x, 700.0))))
    return losses


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_values_and_gradients(name: str) -> None:
    beta, step = 0.3, 1e-6
    logps = LOGPS.clone().requires_grad_()
    output = unpaired_loss(
        logps, REF, LABEL, name, beta=beta, shift=torch.tensor(SHIFTS[name], dtype=torch.float64), **WEIGHTS
    )
    wanted = by_definition(name, LOGPS.tolist(), REF.tolist(), LABEL.tolist(), beta)
    torch.testing.assert_close(output.losses, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.rewards, beta * (LOGPS - REF))
    assert not output.rewards.requires_grad
    (grad,) = torch.autograd.grad(output.losses.sum(), logps)
    for row in range(len(LOGPS)):
        sides = []
        for sign in (step, -step):
            moved = LOGPS.clone()
            moved[row] += sign
            sides.append(by_definition(name, moved.tolist(), REF.tolist(), LABEL.tolist(), beta)[row])
        assert float(grad[row]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-10)
    # the oracle sees a label that is turned
    assert by_definition(name, LOGPS.tolist(), REF.tolist(), (~LABEL).tolist(), beta) != pytest.approx(wanted)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_a_policy_that_is_the_reference(name: str) -> None:
    losses = unpaired_loss(REF, REF, LABEL, name).losses
    torch.testing.assert_close(losses, torch.full_like(REF, math.log(2) if name == "bco" else 0.5))


def test_the_estimate_of_the_kl() -> None:
    ours, theirs = torch.tensor([-1.0, -2.0]).requires_grad_(), torch.tensor([-3.0, -1.0])
    shift = kl_shift(ours, theirs, beta=0.2)
    assert float(shift) == pytest.approx(0.2 * 0.5)
    assert not shift.requires_grad
    assert float(kl_shift(theirs, ours.detach(), beta=0.2)) == 0, "a KL is not below 0"
    narrow = kl_shift(ours.bfloat16(), theirs.bfloat16(), beta=0.2)
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_log_probs_are_taken_in_fp32(dtype: torch.dtype) -> None:
    def run(logps: Tensor, ref: Tensor) -> Tensor:
        return unpaired_loss(logps, ref, LABEL, "bco", beta=2.0).losses

    narrow = run(LOGPS.to(dtype), REF.to(dtype))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, run(LOGPS.to(dtype).float(), REF.to(dtype).float()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "sigmoid"}, "unknown loss 'sigmoid' of unpaired rows; choose from kto, bco, apo_zero_unpaired"),
        ({"beta": 0}, "beta must be a number > 0, got 0"),
        ({"desirable_weight": -1}, "desirable_weight must be a number >= 0, got -1"),
        ({"undesirable_weight": math.nan}, "undesirable_weight must be a number >= 0, got nan"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="^" + said):
        UnpairedOptions(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"loss_type": ["kto", "sft"]},
            "unknown loss 'kto'; .* Here it is kto in DPOConfig, alone, for single answers",
        ),
        ({"loss_type": "kto", "label_smoothing": 0.1}, "label_smoothing is for losses of pairs, got 0.1; leave it out"),
        ({"loss_type": "bco", "rpo_alpha": 1.0}, "rpo_alpha is for losses of pairs, got 1.0; leave it out for 'bco'"),
        ({"loss_type": "kto", "reference_free": True}, "reference_free is for losses of pairs"),
        ({"loss_type": "kto", "per_device_train_batch_size": 1}, "kto estimates its KL from answers under the prompts"),
        ({"desirable_weight": 2.0}, "desirable_weight is for single answers with a label .*, and the loss sigmoid"),
    ],
)
def test_configs_that_make_no_sense(tmp_path: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_the_order_of_rows_is_trls_unless_it_is_given(tmp_path: Any) -> None:
    def strategy(**options: Any) -> str | None:
        return DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options).train_sampling_strategy

    assert [strategy(loss_type=name) for name in ("sigmoid", "kto", "bco", "apo_zero_unpaired")] == [
        *("random", "sequential", "random", "sequential")
    ]
    assert strategy(loss_type="kto", train_sampling_strategy="random") == "random"


def test_a_module_of_pairs_says_where_the_loss_is() -> None:
    with pytest.raises(
        ValueError, match="kto in DPOConfig, alone, for single answers with a label; kto_pair for pairs"
    ):
        LossOptions("kto")
