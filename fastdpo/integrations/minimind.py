"""The two functions of minimind's DPO loop, and the form of the first that skips the logits.

In `train_dpo.py` (or its notebook) replace the two definitions by

    from fastdpo.integrations.minimind import dpo_loss, logits_to_log_probs

and in minimind up to March 2026 nothing else changes; later ones (minimind-3) sum over tokens, which takes
`aggregate="sum"` in the call of `dpo_loss`. Where the model's final hidden states are at hand, the logits need not
exist: minimind's model returns them, and computes logits of the last position only if asked so:

    outputs = model(x, logits_to_keep=1)
    policy_log_probs = hidden_to_log_probs(outputs.hidden_states, model.lm_head.weight, y, mask)

with the same two lines for the reference model. Batches are chosen rows, then rejected rows; the mask is 1 on scored
tokens; labels are aligned with the hidden states and may hold anything in [0, V) where the mask is 0.
"""

import torch
from torch import Tensor

from fastdpo.losses import PairLogps, PreferenceOutput, preference_loss
from fastdpo.ops.linear_logprob.api import linear_logprob
from fastdpo.ops.logprob import logprob

AGGREGATES = ("sum", "mean")


def logits_to_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) of every position, nats: (B, T, V) logits and (B, T) int64 labels to (B, T) float32.

    A label of -100 gives 0. Made without a second (B, T, V) tensor in the forward; accurate to fp32 for 16-bit logits.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not match, or (on a CPU) a label outside [0, V).
    """
    return logprob(logits, labels)


def hidden_to_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """`logits_to_log_probs(hidden @ weight.T + bias, labels)` where the mask is set, 0 elsewhere, without the logits.

    Only the positions in the mask are projected.

    Args:
        hidden: (B, T, H), what enters the head; weight: (V, H), the head's; bias: (V,).
        labels: (B, T) int64; mask: (B, T), any dtype, not 0 on scored tokens.
        rows: (M,) int64, `mask.flatten().nonzero()[:, 0]`. Made before the batch is moved to a GPU it spares the
            host from waiting for the device once, which finding the positions there takes.

    Returns:
        (B, T), float32 (float64 for float64 operands), nats; differentiable. Ready for `dpo_loss`.

    Raises:
        TypeError, ValueError: see `fastdpo.linear_logprob`; or labels or mask not (B, T).
    """
    shape = hidden.shape[:-1]
    for name, x in (("labels", labels), ("mask", mask)):
        if hidden.dim() != 3 or x.shape != shape:
            raise ValueError(
                f"hidden_to_log_probs: hidden must be (B, T, H) and {name} (B, T), got {tuple(hidden.shape)} and "
                f"{tuple(x.shape)}."
            )
    if rows is None:
        rows = mask.reshape(-1).nonzero()[:, 0]
    logps = linear_logprob(hidden, weight, labels.reshape(-1)[rows], bias=bias, rows=rows)
    return logps.new_zeros(labels.numel()).index_copy(0, rows, logps).view(shape)


def dpo_loss(
    ref_log_probs: Tensor, policy_log_probs: Tensor, mask: Tensor, beta: float, aggregate: str = "mean"
) -> Tensor:
    """The mean over pairs of `-log sigmoid(beta h)`, h being the margin of the rows' aggregated log-probs.

    Args:
        ref_log_probs, policy_log_probs: (2B, T), nats, chosen rows first, then rejected rows.
        mask: (2B, T), 1 on scored tokens.
        beta: strength of the pull to the reference, > 0.
        aggregate: "mean" over each row's scored tokens, as minimind did until March 2026, or "sum", as it does since
            minimind-3. It changes what a beta means by the completion's length, so it must match the loop's own.

    Raises:
        ValueError: shapes that differ or do not hold pairs, an unknown aggregate, or beta not positive.
    """
    return masked_preference(ref_log_probs, policy_log_probs, mask, beta, aggregate).losses.mean()


def masked_preference(
    ref_log_probs: Tensor, policy_log_probs: Tensor, mask: Tensor, beta: float, aggregate: str
) -> PreferenceOutput:
    """DPO's losses and rewards (B,) of per-token log-probs (2B, T). A row without a scored token counts as 0."""
    shape = policy_log_probs.shape
    if len(shape) != 2 or shape[0] == 0 or shape[0] % 2:
        raise ValueError(
            f"dpo_loss: policy_log_probs must be (2B, T), chosen rows then rejected rows, got {tuple(shape)}."
        )
    for name, x in (("ref_log_probs", ref_log_probs), ("mask", mask)):
        if x.shape != shape:
            raise ValueError(f"dpo_loss: {name} must be {tuple(shape)} like policy_log_probs, got {tuple(x.shape)}.")
    if aggregate not in AGGREGATES:
        raise ValueError(f"dpo_loss: aggregate must be 'sum' or 'mean', got {aggregate!r}.")

    def of_rows(tokens: Tensor) -> Tensor:
        # an unscored token of probability 0 is -inf, and -inf * 0 would be NaN
        sums = (tokens * mask).where(mask != 0, 0.0).sum(1)
        if aggregate == "sum":
            return sums
        lengths = mask.sum(1)
        return sums / lengths.where(lengths != 0, torch.ones_like(lengths))

    policy, reference = of_rows(policy_log_probs).chunk(2), of_rows(ref_log_probs).chunk(2)
    return preference_loss(PairLogps(*policy, *reference), "sigmoid", float(beta))
