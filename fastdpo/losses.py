"""Preference losses: pure functions of per-sequence log-probs (nats), one loss per pair, nothing reduced.

`LOSSES` is the one list of names; the command line, the documentation and the tests read it. A loss takes
`PairLogps` and the options it names, and returns (B,).
"""

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLogps(NamedTuple):
    """Per-sequence log-probs of B pairs, each (B,), in nats, summed over the completion (or averaged).

    `ref_chosen` and `ref_rejected` are the reference policy's; `chosen_len` and `rejected_len` count the
    scored tokens and are needed only by losses that normalize by length.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor | None = None
    rejected_len: Tensor | None = None

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
        return margin(self)


# functions beside the properties: the compiler of torch 2.8 knows a named tuple's fields, not its properties
def chosen_logratio(logps: PairLogps) -> Tensor:
    return logps.chosen - logps.ref_chosen


def rejected_logratio(logps: PairLogps) -> Tensor:
    return logps.rejected - logps.ref_rejected


def margin(logps: PairLogps) -> Tensor:
    return chosen_logratio(logps) - rejected_logratio(logps)


class PreferenceOutput(NamedTuple):
    """`losses` (B,) carries gradients; `chosen_rewards` and `rejected_rewards` (B,) are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def sigmoid(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, eq. 7 of arXiv:2305.18290: `-log sigmoid(beta h)`.

    With `label_smoothing` e this is conservative DPO (cDPO, eq. 3 of the note by E. Mitchell, 2023):
    `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`, where e is the probability that a label is
    flipped. TRL 1.16 accepts the argument for this loss and ignores it; here it is applied.
    """
    h = beta * margin(logps)
    if label_smoothing == 0:
        return -F.logsigmoid(h)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def hinge(logps: PairLogps, *, beta: float) -> Tensor:
    """SLiC / RSO, eq. 6 of arXiv:2309.06657: `max(0, 1 - beta h)`; beta is the reciprocal of the margin."""
    return torch.relu(1 - beta * margin(logps))


def ipo(logps: PairLogps, *, beta: float) -> Tensor:
    """IPO, eq. 17 of arXiv:2310.12036: `(h - 1 / (2 beta))^2`, beta being the paper's tau.

    The log-ratios are averaged over each completion's tokens, as in the authors' own runs and in TRL; the
    paper does not discuss it. With log-probs that are averages already, `chosen_len` must not be given.
    """
    if logps.chosen_len is not None and logps.rejected_len is not None:
        h = chosen_logratio(logps) / logps.chosen_len.clamp(min=1) - (
            rejected_logratio(logps) / logps.rejected_len.clamp(min=1)
        )
    else:
        h = margin(logps)
    return (h - 1 / (2 * beta)) ** 2


Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in (sigmoid, hinge, ipo)}


def loss_by_name(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: unknown name; the message lists the names and the closest one.
    """
    if name in LOSSES:
        return LOSSES[name]
    near = get_close_matches(str(name), LOSSES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown loss {name!r}; choose from {', '.join(sorted(LOSSES))}.{hint}")


def check_loss_options(
    loss_type: str | Sequence[str],
    beta: float,
    label_smoothing: float = 0.0,
    loss_weights: Sequence[float] | None = None,
) -> list[tuple[str, float]]:
    """The (name, weight) terms of a loss, after checking every option.

    Raises:
        ValueError: unknown loss, beta not positive, label_smoothing outside [0, 0.5) or given to a loss that
            has none, or a number of weights that differs from the number of losses.
    """
    if not isinstance(loss_type, (str, list, tuple)):
        raise ValueError(f"loss_type must be a name or a list of names, got {loss_type!r}.")
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if not names:
        raise ValueError(f"loss_type is empty; choose from {', '.join(sorted(LOSSES))}.")
    if not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
        raise ValueError(f"beta must be a number > 0, got {beta!r}; 0.1 is the usual start.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}; it is the share of flipped labels."
        )
    for name in names:
        if label_smoothing and "label_smoothing" not in signature(loss_by_name(name)).parameters:
            takes = [n for n, f in LOSSES.items() if "label_smoothing" in signature(f).parameters]
            raise ValueError(
                f"loss {name!r} has no label smoothing, got label_smoothing={label_smoothing}; "
                f"it applies to {', '.join(takes)}."
            )
        loss_by_name(name)
    weights = [1.0] * len(names) if loss_weights is None else loss_weights
    if not isinstance(weights, (list, tuple)) or not all(
        isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights
    ):
        raise ValueError(f"loss_weights must be a list of numbers >= 0, one for each loss, got {loss_weights!r}.")
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights has {len(weights)} numbers for {len(names)} losses ({', '.join(names)}); give one each."
        )
    return list(zip(names, weights, strict=True))


def preference_loss(
    logps: PairLogps,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    loss_weights: Sequence[float] | None = None,
) -> PreferenceOutput:
    """Losses and implicit rewards of B pairs, nothing reduced.

    Args:
        logps: per-sequence log-probs of policy and reference, each (B,), nats.
        loss_type: a name in `LOSSES`, or several, which are added with `loss_weights` (1 each by default).
        beta: strength of the pull to the reference, > 0; as beta goes to 0 the reference is ignored.
        label_smoothing: probability that a label is flipped, in [0, 0.5), for the losses that have it.

    Returns:
        losses (B,), and rewards `beta * (log pi - log pi_ref)` (B,) each, detached.

    Raises:
        ValueError: see `check_loss_options`.
    """
    total: Tensor | None = None
    for name, weight in check_loss_options(loss_type, beta, label_smoothing, loss_weights):
        loss = LOSSES[name]
        takes = signature(loss).parameters
        options = {"beta": beta, "label_smoothing": label_smoothing}
        term = loss(logps, **{k: v for k, v in options.items() if k in takes})
        term = term if weight == 1.0 else weight * term
        total = term if total is None else total + term
    assert total is not None
    rewards = (beta * chosen_logratio(logps).detach(), beta * rejected_logratio(logps).detach())
    return PreferenceOutput(total, *rewards)
