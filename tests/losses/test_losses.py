"""The losses against hand numbers and identities; the modules against the plain formulas."""

import math
from pathlib import Path

import pytest
import torch

from fastdpo.losses import (
    LOSSES,
    LossOptions,
    PairLogps,
    ld_mask_weights,
    ld_token_weights,
    preference_loss,
    wpo_pair_weights,
)
from fastdpo.losses.modules import DPOLoss, FusedLinearDPOLoss
from fastdpo.losses.table import render

LN2 = math.log(2)


def pairs(*values: tuple[float, float, float, float], lengths=None) -> PairLogps:
    columns = (torch.tensor(c, dtype=torch.float64) for c in zip(*values, strict=True))
    return PairLogps(*columns, *(torch.tensor(x) for x in (lengths or ())))


# (chosen, rejected, ref_chosen, ref_rejected): h = (-10 - -12) - (-20 - -19) = 3
ONE = pairs((-10.0, -20.0, -12.0, -19.0), lengths=([4], [5]))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# one pair: u_w = 2, u_l = -1, h = 3, lengths 4 and 5, beta 0.5 unless said
HAND = [
    ("sigmoid", {"beta": 0.1}, 0.5543552444685272),  # log(1 + e^-0.3)
    ("sigmoid", {}, 0.20141327798275246),  # log(1 + e^-1.5)
    ("sigmoid", {"beta": 0.1, "label_smoothing": 0.2}, 0.6143552444685272),  # + 0.2 * 0.3
    ("hinge", {"beta": 0.1}, 0.7),
    ("hinge", {}, 0.0),
    ("ipo", {"beta": 0.1}, (2 / 4 - -1 / 5 - 5) ** 2),
    (
        "exo_pair",
        {"label_smoothing": 0.1},
        s(1.5) * (log_sigmoid(1.5) - math.log(0.9)) + s(-1.5) * (log_sigmoid(-1.5) - math.log(0.1)),
    ),
    (
        "exo_pair",
        {},
        s(1.5) * (log_sigmoid(1.5) - math.log(0.999)) + s(-1.5) * (log_sigmoid(-1.5) - math.log(0.001)),
    ),
    ("nca_pair", {}, -log_sigmoid(1.0) - 0.5 * log_sigmoid(-1.0) - 0.5 * log_sigmoid(0.5)),
    ("robust", {"label_smoothing": 0.1}, (-0.9 * log_sigmoid(1.5) + 0.1 * log_sigmoid(-1.5)) / 0.8),
    ("bco_pair", {}, -log_sigmoid(1.0) - log_sigmoid(0.5)),
    ("sppo_hard", {}, (2 - 1) ** 2 + (-1 + 1) ** 2),
    ("sppo_hard", {"beta": 0.1}, (2 - 5) ** 2 + (-1 + 5) ** 2),
    ("aot", {}, -log_sigmoid(1.5)),
    ("aot_unpaired", {}, -log_sigmoid(1.5)),
    ("aot_pair", {"label_smoothing": 0.2}, -0.8 * log_sigmoid(1.5) - 0.2 * log_sigmoid(-1.5)),
    ("apo_zero", {}, 1 - s(1.0) + s(-0.5)),
    ("apo_down", {}, s(1.0) + 1 - s(1.5)),
    ("discopop", {"discopop_tau": 2.0}, (1 - s(0.75)) * -log_sigmoid(1.5) + s(0.75) * math.exp(-1.5)),
    ("sft", {}, 10 / 4),
    ("sigmoid_norm", {}, -log_sigmoid(0.5 * (2 / 4 + 1 / 5))),
    ("simpo", {"beta": 2.0, "simpo_gamma": 0.3}, -log_sigmoid(2 * (-10 / 4 + 20 / 5) - 0.3)),
    (
        "orpo",
        {},
        2.5 - 0.5 * log_sigmoid((-2.5 - math.log(1 - math.exp(-2.5))) - (-4.0 - math.log(1 - math.exp(-4.0)))),
    ),
    ("cpo", {"beta": 0.1, "cpo_alpha": 0.5}, -log_sigmoid(1.0) + 0.5 * 2.5),
    ("kto_pair", {}, 1 - 0.5 * s(0.5 * (2 - 0)) - 0.5 * s(0.5 * (2 - -1))),
    # options that go with any of them
    ("sigmoid", {"f_divergence_type": "forward_kl"}, -log_sigmoid(0.5 * (-math.exp(-2) + math.exp(1)))),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, -log_sigmoid(0.5 * (log_sigmoid(2) - log_sigmoid(-1)))),
    (
        "hinge",
        {"f_divergence_type": "alpha_divergence", "beta": 0.1},
        1 - 0.1 * ((math.exp(-1) - 1) / -0.5 - (math.exp(0.5) - 1) / -0.5),
    ),
    ("hinge", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0, "beta": 0.1}, 0.7),
    ("hinge", {"rpo_alpha": 2.0}, 2 * 10 / 4),
    ("hinge", {"pref_ftx": 3.0}, 3 * 10 / 4),
    ("sigmoid", {"aggregate": "mean"}, -log_sigmoid(0.5 * (2 / 4 + 1 / 5))),
    ("sigmoid", {"reference_free": True, "beta": 0.1}, -log_sigmoid(1.0)),
    ("hinge", {"rpo_alpha": 2.0, "aggregate": "mean", "beta": 10.0}, 2 * 10 / 4),
]


