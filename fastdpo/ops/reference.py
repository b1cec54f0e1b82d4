"""The definition, in eager PyTorch: what every other path must equal. It materializes the logits.

Shapes: hidden (N, H), weight (V, H), bias (V,), labels (M,), rows (M,). Everything is computed in the dtype
of the arguments' widest floating type, at least float32; log-probs and entropies are in nats.
"""

import torch
from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`, (N, V), fp32 or fp64.

    The operands are widened before the product, so that nothing is rounded after it.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`log_softmax(logits)[label]` of each label, (M,); 0 where the label is `ignore_index`."""
    z = logits(hidden, weight, bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    return logprob(z if rows is None else z[rows], labels, ignore_index=ignore_index)


def logprob(z: Tensor, labels: Tensor, *, temperature: float = 1.0, ignore_index: int = -100) -> Tensor:
    """`log_softmax(z / temperature)[label]`, (M,); 0 where the label is `ignore_index`."""
    z = z.to(torch.promote_types(z.dtype, torch.float32)) / temperature
    scored = labels != ignore_index
    chosen = torch.log_softmax(z, -1).gather(-1, labels.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.where(scored, 0.0)


def token_stats(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The optional statistics of logits (M, V) that are already scaled, all labels valid."""
    logp = torch.log_softmax(z, -1)
    chosen = z.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return {
        # a logit of -inf has probability 0: 0 * -inf would be NaN, in the gradient too
        "entropy": -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp, -1),
        "mean_logit": z.mean(-1),
        "is_top1": chosen >= z.amax(-1),
        "lse": torch.logsumexp(z, -1),
    }
