"""Losses and rewards of a batch of pairs, under any combination of options."""

from typing import Any

import torch
from torch import Tensor

from fastdpo.losses.catalogue import LOSSES, Loss
from fastdpo.losses.options import LossOptions
from fastdpo.losses.pairs import PairLogps, PreferenceOutput, chosen_logratio, per_token, rejected_logratio, token_nll


def preference_loss(
    logps: PairLogps, loss_type: Any = "sigmoid", beta: float = 0.1, **options: Any
) -> PreferenceOutput:
    """Losses and implicit rewards of B pairs, nothing reduced (the mean of `losses` is the batch's loss).

    Args:
        logps: per-sequence log-probs of policy and reference, each (B,), nats.
        loss_type: a name in `LOSSES`, or several, which are added with `loss_weights`; or `LossOptions`, alone.
        beta: strength of the pull to the reference, > 0.
        options: the other attributes of `LossOptions`.

    Returns:
        losses (B,), and rewards `beta * (log pi - log pi_ref)` (B,) each, detached. Where no loss reads the reference
        the rewards are `beta * log pi`, per token if every loss averages over tokens (SimPO's and ORPO's own). 16-bit
        log-probs are taken in fp32.

    Raises:
        ValueError: see `LossOptions`; or what the loss needs is missing from `logps`.
    """
    if isinstance(loss_type, LossOptions):
        return pair_losses(logps, loss_type)
    return pair_losses(logps, LossOptions(loss_type, beta, **options))


def pair_losses(logps: PairLogps, options: LossOptions) -> PreferenceOutput:
    """`preference_loss` with options that were checked before."""
    if options.needs_lengths and logps.chosen_len is None:
        what = "rpo_alpha" if options.rpo_alpha is not None else f"the loss {', '.join(options.names)}"
        raise ValueError(f"{what} is a mean over tokens and needs chosen_len and rejected_len, the scored tokens.")
    if options.use_weighting and logps.pair_weight is None:
        raise ValueError(
            "use_weighting (WPO) needs pair_weight, the pairs' weights under the policy; see wpo_pair_weights."
        )
    if options.ld_alpha is not None and logps.chosen_nll_sum is None:
        raise ValueError(
            "ld_alpha (LD-DPO) weighs tokens before their sum: pass sums made with ld_token_weights, and the chosen "
            "side's plain sum as chosen_nll_sum; FusedLinearDPOLoss and DPOTrainer do it by themselves."
        )
    logps = _aggregated(logps, options)
    total: Tensor | None = None
    for loss, weight in options.terms:
        if weight == 0 and len(options.terms) > 1:
            continue  # 0 times an infinite term would be NaN
        term = _term(loss, logps, options)
        if options.use_weighting and not loss.nll:
            assert logps.pair_weight is not None
            term = term * logps.pair_weight.detach()
        term = term if weight == 1.0 else weight * term
        total = term if total is None else total + term
    total = torch.zeros_like(logps.chosen) if total is None else total
    if options.rpo_alpha:
        total = total + options.rpo_alpha * token_nll(logps)
    if options.pref_ftx:
        plain = logps.chosen if logps.chosen_nll_sum is None else logps.chosen_nll_sum
        scored = logps.chosen_len
        total = total - options.pref_ftx * (plain if scored is None else plain / scored.clamp(min=1))
    return PreferenceOutput(total, *_rewards(logps, options))


def _term(loss: Loss, logps: PairLogps, options: LossOptions) -> Tensor:
    """(B,) of one loss, called with what its row in the catalogue says that it takes."""
    keywords = {name: getattr(options, name) for name in loss.options}
    if not loss.nll:
        keywords["beta"] = options.beta
    if loss.f_divergence and not loss.nll:
        keywords["f_divergence"] = options.f_divergence
    return loss.function(_for_averaging(logps, options) if loss.averages else logps, **keywords)


def _for_averaging(logps: PairLogps, options: LossOptions) -> PairLogps:
    """`logps` for a loss that divides by lengths: what is averaged already has none."""
    return logps if options.aggregate == "sum" else logps._replace(chosen_len=None, rejected_len=None)


def _aggregated(logps: PairLogps, options: LossOptions) -> PairLogps:
    if logps.chosen.dtype in (torch.float16, torch.bfloat16):
        # a log-ratio of 100 overflows fp16 in an exponential, and bf16 keeps 8 bits of a sum over a completion
        names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
        logps = logps._replace(**{name: getattr(logps, name).float() for name in names})
    if options.reference_free:
        zero = torch.zeros_like(logps.chosen)
        logps = logps._replace(ref_chosen=zero, ref_rejected=zero)
    if options.aggregate == "sum" or logps.chosen_len is None or logps.rejected_len is None:
        return logps
    chosen_len, rejected_len = logps.chosen_len.clamp(min=1), logps.rejected_len.clamp(min=1)
    return logps._replace(
        chosen=logps.chosen / chosen_len,
        rejected=logps.rejected / rejected_len,
        ref_chosen=logps.ref_chosen / chosen_len,
        ref_rejected=logps.ref_rejected / rejected_len,
        chosen_nll_sum=logps.chosen if logps.chosen_nll_sum is None else logps.chosen_nll_sum,
    )


def _rewards(logps: PairLogps, options: LossOptions) -> tuple[Tensor, Tensor]:
    if any(LOSSES[name].reference for name in options.names):
        return options.beta * chosen_logratio(logps).detach(), options.beta * rejected_logratio(logps).detach()
    chosen, rejected = logps.chosen.detach(), logps.rejected.detach()
    if all(LOSSES[name].averages for name in options.names):
        logps = _for_averaging(logps, options)
        chosen, rejected = per_token(chosen, logps.chosen_len), per_token(rejected, logps.rejected_len)
    return options.beta * chosen, options.beta * rejected
