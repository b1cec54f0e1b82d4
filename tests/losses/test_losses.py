"""The losses against hand numbers and identities."""

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
from fastdpo.losses.table import render, render_unpaired


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
def test_hand_numbers(name, options, expected, one):
    options = {"beta": 0.5, **options}
    out = preference_loss(one, name, **options)
    assert out.losses.shape == (1,)
    assert float(out.losses) == pytest.approx(expected, rel=1e-12)


def test_hand_numbers_cover_every_loss():
    covered = {LossOptions(name).names[0] for name, _, _ in HAND}
    assert covered == set(LOSSES)


def test_rewards(one):
    out = preference_loss(one, "sigmoid", 0.5)
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((1.0, -0.5))
    out = preference_loss(one, "sigmoid", 0.5, aggregate="mean")
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((0.25, -0.1))
    # without a reference: the policy's log-probs, per token where the loss takes them so
    out = preference_loss(one, "simpo", 2.0)
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((-5.0, -8.0))
    for options in ({}, {"reference_free": True}):
        out = preference_loss(one, "simpo", 2.0, **options)
        assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((-5.0, -8.0))
    out = preference_loss(one, ["cpo", "simpo"], 0.5)
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((-5.0, -10.0))
    out = preference_loss(one, "sigmoid", 0.5, reference_free=True)
    assert (float(out.chosen_rewards), float(out.rejected_rewards)) == pytest.approx((-5.0, -10.0))


def test_ipo_without_lengths_takes_log_probs_as_averages(one):
    averaged = one._replace(chosen_len=None, rejected_len=None)
    assert float(preference_loss(averaged, "ipo", 0.1).losses) == pytest.approx((3 - 5) ** 2)


def test_identities(pairs):
    two = pairs((-10.0, -20.0, -12.0, -19.0), (-3.0, -1.0, -2.5, -2.0))
    swapped = PairLogps(two.rejected, two.chosen, two.ref_rejected, two.ref_chosen)
    plain, flipped = (preference_loss(x, "sigmoid", 0.3).losses for x in (two, swapped))
    # log sigmoid(h) - log sigmoid(-h) = h
    assert torch.allclose(flipped - plain, 0.3 * two.margin)
    smooth = preference_loss(two, "sigmoid", 0.3, label_smoothing=0.25).losses
    assert torch.allclose(smooth, 0.75 * plain + 0.25 * flipped)
    both = preference_loss(two, ["sigmoid", "hinge"], 0.3, loss_weights=[0.8, 2.0]).losses
    assert torch.allclose(both, 0.8 * plain + 2.0 * preference_loss(two, "hinge", 0.3).losses)


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if "label_smoothing" in loss.options])
def test_label_smoothing_is_the_mixture_of_both_labels(name, some):
    """0 is the plain loss; e > 0 is (1 - e) of it plus e of the swapped pair's, unless the loss says otherwise."""
    plain = preference_loss(some, name, 0.3).losses
    assert torch.equal(plain, preference_loss(some, name, 0.3, label_smoothing=0.0).losses)
    smooth = preference_loss(some, name, 0.3, label_smoothing=0.25).losses
    assert not torch.allclose(plain, smooth)
    if name == "sigmoid":
        swapped = PairLogps(some.rejected, some.chosen, some.ref_rejected, some.ref_chosen)
        flipped = preference_loss(swapped, name, 0.3).losses
        assert torch.allclose(smooth, 0.75 * plain + 0.25 * flipped)
        # robust is unbiased: mixing it over the two labels gives the plain loss back
        kept, turned = (preference_loss(x, "robust", 0.3, label_smoothing=0.25).losses for x in (some, swapped))
        assert torch.allclose(0.75 * kept + 0.25 * turned, plain)


def test_options_compose(some):
    base = preference_loss(some, ["sigmoid", "sft"], 0.3, loss_weights=[1.0, 0.7]).losses
    assert torch.allclose(base, preference_loss(some, "sigmoid", 0.3, rpo_alpha=0.7).losses)
    # every term is weighted by WPO but the likelihood
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    weighed = preference_loss(
        some._replace(pair_weight=weight), ["sigmoid", "sft"], 0.3, loss_weights=[1.0, 0.7], use_weighting=True
    ).losses
    nll = preference_loss(some, "sft").losses
    assert torch.allclose(weighed - 0.7 * nll, weight * (base - 0.7 * nll))
    # simpo is the reference-free normalized sigmoid with a margin; the plain one has the margin 0
    free = preference_loss(some, "sigmoid_norm", 0.3, reference_free=True).losses
    assert torch.allclose(free, preference_loss(some, "simpo", 0.3, simpo_gamma=0.0).losses)
    # sorting changes which margins meet, not their sum
    hinge = [preference_loss(some, name, 1e-3).losses for name in ("aot", "sigmoid")]
    assert not torch.allclose(*hinge)
    assert torch.allclose(hinge[0].mean(), hinge[1].mean(), rtol=1e-5)