@pytest.mark.parametrize(("name", "options", "expected"), HAND)
def test_hand_numbers(name, options, expected):
    options = {"beta": 0.5, **options}
    out = preference_loss(ONE, name, **options)
    assert out.losses.shape == (1,)
    assert float(out.losses) == pytest.approx(expected, rel=1e-12)


def test_hand_numbers_cover_every_loss():
    covered = {LossOptions(name).names[0] for name, _, _ in HAND}
    assert covered == set(LOSSES)


def test_rewards():
    out = preference_loss(ONE, "sigmoid", 0.5)
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((1.0, -0.5))
    out = preference_loss(ONE, "sigmoid", 0.5, aggregate="mean")
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((0.25, -0.1))
    # without a reference: the policy's log-probs, per token where the loss takes them so
    out = preference_loss(ONE, "simpo", 2.0)
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((-5.0, -8.0))
    for options in ({}, {"reference_free": True}):
        out = preference_loss(ONE, "simpo", 2.0, **options)
        assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((-5.0, -8.0))
    out = preference_loss(ONE, ["cpo", "simpo"], 0.5)
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((-5.0, -10.0))
    out = preference_loss(ONE, "sigmoid", 0.5, reference_free=True)
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((-5.0, -10.0))


def test_ipo_without_lengths_takes_log_probs_as_averages():
    averaged = ONE._replace(chosen_len=None, rejected_len=None)
    assert float(preference_loss(averaged, "ipo", 0.1).losses) == pytest.approx((3 - 5) ** 2)


def test_identities():
    some = pairs((-10.0, -20.0, -12.0, -19.0), (-3.0, -1.0, -2.5, -2.0))
    swapped = PairLogps(some.rejected, some.chosen, some.ref_rejected, some.ref_chosen)
    plain, flipped = (preference_loss(x, "sigmoid", 0.3).losses for x in (some, swapped))
    # log sigmoid(h) - log sigmoid(-h) = h
    assert torch.allclose(flipped - plain, 0.3 * some.margin)
    smooth = preference_loss(some, "sigmoid", 0.3, label_smoothing=0.25).losses
    assert torch.allclose(smooth, 0.75 * plain + 0.25 * flipped)
    both = preference_loss(some, ["sigmoid", "hinge"], 0.3, loss_weights=[0.8, 2.0]).losses
    assert torch.allclose(both, 0.8 * plain + 2.0 * preference_loss(some, "hinge", 0.3).losses)


