"""The losses against hand numbers and identities; the modules against the plain formulas."""

import math

import pytest
import torch

from fastdpo.losses import LOSSES, PairLogps, check_loss_options, preference_loss
from fastdpo.modules import DPOLoss, FusedLinearDPOLoss
from fastdpo.ops import reference

LN2 = math.log(2)


def pairs(*values: tuple[float, float, float, float], lengths=None) -> PairLogps:
    columns = (torch.tensor(c, dtype=torch.float64) for c in zip(*values, strict=True))
    return PairLogps(*columns, *(torch.tensor(x) for x in (lengths or ())))


# (chosen, rejected, ref_chosen, ref_rejected): h = (-10 - -12) - (-20 - -19) = 3
ONE = pairs((-10.0, -20.0, -12.0, -19.0), lengths=([4], [5]))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {"beta": 0.1}, 0.5543552444685272),  # log(1 + e^-0.3)
        ("sigmoid", {"beta": 0.5}, 0.20141327798275246),  # log(1 + e^-1.5)
        ("sigmoid", {"beta": 0.1, "label_smoothing": 0.2}, 0.6143552444685272),  # + 0.2 * 0.3
        ("hinge", {"beta": 0.1}, 0.7),
        ("hinge", {"beta": 0.5}, 0.0),
        ("ipo", {"beta": 0.1}, (2 / 4 - -1 / 5 - 5) ** 2),
    ],
)
def test_hand_numbers(name, options, expected):
    out = preference_loss(ONE, name, **options)
    assert out.losses.shape == (1,)
    assert float(out.losses) == pytest.approx(expected, rel=1e-12)
    assert float(out.chosen_rewards) == pytest.approx(2 * options["beta"])
    assert float(out.rejected_rewards) == pytest.approx(-1 * options["beta"])


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


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_unreduced_differentiable_and_cites_its_source(name):
    inputs = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    lengths = torch.randint(1, 9, (5,)), torch.randint(1, 9, (5,))

    def loss(*logps):
        return preference_loss(PairLogps(*logps, *lengths), name, 0.4).losses

    assert loss(*inputs).shape == (5,)
    assert torch.autograd.gradcheck(loss, inputs)
    assert "arXiv:" in (LOSSES[name].__doc__ or "")
    out = preference_loss(PairLogps(*inputs, *lengths), name, 0.4)
    assert not out.chosen_rewards.requires_grad


def test_step_zero_loss_is_ln_2_to_the_last_bit():
    x = torch.randn(6) * 500
    out = preference_loss(PairLogps(x[:3], x[3:], x[:3], x[3:]))
    assert torch.equal(out.losses, torch.full((3,), LN2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss_type": "sigmoi"}, r"unknown loss 'sigmoi'; choose from hinge, ipo, sigmoid. Did you mean 'sigmoid'\?"),
        ({"loss_type": "sigmoid", "beta": 0.0}, r"beta must be a number > 0, got 0.0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, r"'hinge' has no label smoothing.*applies to sigmoid"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.5}, r"must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, r"1 numbers for 2 losses \(sigmoid, ipo\)"),
        ({"loss_type": []}, r"loss_type is empty"),
        ({"loss_type": None}, r"loss_type must be a name or a list of names, got None"),
        ({"loss_type": "sigmoid", "beta": math.inf}, r"beta must be a number > 0, got inf"),
        ({"loss_type": "sigmoid", "loss_weights": [-1.0]}, r"must be a list of numbers >= 0, .* got \[-1.0\]"),
        ({"loss_type": "sigmoid", "loss_weights": 1.0}, r"must be a list of numbers >= 0, .* got 1.0"),
    ],
)
def test_bad_options_get_one_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        check_loss_options(**{"beta": 0.1, **arguments})
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


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_fused_equals_unfused(name, average, trained):
    generator = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(4, 7, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, ref_weight = (torch.randn(50, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 50, (4, 7), generator=generator)
    labels[:, :2] = -100
    labels[1] = -100  # an empty completion
    module = FusedLinearDPOLoss(name, beta=0.3, average=average)

    def run(fused: bool):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_(trained)
        if fused:
            loss, out = module(w, h, labels, ref_hidden=ref_hidden, ref_weight=ref_weight)
        else:
            sums = [
                reference.linear_logprob(x.flatten(0, 1), y, labels.flatten()).view(4, 7).sum(1)
                for x, y in ((h, w), (ref_hidden, ref_weight))
            ]
            lengths = (labels != -100).sum(1)
            if average:
                sums = [x / lengths.clamp(min=1) for x in sums]
            loss, out = DPOLoss(name, beta=0.3)(*sums, None if average else lengths)
        loss.backward()
        return loss.detach(), h.grad, w.grad, out.losses.detach(), out.chosen_rewards

    for a, b in zip(run(True), run(False), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-10, atol=1e-12)


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
