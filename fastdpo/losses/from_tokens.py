"""From the log-probs of a batch's tokens to what a preference loss reads."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.losses.options import LossOptions
from fastdpo.losses.pairs import PairLogps
from fastdpo.losses.weights import ld_mask_weights, ld_token_weights, wpo_pair_weights
from fastdpo.ops.sequence import segment_sum


class SequenceLogps(NamedTuple):
    """Log-probs of 2B completions, chosen ones first: what a reference must keep of its (M,) log-probs.

    Attributes:
        total: (2B,) sums over the completion, in nats.
        tail: (2B,) the part of it beyond the length of the pair's shorter completion (LD-DPO weighs it apart).
    """

    total: Tensor
    tail: Tensor

    @classmethod
    def of(cls, tokens: Tensor, offsets: Tensor) -> "SequenceLogps":
        """From the log-probs (M,) of a batch's tokens; offsets: (2B + 1,) int64."""
        shared = ld_token_weights(offsets, len(tokens), 0.0, tokens.dtype)
        return cls(segment_sum(tokens, offsets), segment_sum(tokens * (1 - shared), offsets))

    def weighted(self, ld_alpha: float | None) -> Tensor:
        """(2B,) sums in which the tail counts `ld_alpha`."""
        return self.total if ld_alpha is None else self.total - (1 - ld_alpha) * self.tail


def pair_logps(
    policy: Mapping[str, Tensor], reference: Tensor | SequenceLogps | None, offsets: Tensor, options: LossOptions
) -> PairLogps:
    """The sums over each completion, from its scored tokens alone.

    Args:
        policy: "logprob" (M,) and, for WPO, "log_sum_sq_probs" (M,).
        reference: (M,) log-probs of the reference policy, or their sums; None where no loss reads them.
        offsets: (2B + 1,) int64, chosen sequences first, then rejected.
    """
    tokens, ld_alpha = policy["logprob"], options.ld_alpha
    weights = None if ld_alpha is None else ld_token_weights(offsets, len(tokens), ld_alpha, tokens.dtype)
    return _pair_logps(policy, reference, offsets, offsets.diff(), weights, options)


def row_pair_logps(
    policy: Mapping[str, Tensor], reference: Tensor | None, scored: Tensor, options: LossOptions
) -> PairLogps:
    """The sums over each completion, from rows of one length: every position counts, 0 where it is not scored.

    Args:
        policy: "logprob" (2B, T) and, for WPO, "log_sum_sq_probs" (2B, T).
        reference: (2B, T) log-probs of the reference policy; None where no loss reads them.
        scored: (2B, T) bool, chosen rows first, then rejected.
    """
    rows, length = scored.shape
    dtype, ld_alpha = policy["logprob"].dtype, options.ld_alpha
    offsets = torch.arange(rows + 1, device=scored.device) * length
    weights = None if ld_alpha is None else ld_mask_weights(scored, ld_alpha, dtype).flatten()
    policy = {name: values.flatten() for name, values in policy.items()}
    reference = None if reference is None else reference.flatten()
    return _pair_logps(policy, reference, offsets, scored.sum(1), weights, options)


def _pair_logps(
    policy: Mapping[str, Tensor],
    reference: Tensor | SequenceLogps | None,
    offsets: Tensor,
    lengths: Tensor,
    weights: Tensor | None,
    options: LossOptions,
) -> PairLogps:
    """lengths: (2B,) scored tokens; weights: (M,), LD-DPO's of each token."""
    tokens = policy["logprob"]
    sums = segment_sum(tokens, offsets)
    if reference is None:
        ref_sums = sums.detach().new_zeros(len(lengths))
    elif isinstance(reference, SequenceLogps):
        ref_sums = reference.weighted(options.ld_alpha).to(tokens)
    else:
        reference = reference.to(tokens.device)
        ref_sums = segment_sum(reference if weights is None else reference * weights, offsets)
    logps = PairLogps(*sums.chunk(2), *ref_sums.chunk(2), *lengths.chunk(2))
    if weights is not None:
        chosen, rejected = segment_sum(tokens * weights, offsets).chunk(2)
        logps = logps._replace(chosen=chosen, rejected=rejected, chosen_nll_sum=logps.chosen)
    if options.use_weighting:
        alignment = segment_sum(tokens.detach() - policy["log_sum_sq_probs"], offsets)
        logps = logps._replace(pair_weight=wpo_pair_weights(alignment, lengths))
    return logps
