"""The losses as modules: `DPOLoss` takes log-probs, `FusedLinearDPOLoss` hidden states and the head."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.losses import LossOptions, PairLogps, PreferenceOutput
from fastdpo.losses.from_tokens import row_pair_logps
from fastdpo.losses.preference import pair_losses
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_stats
from fastdpo.ops.tensor_kinds import check_tensors


class DPOLoss(nn.Module):
    """A preference loss of per-sequence log-probs, reduced to its mean over pairs.

    Args:
        loss_type: a name in `fastdpo.LOSSES`, or several, which are added with `loss_weights`.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability that a label is flipped, in [0, 0.5), for the losses that have it.
        options: the other attributes of `fastdpo.LossOptions`: f_divergence_type, simpo_gamma, rpo_alpha, ...

    Raises:
        ValueError: see `fastdpo.LossOptions`.
    """

    sees_tokens = False

    def __init__(
        self,
        loss_type: str | Sequence[str] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_weights: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.options = LossOptions(loss_type, beta, label_smoothing, loss_weights, **options)
        for name in ("use_weighting", "ld_alpha"):
            value = getattr(self.options, name)
            if value is not None and value is not False and not self.sees_tokens:
                raise ValueError(
                    f"DPOLoss: {name}={value!r} needs the log-probs of each token, and this loss gets their sums; use "
                    "FusedLinearDPOLoss or DPOTrainer."
                )

    def forward(
        self, policy_logps: Tensor, ref_logps: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, PreferenceOutput]:
        """Mean loss (a scalar), and the per-pair losses and rewards (B,).

        Args:
            policy_logps: (2B,) per-sequence log-probs in nats, chosen rows first, then rejected.
            ref_logps: (2B,) the reference policy's; may be left out where no loss reads them (simpo, orpo, cpo, sft).
            lengths: (2B,) scored tokens of each row, for losses that average over them; without lengths they take
                the log-probs as averages already.
        """
        check_tensors("DPOLoss", policy_logps=policy_logps, ref_logps=ref_logps, lengths=lengths)
        if ref_logps is None:
            if self.options.needs_reference:
                raise ValueError(
                    f"DPOLoss: {', '.join(self.options.names)} compares with a reference; pass ref_logps (2B,)."
                )
            ref_logps = torch.zeros_like(policy_logps, requires_grad=False)
        for name, x in (("ref_logps", ref_logps), ("lengths", lengths)):
            if x is not None and x.shape != policy_logps.shape:
                raise ValueError(
                    f"DPOLoss: {name} must be {tuple(policy_logps.shape)} like policy_logps, got {tuple(x.shape)}."
                )
        if policy_logps.dim() != 1 or len(policy_logps) % 2 or not len(policy_logps):
            raise ValueError(
                f"DPOLoss: policy_logps must be (2B,), chosen rows then rejected rows, got {tuple(policy_logps.shape)}."
            )
        counts = (None, None) if lengths is None else lengths.chunk(2)
        out = pair_losses(PairLogps(*policy_logps.chunk(2), *ref_logps.chunk(2), *counts), self.options)
        return out.losses.mean(), out

    def extra_repr(self) -> str:
        values = {field.name: getattr(self.options, field.name) for field in fields(LossOptions)}
        always = ("loss_type", "beta")
        return ", ".join(
            f"{field.name}={values[field.name]!r}"
            for field in fields(LossOptions)
            if field.name in always or values[field.name] != field.default
        )


class FusedLinearDPOLoss(DPOLoss):
    """The loss straight from hidden states and the head's weight; logits never exist.

    Args (besides those of `DPOLoss`):
        average: per-sequence log-probs are means over scored tokens instead of sums (`aggregate="mean"`).
        ignore_index: labels that are not scored.
        temperature, logit_scale, softcap: see `fastdpo.linear_logprob`.
        shift: labels are unshifted, as Hugging Face models take them.
    """

    sees_tokens = True

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
        **options: Any,
    ) -> None:
        if average:
            options = {"aggregate": "mean", **options}
        super().__init__(loss_type, beta, label_smoothing, loss_weights, **options)
        if average and self.options.aggregate != "mean":
            raise ValueError(
                f"average=True is aggregate='mean', and aggregate={self.options.aggregate!r} was given too."
            )
        self.ignore_index = ignore_index
        self.head = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
        }
        self.shift = shift

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
        lora: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, PreferenceOutput]:
        """Mean loss (a scalar), and the per-pair losses and rewards (B,).

        Args:
            weight: (V, H); bias: (V,).
            hidden: (2B, T, H), chosen rows first, then rejected; labels: (2B, T), aligned unless `shift`.
            ref_hidden, ref_weight, ref_bias: the reference policy's; its head defaults to the policy's.
            ref_logps: (2B,) instead of ref_hidden: log-probs of the reference, made with the same `average`
                (and, under LD-DPO, the same weights of tokens).
            lora: (u, B) of a LoRA on the policy's head, see `linear_logprob`; a reference whose head is the policy's
                goes without it, as with the adapter switched off.

        Raises:
            ValueError: neither or both of ref_hidden and ref_logps, where a loss reads the reference.
        """
        self._check(weight, hidden, labels, bias, ref_hidden, ref_weight, ref_bias, ref_logps)
        if self.shift:
            labels = F.pad(labels[:, 1:], (0, 1), value=self.ignore_index)
        scored = labels != self.ignore_index
        head = {"ignore_index": self.ignore_index, **self.head}
        stats = ("log_sum_sq_probs",) if self.options.use_weighting else ()
        tokens = linear_logprob_stats(hidden, weight, labels, bias=bias, lora=lora, stats=stats, **head)
        policy = {"logprob": tokens.logprob}
        if tokens.log_sum_sq_probs is not None:
            policy["log_sum_sq_probs"] = tokens.log_sum_sq_probs
        reference = None
        if ref_hidden is not None and self.options.needs_reference:
            if ref_weight is None:
                ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
            with torch.no_grad():
                reference = linear_logprob(ref_hidden, ref_weight, labels, bias=ref_bias, **head)
        logps = row_pair_logps(policy, reference, scored, self.options)
        if ref_logps is not None and self.options.needs_reference:
            ref_sums = ref_logps.detach() * (scored.sum(-1) if self.options.aggregate == "mean" else 1)
            ref_chosen, ref_rejected = ref_sums.chunk(2)
            logps = logps._replace(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
        out = pair_losses(logps, self.options)
        return out.losses.mean(), out

    def _check(
        self,
        weight: Tensor,
        hidden: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        ref_logps: Tensor | None,
    ) -> None:
        what = "FusedLinearDPOLoss"
        check_tensors(what, weight=weight, hidden=hidden, labels=labels, bias=bias)
        check_tensors(what, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias, ref_logps=ref_logps)
        none = ref_hidden is None and ref_logps is None
        if (ref_hidden is not None and ref_logps is not None) or (none and self.options.needs_reference):
            raise ValueError(f"{what}: pass either ref_hidden or ref_logps, the reference policy's.")
        if ref_logps is not None and (ref_weight is not None or ref_bias is not None):
            raise ValueError(f"{what}: ref_weight and ref_bias go with ref_hidden, and ref_logps was given.")
        if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
            raise ValueError(
                f"{what}: hidden must be (2B, T, H) and labels (2B, T), got {tuple(hidden.shape)} and "
                f"{tuple(labels.shape)}"
                f"{'; weight comes first, then hidden' if weight.dim() == 3 and hidden.dim() == 2 else ''}."
            )
        if len(hidden) == 0 or len(hidden) % 2:
            raise ValueError(f"{what}: hidden must hold chosen rows and as many rejected rows, got {len(hidden)} rows.")
        if ref_hidden is not None and ref_hidden.shape[:2] != labels.shape:
            raise ValueError(
                f"{what}: ref_hidden must be {tuple(labels.shape)} + (H,) like hidden, got {tuple(ref_hidden.shape)}."
            )
        if ref_logps is not None and ref_logps.shape != labels.shape[:1]:
            raise ValueError(f"{what}: ref_logps must be ({len(labels)},), got {tuple(ref_logps.shape)}.")
