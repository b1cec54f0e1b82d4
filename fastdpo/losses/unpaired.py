"""Losses of unpaired rows: one answer each, and whether it is desirable.

Letters: u = log pi(y|x) - log pi_ref(y|x), s the sigmoid; t is 1 for a desirable answer and -1 for another, w its
weight (`desirable_weight` or `undesirable_weight`). Each loss compares beta u with a shift, through which no gradient
goes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.options import check_beta, is_number


@dataclass(frozen=True)
class UnpairedLoss:
    """A row of the catalogue.

    Attributes:
        function: (reward beta u (B,), sign t (B,), shift) -> (B,), without the weights.
        formula, paper: for the table in docs/losses.md.
        shift: what the reward is compared with: "kl" (beta times the policy's KL from the reference), "delta" (the
            running mean of the rewards), or "" for 0.
    """

    function: Callable[[Tensor, Tensor, Tensor | float], Tensor]
    formula: str
    paper: str
    shift: str = ""


def kto(reward: Tensor, sign: Tensor, shift: Tensor | float) -> Tensor:
    """KTO, eq. 7 and 8 of arXiv:2402.01306: `w (1 - s(t beta (u - z)))`, z = max(0, KL(pi || pi_ref)).

    z is estimated from answers under the prompts of other rows, one z for the batch, over all processes: the mean of
    their u, as in the paper and in TRL 1.16.
    """
    # 1 - s(x) = s(-x), without the cancellation
    return torch.sigmoid(-sign * (reward - shift))


def bco(reward: Tensor, sign: Tensor, shift: Tensor | float) -> Tensor:
    """BCO, eq. 8 of arXiv:2404.04656: `-w log s(t (beta u - delta))`, delta the running mean of the rewards.

    delta is the mean over all rewards that training has seen so far, the batch's own among them (TRL's BCOTrainer). The
    paper's underlying distribution matching is not built.
    """
    return -F.logsigmoid(sign * (reward - shift))


def apo_zero_unpaired(reward: Tensor, sign: Tensor, shift: Tensor | float) -> Tensor:
    """APO-zero, eq. 7 of arXiv:2408.06266, for single answers: `w (1 - s(t beta u))`; KTO with z = 0, as in TRL."""
    return kto(reward, sign, 0.0)


UNPAIRED_LOSSES: dict[str, UnpairedLoss] = {
    "kto": UnpairedLoss(kto, "w (1 - s(t beta (u - z))), z = max(0, mean u')", "arXiv:2402.01306", "kl"),
    "bco": UnpairedLoss(
        bco, "-w log s(t (beta u - delta)), delta = running mean of beta u", "arXiv:2404.04656", "delta"
    ),
    "apo_zero_unpaired": UnpairedLoss(apo_zero_unpaired, "w (1 - s(t beta u))", "arXiv:2408.06266"),
}


@dataclass(frozen=True)
class UnpairedOptions:
    """What is minimized. The names are TRL's.

    Attributes:
        loss_type: a name in `UNPAIRED_LOSSES`.
        beta: strength of the pull to the reference, > 0.
        desirable_weight, undesirable_weight: what the two kinds of answers count, >= 0. The paper takes
            `desirable_weight * desirable rows` from 1 to 4/3 times the same of the others.

    Raises:
        ValueError: one sentence: an unknown name, a number outside its range.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type not in UNPAIRED_LOSSES:
            raise ValueError(
                f"unknown loss {self.loss_type!r} of unpaired rows; choose from {', '.join(UNPAIRED_LOSSES)}."
            )
        check_beta(self.beta)
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}.")

    @property
    def loss(self) -> UnpairedLoss:
        return UNPAIRED_LOSSES[self.loss_type]

    @property
    def names(self) -> tuple[str, ...]:
        """The losses' names."""
        return (self.loss_type,)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return True


class UnpairedOutput(NamedTuple):
    """`losses` (B,) carries gradients; `rewards` (B,) are detached."""

    losses: Tensor
    rewards: Tensor


def unpaired_loss(
    logps: Tensor,
    ref_logps: Tensor,
    label: Tensor,
    options: UnpairedOptions | str = "kto",
    *,
    shift: Tensor | float = 0.0,
    **others: float,
) -> UnpairedOutput:
    """Losses and implicit rewards of B answers, nothing reduced (the mean of `losses` is the batch's loss).

    Args:
        logps, ref_logps: (B,) log-probs of the completions under policy and reference, summed over tokens, nats; 16-bit
            ones are taken in fp32.
        label: (B,) bool, whether the answer is desirable.
        options: `UnpairedOptions`, or the loss's name with the other attributes of them by keyword.
        shift: what rewards are compared with, a number or a scalar; detached. kto: `kl_shift(...)`; bco: the running
            mean of the rewards so far, these included.

    Returns:
        losses (B,), and rewards `beta * (log pi - log pi_ref)` (B,).
    """
    options = UnpairedOptions(options, **others) if isinstance(options, str) else options
    if logps.dtype in (torch.float16, torch.bfloat16):
        logps, ref_logps = logps.float(), ref_logps.float()
    shift = shift.detach() if isinstance(shift, Tensor) else shift
    reward = options.beta * (logps - ref_logps)
    label = label.to(device=reward.device, dtype=torch.bool)
    sign = torch.where(label, 1.0, -1.0).to(reward)
    losses = options.loss.function(reward, sign, shift)
    weights = (options.desirable_weight, options.undesirable_weight)
    if weights != (1.0, 1.0):
        losses = losses * torch.where(label, *weights).to(losses)
    return UnpairedOutput(losses, reward.detach())


def kl_shift(kl_logps: Tensor, ref_kl_logps: Tensor, beta: float) -> Tensor:
    """`beta max(0, mean (log pi(y'|x) - log pi_ref(y'|x)))`: KTO's estimate from answers y' of other prompts; detached.

    kl_logps, ref_kl_logps: (B,), nats.
    """
    if kl_logps.dtype in (torch.float16, torch.bfloat16):
        kl_logps, ref_kl_logps = kl_logps.float(), ref_kl_logps.float()
    return beta * (kl_logps - ref_kl_logps).detach().mean().clamp(min=0)
