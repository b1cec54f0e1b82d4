"""Weights that come before a loss: of tokens (LD-DPO) and of pairs (WPO)."""

import torch
from torch import Tensor


def ld_token_weights(offsets: Tensor, tokens: int, ld_alpha: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """LD-DPO (arXiv:2409.06411): 1 for the tokens within the length that both completions have, `ld_alpha` beyond.

    TRL 1.16 weighs policy and reference alike, as the paper does; TRL up to 0.28 and LLaMA-Factory the policy alone.

    Args:
        offsets: (2B + 1,) int64: sequence s owns tokens offsets[s] to offsets[s + 1], chosen ones first, then rejected.
        tokens: M = offsets[-1], known to the caller, so that nothing waits for a device.

    Returns:
        (M,) of `dtype`.
    """
    lengths = offsets.diff()
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    # where the tail of each sequence begins
    tail = torch.repeat_interleave(offsets[:-1] + shared, lengths, output_size=tokens)
    position = torch.arange(tokens, device=offsets.device)
    return torch.ones(tokens, dtype=dtype, device=offsets.device).masked_fill(position >= tail, ld_alpha)


def ld_mask_weights(scored: Tensor, ld_alpha: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`ld_token_weights` for rows of one length: `scored` (2B, T) bool, chosen rows first -> (2B, T) of `dtype`."""
    shared = torch.minimum(*scored.sum(1).chunk(2)).repeat(2)
    return torch.ones_like(scored, dtype=dtype).masked_fill(scored.cumsum(1) > shared[:, None], ld_alpha)


def wpo_pair_weights(alignment: Tensor, lengths: Tensor) -> Tensor:
    """WPO, eq. 2 of arXiv:2406.11827, with the sampled alignment of its section 3.2: `w(x, y_w) w(x, y_l)`.

    `w = exp(mean over tokens of log p(y_t) - log sum_v p(v)^2)`. Not clamped to 1, as in TRL 1.16 (it was up to 0.28).

    Args:
        alignment: (2B,) sums of `log p(y_t) - log sum_v p(v)^2` over each completion's scored tokens, under the policy,
            chosen sequences first, then rejected.
        lengths: (2B,) their scored tokens.

    Returns:
        (B,), detached.
    """
    chosen, rejected = (alignment.detach() / lengths.clamp(min=1)).chunk(2)
    return torch.exp(chosen + rejected)
