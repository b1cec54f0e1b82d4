"""What stands where the fused head of TRL's trainers calls its `ChunkedLogProbFunction`, and a LoRA on that head.

`fastdpo.integrations.trl` puts it there. Nothing here imports TRL or PEFT before a trainer of TRL's calls it.
"""

import functools
import importlib
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastdpo.ops.linear_logprob.api import TokenStats, linear_logprob_stats

# the optional results of TRL's function, in its order, and our names of them
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


class ChunkedLogProb:
    """In place of TRL's autograd function of the same arguments and results."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(OUTPUTS),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,), None where not in `outputs`.

        Log-probs and entropy are differentiable. All of them are fp32 (float64 for float64 operands), but for the
        bool `is_top1`.

        Args:
            hidden: (N, H); weight: (V, H); bias: (V,); targets: (N,) int64, all of them scored.
            chunk_size: not used: FASTDPO_WORKSPACE_MB bounds the workspace.
            temperature, final_logit_softcapping, logit_scale: see `fastdpo.linear_logprob`.
            outputs: which of the optional results to compute.
        """
        del chunk_size
        stats = tuple(ours for theirs, ours in OUTPUTS.items() if theirs in outputs)
        scoring = Scoring(temperature, logit_scale, final_logit_softcapping, stats)
        lora = _lora_pair(hidden)
        # the entropy's gradient costs 2NHV in the forward, and the kept tiles: not before somebody asked for one
        at_once = EntropyOnDemand.asked_for
        scores = scoring.run(hidden, weight, bias, *lora, targets, at_once)
        entropy = scores.entropy
        if entropy is not None and scores.logprob.requires_grad and not at_once:
            entropy = EntropyOnDemand.apply(scoring, entropy, hidden, weight, bias, *lora, targets)
        return scores.logprob, entropy, scores.log_sum_sq_probs, scores.mean_logit, scores.is_top1


class Scoring(NamedTuple):
    """What is computed of each token."""

    temperature: float
    logit_scale: float
    softcap: float | None
    stats: tuple[str, ...]

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor | None,
        b: Tensor | None,
        targets: Tensor,
        entropy_grad: bool,
    ) -> TokenStats:
        """`linear_logprob_stats` of hidden (N, H), weight (V, H), bias (V,), a LoRA's u (N, r), b (V, r), targets."""
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)  # as TRL: `cast_lm_head_to_fp32` widens the states alone
        return linear_logprob_stats(
            hidden,
            # aliases: ZeRO-3 takes the storage of a gathered parameter away before the backward
            weight.view_as(weight),
            targets,
            bias=bias if bias is None else bias.view_as(bias),
            lora=None if u is None or b is None else (u, b),
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            stats=self.stats,
            entropy_grad=entropy_grad,
        )


class EntropyOnDemand(torch.autograd.Function):
    """An entropy made without its gradient, which is made from the operands if somebody asks for it after all.

    Most trainers only log the entropy. One that differentiates it (GRPO's bonus) pays for it twice in the first
    backward; from then on (`asked_for`) the forward makes it.
    """

    asked_for = False

    @staticmethod
    def forward(ctx: Any, scoring: Scoring, entropy: Tensor, *operands: Tensor | None) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.scoring = scoring._replace(stats=("entropy",))
        device = entropy.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not upstream[0].any():  # a compiled graph hands back zeros for an entropy that is not in its loss
            return (None,) * len(ctx.needs_input_grad)
        EntropyOnDemand.asked_for = True
        gather = importlib.import_module("trl.trainer.utils").maybe_gather_lm_head_ctx
        *operands, targets = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:-1]
        with gather(*operands[1:3]), torch.enable_grad(), torch.autocast(*ctx.autocast):
            leaves = [
                x if x is None else x.detach().requires_grad_(need) for x, need in zip(operands, needs, strict=True)
            ]
            entropy = ctx.scoring.run(*leaves, targets, True).entropy
            inputs = [x for x in leaves if x is not None and x.requires_grad]
            gradients = iter(torch.autograd.grad(entropy, inputs, upstream[0]))
        return (None, None, *(next(gradients) if need else None for need in needs), None)


# TRL's fused head passes on the weight below an adapter, so the adapter's layer comes by another way
_tuned_head: ContextVar[nn.Module | None] = ContextVar("head, with an adapter, of the model in forward", default=None)


def with_lora(theirs: Callable[..., None]) -> Callable[..., None]:
    """TRL's `add_fused_lm_head`, whose forward says which layer the head is where that has an adapter."""

    @functools.wraps(theirs)
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        theirs(model, *args, **kwargs)
        fused = model.forward.__func__  # of the instance that is called: a deep copy of the model has its own

        # generate() and Trainer read the signature
        @functools.wraps(type(model).forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            head = self.get_output_embeddings()
            if not kwargs.get("fused_lm_head") or not isinstance(head, BaseTunerLayer):
                return fused(self, *args, **kwargs)
            utils = importlib.import_module("trl.trainer.utils")
            if utils._ChunkedLogProbFunction is not ChunkedLogProb:
                raise RuntimeError(
                    "patch_trl was undone while a model with a LoRA on lm_head trains, and without it TRL leaves that "
                    "LoRA out of the log-probs; undo it after training."
                )
            token = _tuned_head.set(cast(nn.Module, head))
            try:
                return fused(self, *args, **kwargs)
            finally:
                _tuned_head.reset(token)

        model.forward = types.MethodType(forward, model)

    return add_fused_lm_head


def _lora_pair(hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(u, B) of the LoRA in use on the head, if any: u (N, r) and B (V, r)."""
    head = _tuned_head.get()
    if head is None:
        return None, None
    from torch.distributed.tensor import DTensor

    from fastdpo.models.head import HeadParts, head_parts

    parts = head_parts(head)
    if not isinstance(parts, HeadParts):
        raise ValueError(f"lm_head is {parts}; patch_trl takes one plain LoRA on it at a time.")
    if parts.lora is None:
        return None, None
    if any(isinstance(x, DTensor) or hasattr(x, "ds_status") for x in parts.lora.parameters()):
        raise ValueError(
            "patch_trl cannot read a LoRA on lm_head that FSDP2 or ZeRO-3 has sharded; remove 'lm_head' from "
            "target_modules."
        )
    return parts.lora_pair(hidden) or (None, None)


class _PlainLoraPasses(type):
    def __instancecheck__(cls, head: Any) -> bool:
        from peft.tuners.tuners_utils import BaseTunerLayer

        from fastdpo.models.head import HeadParts, head_parts

        return isinstance(head, BaseTunerLayer) and not isinstance(head_parts(head), HeadParts)  # pyright: ignore[reportArgumentType]


class UnsupportedHead(metaclass=_PlainLoraPasses):
    """In place of PEFT's BaseTunerLayer, of which a trainer refuses its head to be."""