SOME = pairs(
    (-10.0, -20.0, -12.0, -19.0), (-3.0, -1.0, -2.5, -2.0), (-8.0, -4.5, -8.1, -4.0), lengths=([4, 2, 9], [5, 1, 3])
)


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if "label_smoothing" in loss.options])
def test_label_smoothing_is_the_mixture_of_both_labels(name):
    """0 is the plain loss; e > 0 is (1 - e) of it plus e of the swapped pair's, unless the loss says otherwise."""
    plain = preference_loss(SOME, name, 0.3).losses
    assert torch.equal(plain, preference_loss(SOME, name, 0.3, label_smoothing=0.0).losses)
    smooth = preference_loss(SOME, name, 0.3, label_smoothing=0.25).losses
    assert not torch.allclose(plain, smooth)
    if name == "sigmoid":
        swapped = PairLogps(SOME.rejected, SOME.chosen, SOME.ref_rejected, SOME.ref_chosen)
        flipped = preference_loss(swapped, name, 0.3).losses
        assert torch.allclose(smooth, 0.75 * plain + 0.25 * flipped)
        # robust is unbiased: mixing it over the two labels gives the plain loss back
        kept, turned = (preference_loss(x, "robust", 0.3, label_smoothing=0.25).losses for x in (SOME, swapped))
        assert torch.allclose(0.75 * kept + 0.25 * turned, plain)


def test_options_compose():
    base = preference_loss(SOME, ["sigmoid", "sft"], 0.3, loss_weights=[1.0, 0.7]).losses
    assert torch.allclose(base, preference_loss(SOME, "sigmoid", 0.3, rpo_alpha=0.7).losses)
    # every term is weighted by WPO but the likelihood
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    weighed = preference_loss(
        SOME._replace(pair_weight=weight), ["sigmoid", "sft"], 0.3, loss_weights=[1.0, 0.7], use_weighting=True
    ).losses
    nll = preference_loss(SOME, "sft").losses
    assert torch.allclose(weighed - 0.7 * nll, weight * (base - 0.7 * nll))
    # simpo is the reference-free normalized sigmoid with a margin; the plain one has the margin 0
    free = preference_loss(SOME, "sigmoid_norm", 0.3, reference_free=True).losses
    assert torch.allclose(free, preference_loss(SOME, "simpo", 0.3, simpo_gamma=0.0).losses)
    # sorting changes which margins meet, not their sum
    hinge = [preference_loss(SOME, name, 1e-3).losses for name in ("aot", "sigmoid")]
    assert not torch.allclose(*hinge)
    assert torch.allclose(hinge[0].mean(), hinge[1].mean(), rtol=1e-5)


def test_divergences_agree_at_small_ratios():
    """f'(1) = 0 and f''(1) > 0: near the reference every divergence is reverse KL up to scale."""
    near = SOME._replace(chosen=SOME.ref_chosen + 1e-4, rejected=SOME.ref_rejected - 2e-4)
    slopes = {"forward_kl": 1.0, "js_divergence": 0.5, "alpha_divergence": 1.0}
    plain = preference_loss(near, "hinge", 1.0).losses - 1
    for kind, slope in slopes.items():
        other = preference_loss(near, "hinge", 1.0, f_divergence_type=kind).losses - 1
        assert torch.allclose(other, slope * plain, rtol=1e-3), kind


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


def test_kto_pair_has_no_gradient_through_its_kl_term():
    chosen = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64)
    preference_loss(PairLogps(chosen, zero, zero, zero), "kto_pair", 0.5).losses[0].backward()
    # of 0.5 (1 - s(beta (u_w - 0))): the second term depends on u_w by its mean alone
    p = s(1.5)
    assert chosen.grad.tolist() == pytest.approx([-0.5 * 0.5 * p * (1 - p), 0.0])


