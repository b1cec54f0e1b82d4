"""The functions of vermind's DPO loop, and the form of the first that skips the logits.

In `train/dpo.py` replace the two definitions by

    from fastdpo.integrations.vermind import dpo_loss, logits_to_log_probs

and nothing else changes. `hidden_to_log_probs(hidden, weight, labels, mask)` takes the place of the head and of
`logits_to_log_probs` where the final hidden states are at hand. Batches are chosen rows, then rejected rows; the mask
is 1 on scored tokens; labels are aligned with the hidden states and may hold anything in [0, V), or -100, where the
mask is 0.
"""

from torch import Tensor

from fastdpo.integrations.minimind import hidden_to_log_probs, logits_to_log_probs, masked_preference

__all__ = ["dpo_loss", "hidden_to_log_probs", "logits_to_log_probs"]


def dpo_loss(
    ref_log_probs: Tensor,
    policy_log_probs: Tensor,
    mask: Tensor,
    beta: float = 0.1,
    aggregate: str = "sum",
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO's loss, and the implicit rewards of the chosen and of the rejected rows: three scalars, means over pairs.

    Args:
        ref_log_probs, policy_log_probs: (2B, T), nats, chosen rows first, then rejected rows.
        mask: (2B, T), 1 on scored tokens.
        beta: strength of the pull to the reference, > 0.
        aggregate: "sum" of a row's scored tokens, or their "mean".

    Returns:
        loss, chosen_rewards, rejected_rewards; the rewards `beta (log pi - log pi_ref)` are detached.

    Raises:
        ValueError: shapes that differ or do not hold pairs, an unknown aggregate, or beta not positive.
    """
    out = masked_preference(ref_log_probs, policy_log_probs, mask, beta, aggregate)
    return out.losses.mean(), out.chosen_rewards.mean(), out.rejected_rewards.mean()
