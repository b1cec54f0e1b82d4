"""The modules against the plain formulas, and what they refuse."""

import math

import pytest
import torch

from fastdpo.losses import LOSSES, PairLogps, preference_loss
from fastdpo.losses.modules import DPOLoss, FusedLinearDPOLoss


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


def test_unfused_module_is_the_same_formula(some):
    for name, row in LOSSES.items():
        sums, refs = torch.cat(some[:2]), torch.cat(some[2:4])
        lengths = torch.cat(some[4:6])
        loss, out = DPOLoss(name, beta=0.3)(sums, refs if row.reference else None, lengths)
        assert torch.equal(out.losses, preference_loss(some, name, 0.3).losses)
        assert torch.equal(loss, out.losses.mean())
    with pytest.raises(ValueError, match="ipo compares with a reference; pass ref_logps"):
        DPOLoss("ipo")(torch.zeros(2))
    with pytest.raises(ValueError, match=r"ld_alpha=0\.0 needs"):
        DPOLoss(ld_alpha=0.0)
    with pytest.raises(ValueError, match="weighs tokens before their sum"):
        preference_loss(some, ld_alpha=0.3)
    with pytest.raises(ValueError, match="average=True is aggregate='mean'"):
        FusedLinearDPOLoss(average=True, aggregate="sum")
    with pytest.raises(ValueError, match=r"ld_alpha=0\.5 needs the log-probs of each token"):
        DPOLoss(ld_alpha=0.5)
    with pytest.raises(ValueError, match="sft is a mean over tokens and needs chosen_len"):
        DPOLoss("sft")(torch.zeros(2))
    with pytest.raises(ValueError, match=r"use_weighting \(WPO\) needs pair_weight"):
        preference_loss(some, use_weighting=True)


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
    assert torch.equal(same, torch.tensor(math.log(2)))
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
    assert not torch.equal(biased, torch.tensor(math.log(2)))
    ref_logps = torch.zeros(2, requires_grad=True)
    loss, _ = module(weight.requires_grad_(), hidden, labels, ref_logps=ref_logps)
    loss.backward()
    assert ref_logps.grad is None