# three pairs of other lengths, beta 0.5: what a mean over the batch or a sort does shows here
THREE = pairs(
    (-4.0, -9.0, -7.0, -8.0), (-6.0, -3.0, -5.0, -5.5), (-2.0, -5.0, -1.0, -9.0), lengths=([4, 1, 2], [5, 2, 8])
)


def test_batch_statistics_by_hand():
    u_w, u_l = [3.0, -1.0, -1.0], [-1.0, 2.5, 4.0]
    z_w, z_l = sum(u_w) / 3, sum(u_l) / 3
    kto = [0.5 * s(-0.5 * (w - z_l)) + 0.5 * s(-0.5 * (z_w - r)) for w, r in zip(u_w, u_l, strict=True)]
    assert preference_loss(THREE, "kto_pair", 0.5).losses.tolist() == pytest.approx(kto)
    # means below 0 count as 0
    worse = THREE._replace(ref_chosen=THREE.chosen + 1, ref_rejected=THREE.rejected + 1)
    flat = [0.5 * s(0.5) + 0.5 * s(-0.5)] * 3
    assert preference_loss(worse, "kto_pair", 0.5).losses.tolist() == pytest.approx(flat)
    nll = 12 / 7  # all chosen tokens weigh the same: not the mean of 1, 6 and 1
    assert preference_loss(THREE, "sft").losses.tolist() == pytest.approx([nll] * 3)
    margins = [5.0, -3.0, 3.0]
    cpo = [-log_sigmoid(0.5 * m) + nll for m in margins]
    assert preference_loss(THREE, "cpo", 0.5).losses.tolist() == pytest.approx(cpo)
    unpaired = [-log_sigmoid(0.5 * (a - b)) for a, b in zip(sorted(u_w), sorted(u_l), strict=True)]
    assert preference_loss(THREE, "aot_unpaired", 0.5).losses.tolist() == pytest.approx(unpaired)
    policy, reference = sorted(margins), sorted([1.0, 0.5, 8.0])
    paired = [-log_sigmoid(0.5 * (a - b)) for a, b in zip(policy, reference, strict=True)]
    assert preference_loss(THREE, "aot", 0.5).losses.tolist() == pytest.approx(paired)
    weighed = THREE._replace(chosen_nll_sum=2 * THREE.chosen)
    with_ftx = preference_loss(weighed, "hinge", 0.5, ld_alpha=0.5, pref_ftx=1.0).losses
    without = preference_loss(weighed, "hinge", 0.5, ld_alpha=0.5).losses
    assert (with_ftx - without).tolist() == pytest.approx([2.0, 12.0, 2.0])


def test_the_weight_of_a_pair_has_no_gradient():
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    chosen = THREE.chosen.clone().requires_grad_()
    logps = THREE._replace(chosen=chosen, pair_weight=weight)
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


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if loss.f_divergence and not loss.nll])
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_every_loss_under_every_divergence_has_its_gradient(name, kind):
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    lengths = torch.tensor([3, 1, 2, 5]), torch.tensor([2, 2, 4, 1])
    assert torch.autograd.gradcheck(
        lambda *x: preference_loss(PairLogps(*x, *lengths), name, 0.4, f_divergence_type=kind).losses, inputs
    )


def test_a_term_of_weight_0_is_left_out():
    far = PairLogps(*(torch.tensor([x]) for x in (-1e30, 0.0, 0.0, 0.0)))
    out = preference_loss(far, ["hinge", "sppo_hard"], loss_weights=[1.0, 0.0])
    assert torch.isfinite(out.losses).all()
    assert preference_loss(SOME, "hinge", loss_weights=[0.0]).losses.tolist() == [0.0] * 3


