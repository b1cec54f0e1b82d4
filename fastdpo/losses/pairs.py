"""What a loss reads: the log-probs of B pairs, and the quantities that every loss is made of."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.divergences import FDivergence, score


class PairLogps(NamedTuple):
    """Per-sequence log-probs of B pairs, each (B,), in nats, summed over the completion.

    Attributes:
        chosen, rejected: the policy's, log pi(y_w|x) and log pi(y_l|x).
        ref_chosen, ref_rejected: the reference policy's; not read by losses without a reference.
        chosen_len, rejected_len: scored tokens of each completion. Without them the losses that average over tokens
            take the log-probs as averages already.
        chosen_nll_sum: the sum that the NLL terms read, where `chosen` holds weighted log-probs (LD-DPO).
        pair_weight: WPO's weight of each pair, detached.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor | None = None
    rejected_len: Tensor | None = None
    chosen_nll_sum: Tensor | None = None
    pair_weight: Tensor | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """log pi(y_w|x) - log pi_ref(y_w|x), (B,)."""
        return chosen_logratio(self)

    @property
    def rejected_logratio(self) -> Tensor:
        """log pi(y_l|x) - log pi_ref(y_l|x), (B,)."""
        return rejected_logratio(self)

    @property
    def margin(self) -> Tensor:
        """h = chosen_logratio - rejected_logratio, the implicit reward margin over beta, (B,)."""
        return chosen_logratio(self) - rejected_logratio(self)


class PreferenceOutput(NamedTuple):
    """`losses` (B,) carries gradients; `chosen_rewards` and `rejected_rewards` (B,) are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


# functions beside the properties: the compiler of torch 2.8 knows a named tuple's fields, not its properties
def chosen_logratio(logps: PairLogps) -> Tensor:
    return logps.chosen - logps.ref_chosen


def rejected_logratio(logps: PairLogps) -> Tensor:
    return logps.rejected - logps.ref_rejected


def scores(logps: PairLogps, f_divergence: FDivergence) -> tuple[Tensor, Tensor]:
    """The scores of chosen and rejected, (B,) each: the log-ratios themselves under reverse_kl."""
    return score(chosen_logratio(logps), f_divergence), score(rejected_logratio(logps), f_divergence)


def margin(logps: PairLogps, f_divergence: FDivergence) -> Tensor:
    """The chosen score minus the rejected one, (B,): h of DPO under reverse_kl."""
    chosen, rejected = scores(logps, f_divergence)
    return chosen - rejected


def per_token(value: Tensor, length: Tensor | None) -> Tensor:
    """A sum over a completion, divided by its scored tokens (by 1 where there are none); averages have no length."""
    return value if length is None else value / length.clamp(min=1)


def token_nll(logps: PairLogps) -> Tensor:
    """The negative log-likelihood of the chosen completions per token of the micro-batch: a scalar."""
    assert logps.chosen_len is not None
    total = logps.chosen if logps.chosen_nll_sum is None else logps.chosen_nll_sum
    return -(total.sum() / logps.chosen_len.sum().clamp(min=1))


def smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    """`-(1 - e) log sigmoid(h) - e log sigmoid(-h)`: e is the probability that a label is flipped."""
    if label_smoothing == 0:
        return -F.logsigmoid(h)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
