"""The losses as modules: `DPOLoss` takes log-probs, `FusedLinearDPOLoss` hidden states and the head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdpo.losses import PairLogps, PreferenceOutput, check_loss_options, preference_loss
from fastdpo.ops.sequence import sequence_logprob


class DPOLoss(nn.Module):
    """A preference loss of per-sequence log-probs, reduced to its mean over pairs.

    Args:
        loss_type: a name in `fastdpo.LOSSES`, or several, which are added with `loss_weights`.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability that a label is flipped, in [0, 0.5), for the losses that have it.
    """

    def __init__(
        self,
        loss_type: str | Sequence[str] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_loss_options(loss_type, beta, label_smoothing, loss_weights)
        self.loss_type = loss_type
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.loss_weights = loss_weights

    def forward(
        self, policy_logps: Tensor, ref_logps: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, PreferenceOutput]:
        """Mean loss (a scalar), and the per-pair losses and rewards (B,).

        Args:
            policy_logps, ref_logps: (2B,) per-sequence log-probs in nats, chosen rows first, then rejected.
            lengths: (2B,) scored tokens of each row: `ipo` on summed log-probs averages over them.
        """
        for name, x in (("ref_logps", ref_logps), ("lengths", lengths)):
            if x is not None and x.shape != policy_logps.shape:
                raise ValueError(
                    f"DPOLoss: {name} must be {tuple(policy_logps.shape)} like policy_logps, got {tuple(x.shape)}."
                )
        if policy_logps.dim() != 1 or len(policy_logps) % 2 or not len(policy_logps):
            raise ValueError(
                f"DPOLoss: policy_logps must be (2B,), chosen rows then rejected rows, got {tuple(policy_logps.shape)}."
            )
        chosen, rejected = policy_logps.chunk(2)
        ref_chosen, ref_rejected = ref_logps.chunk(2)
        chosen_len, rejected_len = (None, None) if lengths is None else lengths.chunk(2)
        out = preference_loss(
            PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_len, rejected_len),
            self.loss_type,
            self.beta,
            label_smoothing=self.label_smoothing,
            loss_weights=self.loss_weights,
        )
        return out.losses.mean(), out

    def extra_repr(self) -> str:
        parts = [f"loss_type={self.loss_type!r}", f"beta={self.beta}"]
        if self.label_smoothing:
            parts.append(f"label_smoothing={self.label_smoothing}")
        if self.loss_weights is not None:
            parts.append(f"loss_weights={list(self.loss_weights)}")
        return ", ".join(parts)


class FusedLinearDPOLoss(DPOLoss):
    """The loss straight from hidden states and the head's weight; logits never exist.

    Args (besides those of `DPOLoss`):
        average: per-sequence log-probs are means over scored tokens instead of sums.
        ignore_index: labels that are not scored.
        temperature, logit_scale, softcap: see `fastdpo.linear_logprob`.
        shift: labels are unshifted, as Hugging Face models take them.
    """

    def __init__(
        self,
        loss_type: str | Sequence[str] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_weights: Sequence[float] | None = None,
        *,
        average: bool = False,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        shift: bool = False,
    ) -> None:
        super().__init__(loss_type, beta, label_smoothing, loss_weights)
        self.average = average
        self.ignore_index = ignore_index
        self.head = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "shift": shift,
        }

    def forward(
        self,
        weight: Tensor,
        hidden: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, PreferenceOutput]:
        """Mean loss (a scalar), and the per-pair losses and rewards (B,).

        Args:
            weight: (V, H); bias: (V,).
            hidden: (2B, T, H), chosen rows first, then rejected; labels: (2B, T), aligned unless `shift`.
            ref_hidden, ref_weight, ref_bias: the reference policy's; its head defaults to the policy's.
            ref_logps: (2B,) instead of ref_hidden: log-probs of the reference, made with the same `average`.

        Raises:
            ValueError: neither or both of ref_hidden and ref_logps.
        """
        self._check(hidden, labels, ref_hidden, ref_weight, ref_bias, ref_logps)
        options = {"average": self.average, "ignore_index": self.ignore_index, **self.head}
        logps = sequence_logprob(hidden, weight, labels, bias=bias, **options)
        if ref_logps is None:
            assert ref_hidden is not None
            if ref_weight is None:
                ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
            with torch.no_grad():
                ref_logps = sequence_logprob(ref_hidden, ref_weight, labels, bias=ref_bias, **options)
        scored = labels[:, 1:] if self.head["shift"] else labels
        lengths = None if self.average else (scored != self.ignore_index).sum(-1)
        return super().forward(logps, ref_logps.detach(), lengths)

    @staticmethod
    def _check(
        hidden: Tensor,
        labels: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        ref_logps: Tensor | None,
    ) -> None:
        what = "FusedLinearDPOLoss"
        if (ref_hidden is None) == (ref_logps is None):
            raise ValueError(f"{what}: pass either ref_hidden or ref_logps, the reference policy's.")
        if ref_logps is not None and (ref_weight is not None or ref_bias is not None):
            raise ValueError(f"{what}: ref_weight and ref_bias go with ref_hidden, and ref_logps was given.")
        if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
            raise ValueError(
                f"{what}: hidden must be (2B, T, H) and labels (2B, T), got {tuple(hidden.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if len(hidden) == 0 or len(hidden) % 2:
            raise ValueError(f"{what}: hidden must hold chosen rows and as many rejected rows, got {len(hidden)} rows.")
        if ref_hidden is not None and ref_hidden.shape[:2] != labels.shape:
            raise ValueError(
                f"{what}: ref_hidden must be {tuple(labels.shape)} + (H,) like hidden, got {tuple(ref_hidden.shape)}."
            )
        if ref_logps is not None and ref_logps.shape != labels.shape[:1]:
            raise ValueError(f"{what}: ref_logps must be ({len(labels)},), got {tuple(ref_logps.shape)}.")
