"""What a batch is trained on: the loss of pairs, or of single answers, and the batch's table of metrics."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from fastdpo.data.collate import KL_BATCH, UNPAIRED_REFERENCE_COLUMNS
from fastdpo.data.rows.sides import LABEL
from fastdpo.losses.from_tokens import SequenceLogps, pair_logps
from fastdpo.losses.options import LossOptions
from fastdpo.losses.preference import pair_losses
from fastdpo.losses.unpaired import UnpairedOptions, unpaired_loss
from fastdpo.models.forward import STATISTICS, model_call
from fastdpo.ops.sequence import segment_sum
from fastdpo.ops.switches import widest_float
from fastdpo.training.reference.precomputed import stored_logps
from fastdpo.training.report import metrics
from fastdpo.training.report.metrics import Columns

# a model's call -> the log-probs of its scored tokens (M,)
Logps = Callable[[dict[str, Any]], Tensor]


class BatchLoss(NamedTuple):
    """losses: (B,), with gradients. columns: those of the metrics, (B,) each, or a scalar for all."""

    losses: Tensor
    columns: dict[str, Tensor]


class PairObjective:
    """The loss of pairs."""

    columns: Columns = metrics.PAIRS

    def __init__(self, options: LossOptions) -> None:
        self.options = options
        self.statistics = STATISTICS + (("log_sum_sq_probs",) if options.use_weighting else ())

    def stored(self, batch: Mapping[str, Any]) -> SequenceLogps | None:
        """The reference's sums that the batch brought along."""
        return stored_logps(batch)

    def shift(self, batch: Mapping[str, Any], policy: Logps, reference: Logps) -> None:
        """Pairs are compared with each other."""

    def __call__(
        self,
        batch: Mapping[str, Any],
        policy: Mapping[str, Tensor],
        reference: Tensor | SequenceLogps | None,
        shift: None,
        training: bool,
    ) -> BatchLoss:
        offsets = batch["offsets"].to(policy["logprob"].device)
        logps = pair_logps(policy, reference, offsets, self.options)
        output = pair_losses(logps, self.options)
        return BatchLoss(output.losses, metrics.pair_columns(output, logps, policy, offsets, _lengths(batch)))


class AnswerObjective:
    """The losses of single answers; a `Part` of checkpoints: BCO's running mean of the rewards goes on."""

    statistics = STATISTICS

    def __init__(self, options: UnpairedOptions, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        kind = options.loss.shift
        self.columns = metrics.SHIFTED[kind] if kind else metrics.ANSWERS
        # the sum of all rewards of training, over all processes, and how many they were
        self._rewards = torch.zeros(2, dtype=widest_float(accelerator.device.type))

    def stored(self, batch: Mapping[str, Any]) -> SequenceLogps | None:
        """The reference's sums that the batch brought along."""
        sums = batch.get(UNPAIRED_REFERENCE_COLUMNS[0])
        return None if sums is None else SequenceLogps(sums, torch.zeros_like(sums))

    def shift(self, batch: Mapping[str, Any], policy: Logps, reference: Logps) -> Tensor | None:
        """KTO's estimate of the KL, a scalar >= 0 in nats, the same in every process; None for other losses.

        policy, reference: the models, whose calls may have a gradient or not: none goes through the estimate.
        """
        if self.options.loss.shift != "kl":
            return None
        others = batch.get(KL_BATCH)
        if others is None:
            raise ValueError(
                f"{self.options.loss_type} needs each row's KL_completion_ids, another row's completion, and the batch "
                "has none; leave data_collator out, or let it keep the column."
            )
        call, offsets = model_call(others), others["offsets"]
        stored = batch.get(UNPAIRED_REFERENCE_COLUMNS[1])
        with torch.no_grad():
            mine = _sums(policy(call), offsets)
            theirs = _sums(reference(call), offsets) if stored is None else stored.to(mine)
        kl = (mine - theirs).mean()
        return cast(Tensor, self.accelerator.reduce(kl, "mean")).clamp(min=0)

    def __call__(
        self,
        batch: Mapping[str, Any],
        policy: Mapping[str, Tensor],
        reference: Tensor | SequenceLogps,
        shift: Tensor | None,
        training: bool,
    ) -> BatchLoss:
        tokens = policy["logprob"]
        offsets, label = batch["offsets"].to(tokens.device), batch[LABEL].to(tokens.device)
        logps = segment_sum(tokens, offsets)
        known = isinstance(reference, SequenceLogps)
        ref_logps = (reference.total if known else _sums(reference, offsets)).to(logps)
        kind = self.options.loss.shift
        compared: Tensor | float = 0.0
        if kind == "kl":
            assert shift is not None
            compared = self.options.beta * shift
        elif kind == "delta":
            compared = self._running_mean((logps - ref_logps).detach() * self.options.beta, training)
        output = unpaired_loss(logps, ref_logps, label, self.options, shift=compared)
        columns = metrics.answer_columns(output, logps, label, policy, offsets, _lengths(batch))
        if kind:
            columns[kind] = torch.as_tensor(compared if shift is None else shift)
        return BatchLoss(output.losses, columns)

    def _running_mean(self, rewards: Tensor, training: bool) -> Tensor:
        """The mean of all rewards of training, these included if they are of it; 0 before there are any."""
        self._rewards = self._rewards.to(rewards.device)
        if training:
            new = torch.stack([rewards.to(self._rewards).sum(), self._rewards.new_tensor(len(rewards))])
            self._rewards = self._rewards + cast(Tensor, self.accelerator.reduce(new, "sum"))
        return (self._rewards[0] / self._rewards[1].clamp(min=1)).to(rewards)

    def state_dict(self) -> dict[str, Any]:
        return {"running_rewards": self._rewards.tolist()} if self.options.loss.shift == "delta" else {}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        sums = (state or {}).get("running_rewards", [0.0, 0.0])
        self._rewards = torch.tensor(sums, dtype=self._rewards.dtype, device=self._rewards.device)


def _sums(tokens: Tensor, offsets: Tensor) -> Tensor:
    return segment_sum(tokens, offsets.to(tokens.device))


def _lengths(batch: Mapping[str, Any]) -> Tensor:
    return batch["lengths"] if "lengths" in batch else batch["attention_mask"].sum(1)