def test_ld_weights_and_wpo_weights():
    # two pairs: chosen lengths 3 and 1, rejected 1 and 2
    offsets = torch.tensor([0, 3, 4, 5, 7])
    assert ld_token_weights(offsets, 7, 0.25).tolist() == [1, 0.25, 0.25, 1, 1, 1, 0.25]
    scored = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    assert ld_mask_weights(scored, 0.25)[scored].tolist() == [1, 0.25, 0.25, 1, 1, 1, 0.25]
    logp, lsq = torch.randn(7), torch.randn(7)
    parts = (logp - lsq).split([3, 1, 1, 2])
    weights = wpo_pair_weights(torch.stack([x.sum() for x in parts]), offsets.diff())
    aligned = [x.mean() for x in parts]
    assert torch.allclose(weights, torch.stack([aligned[0] + aligned[2], aligned[1] + aligned[3]]).exp())


def test_step_zero_loss_is_ln_2_to_the_last_bit():
    x = torch.randn(6) * 500
    out = preference_loss(PairLogps(x[:3], x[3:], x[:3], x[3:]))
    assert torch.equal(out.losses, torch.full((3,), LN2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"loss_type": "sigmoi"},
            r"unknown loss 'sigmoi'; choose from sigmoid, hinge, .* Did you mean 'sigmoid'\?",
        ),
        ({"loss_type": "sigmoid", "beta": 0.0}, r"beta must be a number > 0, got 0.0"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            r"'hinge' has no label smoothing.*to sigmoid, exo_pair, robust",
        ),
        ({"loss_type": "sigmoid", "label_smoothing": 0.5}, r"must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, r"1 numbers for 2 losses \(sigmoid, ipo\)"),
        ({"loss_type": []}, r"loss_type is empty"),
        ({"loss_type": None}, r"loss_type must be a name or a list of names, got None"),
        ({"loss_type": "sigmoid", "beta": math.inf}, r"beta must be a number > 0, got inf"),
        ({"loss_type": "sigmoid", "loss_weights": [-1.0]}, r"must be a list of numbers >= 0, .* got \[-1.0\]"),
        ({"loss_type": "sigmoid", "loss_weights": 1.0}, r"must be a list of numbers >= 0, .* got 1.0"),
        ({"discopop_tau": 0.0}, r"discopop_tau must be a number > 0, got 0.0"),
        ({"f_alpha_divergence_coef": None}, r"f_alpha_divergence_coef must be a number, got None"),
        ({"simpo_gamma": -0.5}, r"simpo_gamma must be a number >= 0, got -0.5"),
        ({"rpo_alpha": "1"}, r"rpo_alpha must be a number >= 0, got '1'"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5; 1 is plain DPO"),
        (
            {"f_divergence_type": "reverse"},
            r"must be one of .*got 'reverse'. Did you mean 'reverse_kl'",
        ),
        ({"loss_type": [["sigmoid"]]}, r"loss_type must be a name or a list of names, got \[\['sigmoid'\]\]"),
        ({"cpo_alpha": None}, r"cpo_alpha must be a number >= 0, got None"),
        ({"use_weighting": "no"}, r"use_weighting must be True or False, got 'no'"),
        ({"aggregate": "avg"}, r"aggregate must be one of sum, mean, got 'avg'"),
        (
            {"loss_type": "simpo", "f_divergence_type": "forward_kl"},
            r"does not apply to the loss 'simpo'",
        ),
        ({"loss_type": "aot", "use_weighting": True}, r"weighs pairs, and the loss 'aot' sorts them"),
    ],
)
def test_bad_options_get_one_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        LossOptions(**{"beta": 0.1, **arguments})
    with pytest.raises(ValueError, match=words):
        DPOLoss(**arguments)


