"""Liger's fused linear losses by name, computed by fastdpo. liger-kernel itself is not needed and never imported.

    from fastdpo.integrations.liger import LigerFusedLinearDPOLoss

in place of Liger's own line is the whole change: constructor, call and returned values are those of liger-kernel 0.8.5.
"""

from warnings import warn

import torch
from torch import Tensor, nn

from fastdpo.integrations.liger_cross_entropy import (
    CrossEntropyOutput,
    LigerFusedLinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
)
from fastdpo.losses import LossOptions, PairLogps, preference_loss
from fastdpo.ops.sequence import sequence_logprob

__all__ = [
    "LOSS_TYPES",
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "liger_fused_linear_cross_entropy",
]

# each is the formula of fastdpo.LOSSES under that name; liger-kernel 0.8.5 has all but ipo
LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
SMOOTHED = ("exo_pair", "robust")


class LigerFusedLinearDPOLoss(nn.Module):
    """A preference loss from hidden states and the head, with liger-kernel 0.8.5's interface and numbers.

    Where it differs from Liger's class:
      - `ipo` works (averaged over each completion's tokens, as in TRL);
      - only scored positions are projected (on a CPU; on a GPU all are), log-probs are accurate to fp32 whatever the
        operands' dtype, float64 operands give float64, and a forward without gradients computes none;
      - a completion without a scored token counts as 0, where Liger's average is NaN, and so is its loss without any
        chosen target;
      - an odd number of rows, or a reference that is missing, is answered in words.

    Args:
        ignore_index: targets that are not scored.
        beta: strength of the pull to the reference, > 0.
        alpha: weight of the NLL term.
        compute_nll_loss: add `alpha` times the mean NLL over all chosen targets.
        compiled, chunk_size: taken and not used: nothing needs compiling, and memory is bounded by
            FASTDPO_WORKSPACE_MB whatever the batch.
        use_ref_model: False: the reference's log-probs count as 0, whether or not its tensors are given.
        average_log_prob: per-sequence log-probs are means over scored tokens instead of sums.
        loss_type: a name in `LOSS_TYPES`.
        label_smoothing: for `exo_pair` (> 0) and `robust` (in [0, 0.5)). As in Liger, `sigmoid` ignores it (a warning
            says so), unlike in `fastdpo.FusedLinearDPOLoss`.
        discopop_tau: temperature of `discopop`'s modulation.

    Raises:
        ValueError: an unknown loss_type, or an option outside its range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ValueError(
                f"LigerFusedLinearDPOLoss: unknown loss_type {loss_type!r}; choose from {', '.join(LOSS_TYPES)}."
            )
        if loss_type == "exo_pair" and not label_smoothing:
            raise ValueError("LigerFusedLinearDPOLoss: exo_pair needs label_smoothing > 0; its paper recommends 1e-3.")
        if label_smoothing and loss_type not in SMOOTHED:
            warn(
                f"LigerFusedLinearDPOLoss: loss_type {loss_type!r} has no label smoothing in Liger, so "
                f"label_smoothing={label_smoothing} is not applied; it applies to {', '.join(SMOOTHED)}.",
                stacklevel=2,
            )
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        self._options()

    def _options(self) -> LossOptions:
        # made anew at each call: as in Liger, an attribute that is set later counts
        smoothing = self.label_smoothing if self.loss_type in SMOOTHED else 0.0
        return LossOptions(self.loss_type, self.beta, smoothing, discopop_tau=self.discopop_tau)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss (a scalar, mean over pairs) and seven detached results.

        Args:
            lin_weight: (V, H); bias: (V,).
            _input: (2B, T, H), chosen rows first, then rejected; target: (2B, T) int64, aligned with it.
            ref_input, ref_weight, ref_bias: the reference policy's hidden states and head.

        Returns:
            loss, (chosen_logps (B,), rejected_logps (B,), chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards (B,), rejected_rewards (B,)). The means of the logits are over all positions and the whole
            vocabulary; nll_loss is without `alpha`, and 0 unless asked for.

        Raises:
            TypeError, ValueError: operands that do not go together; see also `fastdpo.linear_logprob`.
        """
        self._check(_input, target, ref_input, ref_weight)
        target = target.long()
        sums = sequence_logprob(_input, lin_weight, target, bias=bias, ignore_index=self.ignore_index)
        lengths = (target != self.ignore_index).sum(-1)
        logps = self._aggregate(sums, lengths)
        ref_logps = torch.zeros_like(logps)
        if self.use_ref_model:
            assert ref_input is not None
            assert ref_weight is not None
            with torch.no_grad():
                ref_logps = self._aggregate(
                    sequence_logprob(ref_input, ref_weight, target, bias=ref_bias, ignore_index=self.ignore_index),
                    lengths,
                )
        chosen, rejected = logps.chunk(2)
        counts = (None, None) if self.average_log_prob else lengths.chunk(2)
        out = preference_loss(PairLogps(chosen, rejected, *ref_logps.chunk(2), *counts), self._options())
        loss, half = out.losses.mean(), len(target) // 2
        nll = sums.new_zeros(())
        if self.compute_nll_loss:
            nll = -sums[:half].sum() / lengths[:half].sum().clamp(min=1)
            loss = loss + self.alpha * nll
        chosen_mean = _mean_logit(_input[:half], lin_weight, bias)
        rejected_mean = _mean_logit(_input[half:], lin_weight, bias)
        aux = (chosen, rejected, chosen_mean, rejected_mean, nll, out.chosen_rewards, out.rejected_rewards)
        return loss, tuple(x.detach() for x in aux)

    def _aggregate(self, sums: Tensor, lengths: Tensor) -> Tensor:
        return sums / lengths.clamp(min=1) if self.average_log_prob else sums

    def _check(self, _input: Tensor, target: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None) -> None:
        what = "LigerFusedLinearDPOLoss"
        if _input.dim() != 3 or target.shape != _input.shape[:2]:
            raise ValueError(
                f"{what}: _input must be (2B, T, H) and target (2B, T), got {tuple(_input.shape)} and "
                f"{tuple(target.shape)}."
            )
        if len(target) == 0 or len(target) % 2:
            raise ValueError(f"{what}: _input must hold chosen rows and as many rejected rows, got {len(target)} rows.")
        if not self.use_ref_model:
            return
        if ref_input is None or ref_weight is None:
            raise ValueError(
                f"{what}: use_ref_model=True needs ref_input and ref_weight; for a loss without a reference "
                f"construct it with use_ref_model=False."
            )
        if ref_input.shape[:-1] != target.shape:
            raise ValueError(
                f"{what}: ref_input must be {tuple(target.shape)} + (H,) like _input, got {tuple(ref_input.shape)}."
            )


@torch.no_grad()
def _mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean of hidden @ weight.T + bias over all positions and columns: a product of two means, no logits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    mean = (hidden.mean((0, 1), dtype=wide) * weight.mean(0, dtype=wide)).sum()
    return mean if bias is None else mean + bias.mean(dtype=wide)