def test_divergences_agree_at_small_ratios(some):
    """f'(1) = 0 and f''(1) > 0: near the reference every divergence is reverse KL up to scale."""
    near = some._replace(chosen=some.ref_chosen + 1e-4, rejected=some.ref_rejected - 2e-4)
    slopes = {"forward_kl": 1.0, "js_divergence": 0.5, "alpha_divergence": 1.0}
    plain = preference_loss(near, "hinge", 1.0).losses - 1
    for kind, slope in slopes.items():
        other = preference_loss(near, "hinge", 1.0, f_divergence_type=kind).losses - 1
        assert torch.allclose(other, slope * plain, rtol=1e-3), kind


def test_batch_statistics_by_hand(three):
    u_w, u_l = [3.0, -1.0, -1.0], [-1.0, 2.5, 4.0]
    z_w, z_l = sum(u_w) / 3, sum(u_l) / 3
    kto = [0.5 * s(-0.5 * (w - z_l)) + 0.5 * s(-0.5 * (z_w - r)) for w, r in zip(u_w, u_l, strict=True)]
    assert preference_loss(three, "kto_pair", 0.5).losses.tolist() == pytest.approx(kto)
    # means below 0 count as 0
    worse = three._replace(ref_chosen=three.chosen + 1, ref_rejected=three.rejected + 1)
    flat = [0.5 * s(0.5) + 0.5 * s(-0.5)] * 3
    assert preference_loss(worse, "kto_pair", 0.5).losses.tolist() == pytest.approx(flat)
    nll = 12 / 7  # all chosen tokens weigh the same: not the mean of 1, 6 and 1
    assert preference_loss(three, "sft").losses.tolist() == pytest.approx([nll] * 3)
    margins = [5.0, -3.0, 3.0]
    cpo = [-log_sigmoid(0.5 * m) + nll for m in margins]
    assert preference_loss(three, "cpo", 0.5).losses.tolist() == pytest.approx(cpo)
    unpaired = [-log_sigmoid(0.5 * (a - b)) for a, b in zip(sorted(u_w), sorted(u_l), strict=True)]
    assert preference_loss(three, "aot_unpaired", 0.5).losses.tolist() == pytest.approx(unpaired)
    policy, reference = sorted(margins), sorted([1.0, 0.5, 8.0])
    paired = [-log_sigmoid(0.5 * (a - b)) for a, b in zip(policy, reference, strict=True)]
    assert preference_loss(three, "aot", 0.5).losses.tolist() == pytest.approx(paired)
    weighed = three._replace(chosen_nll_sum=2 * three.chosen)
    with_ftx = preference_loss(weighed, "hinge", 0.5, ld_alpha=0.5, pref_ftx=1.0).losses
    without = preference_loss(weighed, "hinge", 0.5, ld_alpha=0.5).losses
    assert (with_ftx - without).tolist() == pytest.approx([2.0, 12.0, 2.0])


def test_a_term_of_weight_0_is_left_out(some):
    far = PairLogps(*(torch.tensor([x]) for x in (-1e30, 0.0, 0.0, 0.0)))
    out = preference_loss(far, ["hinge", "sppo_hard"], loss_weights=[1.0, 0.0])
    assert torch.isfinite(out.losses).all()
    assert preference_loss(some, "hinge", loss_weights=[0.0]).losses.tolist() == [0.0] * 3


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
    assert torch.equal(out.losses, torch.full((3,), math.log(2)))


def test_the_page_of_losses_has_the_table():
    text = (Path(__file__).resolve().parents[2] / "docs/losses.md").read_text()
    shown = text.split("<!-- rendered by python -m fastdpo.losses.table -->\n")[1].split("\n<!-- end of losses -->")[0]
    assert shown == render()
    assert all(f"| `{name}`" in shown for name in LOSSES)
    single = text.split("losses.table: single answers -->\n")[1].split("\n<!-- end of single answers -->")[0]
    assert single == render_unpaired()