def test_dpo_loss_module():
    module = DPOLoss("ipo", beta=0.2)
    policy, ref = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.5, -2.5, -2.5, -3.5])
    lengths = torch.tensor([2, 1, 2, 4])
    loss, out = module(policy, ref, lengths)
    assert torch.allclose(out.losses, torch.tensor([(0.25 + 0.25 - 2.5) ** 2, (0.5 + 0.125 - 2.5) ** 2]))
    assert torch.allclose(loss, out.losses.mean())
    assert repr(module) == "DPOLoss(loss_type='ipo', beta=0.2)"
    with pytest.raises(ValueError, match=r"must be \(2B,\), chosen rows then rejected rows, got \(3,\)"):
        module(policy[:3], ref[:3])
    with pytest.raises(ValueError, match=r"ref_logps must be \(4,\) like policy_logps, got \(2,\)"):
        module(policy, ref[:2])


EXTRAS = {
    "": {},
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.3},
    "rpo": {"rpo_alpha": 0.5, "pref_ftx": 0.25},
    "free": {"reference_free": True},
    "mean": {"aggregate": "mean"},
}
CASES = [(name, "") for name in LOSSES] + [("sigmoid", extra) for extra in EXTRAS if extra]
CASES += [("sft", "ld"), ("simpo", "mean"), ("ipo", "mean"), ("simpo", "wpo")]


