"""Liger's fused linear cross-entropy by name; import it from `fastdpo.integrations.liger`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdpo.ops.linear_logprob.api import linear_logprob_stats


@dataclass
class CrossEntropyOutput:
    """What `liger_fused_linear_cross_entropy` returns where more than the loss is asked for."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """Cross-entropy from hidden states and the head, with the signature of `liger_kernel.transformers.functional`'s.

    Args:
        input: (N, H); weight: (V, H); target: (N,) int64; bias: (V,).
        ce_weight: (V,), weight of each class; with "mean" their sum over the targets is divided by.
        reduction: "mean" over scored targets, "sum", or "none".
        softcap: `softcap * tanh(logit / softcap)`.
        use_token_scaling: each token's loss times its probability, detached.
        return_token_accuracy: also whether no other column has a larger logit, reduced to a mean unless "none".
        accum_dtype, chunk_mem_const: taken and not used: products accumulate in fp32 and memory is bounded.
        label_smoothing, lse_square_scale, return_z_loss, return_predicted_tokens: must stay at their defaults.

    Returns:
        The loss, float32 (float64 for float64 operands), a scalar or (N,); or a `CrossEntropyOutput` with
        return_token_accuracy. 0 where no target is scored.

    Raises:
        NotImplementedError: an argument of the last line of Args that is not at its default.
        TypeError, ValueError: see `fastdpo.linear_logprob`.
    """
    _check_cross_entropy(reduction, label_smoothing, lse_square_scale, return_z_loss, return_predicted_tokens)
    if ce_weight is not None and ce_weight.shape != weight.shape[:1]:
        raise ValueError(
            f"fused linear cross-entropy: ce_weight must be ({len(weight)},), got {tuple(ce_weight.shape)}."
        )
    stats = ("is_top1",) if return_token_accuracy else ()
    scores = linear_logprob_stats(
        input, weight, target, bias=bias, softcap=softcap, ignore_index=ignore_index, stats=stats
    )
    losses, scored = -scores.logprob, target != ignore_index
    count = total = scored.sum()
    if ce_weight is not None:
        share = ce_weight[target.where(scored, 0)].to(losses.dtype).where(scored, 0.0)
        losses, total = losses * share, share.sum()
    if use_token_scaling:
        losses = losses * scores.logprob.detach().exp()
    if reduction == "none":
        loss = losses
    else:
        loss = losses.sum()
        loss = loss / total.where(total != 0, torch.ones_like(total)) if reduction == "mean" else loss
    if scores.is_top1 is None:
        return loss
    hits = (scores.is_top1 & scored).to(losses.dtype)
    return CrossEntropyOutput(loss, token_accuracy=hits if reduction == "none" else hits.sum() / count.clamp(min=1))


def _check_cross_entropy(
    reduction: str, label_smoothing: float, lse_square_scale: float, z_loss: bool, predicted: bool
) -> None:
    unsupported = {
        "label_smoothing": label_smoothing,
        "lse_square_scale": lse_square_scale,
        "return_z_loss": z_loss,
        "return_predicted_tokens": predicted,
    }
    for name, value in unsupported.items():
        if value:
            raise NotImplementedError(
                f"fused linear cross-entropy: {name}={value} needs Liger's own kernel; leave {name} out here."
            )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"fused linear cross-entropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """`liger_fused_linear_cross_entropy` as a module, with liger-kernel 0.8.5's constructor and call."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        _check_cross_entropy(reduction, label_smoothing, lse_square_scale, return_z_loss, return_predicted_tokens)
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss of (N, H) hidden states `_input` and (N,) targets; see `liger_fused_linear_cross_entropy`."""
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            self.ce_weight,
            self.ignore_index,
            reduction=self.reduction,
            softcap=self.softcap,
            lse_square_scale=self.lse_square_scale,
            label_smoothing=self.label_smoothing,
            return_z_loss=self.return_z_loss,
            return_predicted_tokens=self.return_predicted_tokens,
            use_token_scaling=self.use_token_scaling,
            return_token_accuracy=self.return_token_accuracy,
        )
