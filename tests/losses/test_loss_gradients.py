"""Every loss is differentiable, also far from the reference, and what is to have no gradient has none."""

import math

import pytest
import torch

from fastdpo.losses import LOSSES, PairLogps, preference_loss


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_unreduced_differentiable_and_cites_its_source(name):
    generator = torch.Generator().manual_seed(3)
    inputs = [(-3 * torch.rand(5, dtype=torch.float64, generator=generator) - 0.5).requires_grad_() for _ in range(4)]
    lengths = tuple(torch.randint(1, 9, (5,), generator=generator) for _ in range(2))

    def loss(*logps):
        return preference_loss(PairLogps(*logps, *lengths), name, 0.4).losses

    assert loss(*inputs).shape == (5,)
    # kto_pair stops the gradient of its batch mean: see its own test
    if name != "kto_pair":
        assert torch.autograd.gradcheck(loss, inputs)
    row = LOSSES[name]
    assert row.paper in (row.function.__doc__ or "") or name == "sft"
    assert row.paper.startswith("arXiv:")
    out = preference_loss(PairLogps(*inputs, *lengths), name, 0.4)
    assert not out.chosen_rewards.requires_grad
    # what says that it reads no reference reads none
    used = torch.autograd.grad(loss(*inputs).sum(), inputs[2:], allow_unused=True)
    assert all((g is None) == (not row.reference) for g in used)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences_are_differentiable(kind):
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(
        lambda *x: preference_loss(PairLogps(*x), "sigmoid", 0.4, f_divergence_type=kind).losses, inputs
    )
    # far from the reference: finite in fp32, with a finite gradient
    far = torch.tensor([-500.0, 500.0], requires_grad=True)
    preference_loss(
        PairLogps(far, -far, far.new_zeros(2), far.new_zeros(2)), f_divergence_type=kind
    ).losses.sum().backward()
    assert torch.isfinite(far.grad).all()


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if loss.f_divergence and not loss.nll])
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_every_loss_under_every_divergence_has_its_gradient(name, kind):
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    lengths = torch.tensor([3, 1, 2, 5]), torch.tensor([2, 2, 4, 1])
    assert torch.autograd.gradcheck(
        lambda *x: preference_loss(PairLogps(*x, *lengths), name, 0.4, f_divergence_type=kind).losses, inputs
    )


def test_kto_pair_has_no_gradient_through_its_kl_term():
    chosen = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64)
    preference_loss(PairLogps(chosen, zero, zero, zero), "kto_pair", 0.5).losses[0].backward()
    # of 0.5 (1 - s(beta (u_w - 0))): the second term depends on u_w by its mean alone
    p = 1 / (1 + math.exp(-1.5))
    assert chosen.grad.tolist() == pytest.approx([-0.5 * 0.5 * p * (1 - p), 0.0])


def test_the_weight_of_a_pair_has_no_gradient(three):
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    chosen = three.chosen.clone().requires_grad_()
    logps = three._replace(chosen=chosen, pair_weight=weight)
    preference_loss(logps, use_weighting=True).losses.sum().backward()
    assert weight.grad is None
    assert chosen.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_stay_finite(name, dtype):
    """Log-ratios of 100 nats either way, certain tokens (log-prob 0) and empty completions."""
    chosen = torch.tensor([-300.0, -100.0, 0.0, -50.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-100.0, -300.0, -50.0, 0.0], dtype=dtype, requires_grad=True)
    reference = torch.tensor([-200.0, -200.0, 0.0, 0.0], dtype=dtype)
    lengths = torch.tensor([30, 30, 0, 5]), torch.tensor([30, 30, 5, 0])
    out = preference_loss(PairLogps(chosen, rejected, reference, reference, *lengths), name, 0.3)
    assert out.losses.dtype == torch.float32
    out.losses.sum().backward()
    for x in (out.losses, chosen.grad, rejected.grad):
        assert x is None or torch.isfinite(x).all()