@pytest.mark.parametrize("head", ["frozen", "trained", "lora"])
@pytest.mark.parametrize(("name", "extra"), CASES)
def test_fused_equals_unfused(name, extra, head):
    """The module from hidden states, against logits, log_softmax and the formulas on plain sums."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, ref_hidden = randn(4, 7, 12), randn(4, 7, 12)
    weight, ref_weight = randn(50, 12), randn(50, 12)
    down, up = randn(3, 12), randn(50, 3)
    labels = torch.randint(0, 50, (4, 7), generator=generator)
    labels[:, :2] = -100
    labels[1, 4:] = -100
    options = EXTRAS[extra]
    module = FusedLinearDPOLoss(name, beta=0.3, **options)
    scored = labels != -100
    lengths = scored.sum(1)

    def unfused(h, w):
        logp = (h @ w.T).log_softmax(-1)
        tokens = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored
        return tokens, (2 * logp).logsumexp(-1)

    def plain(h, w):
        policy, lsq = unfused(h, w)
        reference, _ = unfused(ref_hidden, ref_weight)
        factor = torch.ones_like(policy)
        if "ld_alpha" in options:
            shared = torch.minimum(*lengths.chunk(2)).repeat(2)
            factor[scored.cumsum(1) > shared[:, None]] = options["ld_alpha"]
        pair = PairLogps(
            *(policy * factor).sum(1).chunk(2),
            *(reference * factor).sum(1).chunk(2),
            *lengths.chunk(2),
            chosen_nll_sum=policy.sum(1)[:2],
        )
        if "use_weighting" in options:
            aligned = (((policy - lsq) * scored).sum(1) / lengths).detach().exp()
            pair = pair._replace(pair_weight=aligned[:2] * aligned[2:])
        return preference_loss(pair, name, 0.3, **options)

    def run(fused: bool):
        h, w, a, b = (x.clone().requires_grad_() for x in (hidden, weight, down, up))
        parts = {"frozen": (h,), "trained": (h, w), "lora": (h, a, b)}[head]
        if head == "frozen":
            w = w.detach()
        if not fused:
            out = plain(h, w if head != "lora" else w.detach() + b @ a)
            loss = out.losses.mean()
        else:
            lora = (h @ a.T, b) if head == "lora" else None
            w = w.detach() if head == "lora" else w
            loss, out = module(w, h, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, lora=lora)
        loss.backward()
        return loss.detach(), out.losses.detach(), out.chosen_rewards, *(x.grad for x in parts)

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_unfused_module_is_the_same_formula():
    for name, row in LOSSES.items():
        sums, refs = torch.cat(SOME[:2]), torch.cat(SOME[2:4])
        lengths = torch.cat(SOME[4:6])
        loss, out = DPOLoss(name, beta=0.3)(sums, refs if row.reference else None, lengths)
        assert torch.equal(out.losses, preference_loss(SOME, name, 0.3).losses)
        assert torch.equal(loss, out.losses.mean())
    with pytest.raises(ValueError, match="ipo compares with a reference; pass ref_logps"):
        DPOLoss("ipo")(torch.zeros(2))
    with pytest.raises(ValueError, match=r"ld_alpha=0\.0 needs"):
        DPOLoss(ld_alpha=0.0)
    with pytest.raises(ValueError, match="weighs tokens before their sum"):
        preference_loss(SOME, ld_alpha=0.3)
    with pytest.raises(ValueError, match="average=True is aggregate='mean'"):
        FusedLinearDPOLoss(average=True, aggregate="sum")
    with pytest.raises(ValueError, match=r"ld_alpha=0\.5 needs the log-probs of each token"):
        DPOLoss(ld_alpha=0.5)
    with pytest.raises(ValueError, match="sft is a mean over tokens and needs chosen_len"):
        DPOLoss("sft")(torch.zeros(2))
    with pytest.raises(ValueError, match=r"use_weighting \(WPO\) needs pair_weight"):
        preference_loss(SOME, use_weighting=True)


def test_fused_module_takes_precomputed_reference_and_shift():
    hidden, weight = torch.randn(2, 6, 8), torch.randn(30, 8)
    labels = torch.randint(0, 30, (2, 6))
    aligned, shifted = FusedLinearDPOLoss(), FusedLinearDPOLoss(shift=True)
    ref_logps = torch.tensor([-3.0, -4.0])
    a, _ = aligned(weight, hidden[:, :-1], labels[:, 1:], ref_logps=ref_logps)
    b, _ = shifted(weight, hidden, labels, ref_logps=ref_logps)
    assert torch.allclose(a, b)
    with pytest.raises(ValueError, match="either ref_hidden or ref_logps"):
        aligned(weight, hidden, labels)
    same, out = aligned(weight, hidden, labels, ref_hidden=hidden)
    assert torch.equal(same, torch.tensor(LN2))
    assert torch.equal(out.chosen_rewards, torch.zeros(1))


def test_fused_module_checks_the_reference_at_the_door():
    module, weight, hidden = FusedLinearDPOLoss(), torch.randn(30, 8), torch.randn(2, 6, 8)
    labels = torch.randint(0, 30, (2, 6))
    for change, words in (
        ({"hidden": hidden[:1], "labels": labels[:1], "ref_hidden": hidden[:1]}, "as many rejected rows, got 1 rows"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps must be \(2,\), got \(3,\)"),
        ({"ref_logps": torch.zeros(2), "ref_weight": weight}, "ref_weight and ref_bias go with ref_hidden"),
        ({"ref_hidden": hidden[:, :4]}, r"ref_hidden must be \(2, 6\) \+ \(H,\)"),
        ({"labels": labels[:, :3], "ref_hidden": hidden}, r"hidden must be \(2B, T, H\) and labels \(2B, T\)"),
    ):
        with pytest.raises(ValueError, match=words):
            module(**{"weight": weight, "hidden": hidden, "labels": labels, **change})
    # the reference's own bias is used beside the policy's weight
    biased, _ = module(weight, hidden, labels, None, hidden, None, torch.randn(30))
    assert not torch.equal(biased, torch.tensor(LN2))
    ref_logps = torch.zeros(2, requires_grad=True)
    loss, _ = module(weight.requires_grad_(), hidden, labels, ref_logps=ref_logps)
    loss.backward()
    assert ref_logps.grad is None


def test_the_page_of_losses_has_the_table():
    text = (Path(__file__).resolve().parents[2] / "docs/losses.md").read_text()
    shown = text.split("<!-- rendered by python -m fastdpo.losses.table -->\n")[1].split("\n<!-- end of losses -->")[0]
    assert shown == render()
    assert all(f"| `{name}`" in shown for name in LOSSES)
