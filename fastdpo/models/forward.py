"""A causal LM's forward call that returns log-probs instead of logits.

The loss needs the log-probs of a few thousand chosen tokens, not the logits of every position. So the model's
own `forward` is replaced, on that one instance, by one that answers a call with our private arguments from
the backbone's last hidden states and the head's weight, and every other call as before. The head is read
inside the model's forward call, where FSDP, DeepSpeed and DDP have their hooks.
"""

import functools
import logging
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from fastdpo.data.collate import REFERENCE_COLUMNS
from fastdpo.models.backbone import backbone, decoder_config
from fastdpo.models.causality import sees_ahead
from fastdpo.models.head import HeadParts, head_parts
from fastdpo.models.head_check import Route, difference_at_head
from fastdpo.models.logit_transform import logit_transform, transformed
from fastdpo.ops import reference
from fastdpo.ops.linear_logprob.api import linear_logprob_stats

if TYPE_CHECKING:  # LLaMA-Factory's trainer uses this module beside a transformers that is older than these names
    from transformers import PreTrainedModel

    from fastdpo.data.layouts import Span

logger = logging.getLogger(__name__)

STATISTICS = ("entropy", "mean_logit", "is_top1")


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, or the model itself."""
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


class LogprobForward:
    """Gives a causal LM a forward call that returns log-probs, while `installed()`.

    `model(input_ids=..., attention_mask=..., logprob_rows=(M,), logprob_targets=(M,), logprob_stats=())` then
    returns `{"logprob": (M,) fp32, ...}` with one (M,) tensor for each statistic asked for. `documents` and `branches`
    (R, T) and `spans` stand in for the mask where rows hold several sequences (see `attention.allowed`). With
    `output_router_logits=True` it returns a mixture of experts' own `"aux_loss"` (a scalar). A head that is a linear
    layer, perhaps with a LoRA, goes to `linear_logprob_stats` (`route` is "head"). Any other (DoRA, a quantized head)
    is called on the scored rows, so (M, V) logits exist ("module"). Where either is not what the model's own forward
    does with a few tokens (a multiplier that no config names, layers between backbone and head), its own logits of
    every position are built ("model"). One line is logged for both.

    Attributes:
        attention: what the decoder's `config._attn_implementation` is while `installed()`; None: what it is anyway.

    Raises:
        ValueError: the model has no head, or its logits depend on later tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = cast("PreTrainedModel", unwrap_peft(model))
        self.scale, self.softcap = logit_transform(self.model.config.get_text_config())
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no language model head; fastdpo trains causal LMs.")
        parts = head_parts(head)
        self.route = "head" if isinstance(parts, HeadParts) else "module"
        if not isinstance(parts, HeadParts):
            logger.warning(
                f"the head is {parts}, not a linear layer or a plain LoRA on one, so the logits of the scored tokens "
                "are built."
            )
        self.attention: str | None = None
        # the forward that is put in place at the next installation; accelerate wraps it in between
        self._ours: Any = None
        self._depth = 0
        self.check()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `forward` on entry and put back what was found on exit; calls may be nested."""
        attributes = vars(self.model)
        own_forward = attributes.get("forward")
        config: Any = decoder_config(self.model)
        usual = config._attn_implementation
        if self._depth == 0:
            self.model.forward = self._make(self.model.forward) if self._ours is None else self._ours
            if self.attention is not None:
                # not by the property, which sets every part of a composite configuration
                config._attn_implementation_internal = self.attention
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                if self.attention is not None:
                    config._attn_implementation_internal = usual
                self._ours = attributes.pop("forward")
                if own_forward is not None:
                    self.model.forward = own_forward

    def _make(self, original: Any) -> Any:
        # generate() and Trainer read the signature
        @functools.wraps(type(self.model).forward)
        def forward(model: "PreTrainedModel", *args: Any, **kwargs: Any) -> Any:
            if "logprob_rows" not in kwargs:
                return original(*args, **kwargs)
            return self._logprobs(model, original, *args, **kwargs)

        return types.MethodType(forward, self.model)

    def _logprobs(
        self,
        model: "PreTrainedModel",
        original: Any,
        *args: Any,
        logprob_rows: Tensor,
        logprob_targets: Tensor,
        logprob_stats: tuple[str, ...] = (),
        documents: Tensor | None = None,
        branches: Tensor | None = None,
        spans: "Sequence[Span] | None" = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        # PEFT passes on arguments of the causal LM's forward that its backbone does not know
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "labels"}
        kwargs |= {"use_cache": False, "return_dict": True}
        if documents is not None and branches is not None:
            # llama_factory.py runs beside a transformers that is older than what this needs
            from fastdpo.models.attention import attention_mask

            kind = decoder_config(model)._attn_implementation
            kwargs["attention_mask"] = attention_mask(kind, model.dtype, documents, branches, spans)
        if self.route == "model":
            output = original(*args, **kwargs)
            logits = output.logits.flatten(0, 1)[logprob_rows.to(output.logits.device)]
            results = _of_logits(logits, logprob_targets, logprob_stats)
            return results if getattr(output, "aux_loss", None) is None else {**results, "aux_loss": output.aux_loss}
        auxiliary: dict[str, Tensor] = {}
        if kwargs.get("output_router_logits"):
            hidden, auxiliary["aux_loss"] = _with_aux_loss(model, original, *args, **kwargs)
        else:
            # looked up at each call: FSDP and PEFT replace modules after the patch
            hidden = cast(nn.Module, backbone(model))(*args, **kwargs).last_hidden_state
        head = cast(nn.Module, model.get_output_embeddings())
        device = next(head.parameters()).device
        hidden, rows, targets = hidden.to(device), logprob_rows.to(device), logprob_targets.to(device)
        # whether an adapter is on changes between the policy's call and the reference's
        parts = head_parts(head)
        if isinstance(parts, HeadParts):
            flat = hidden.flatten(0, 1)
            token = linear_logprob_stats(
                flat,
                parts.linear.weight,
                targets,
                bias=parts.linear.bias,
                lora=parts.lora_pair(flat),
                rows=rows,
                logit_scale=self.scale,
                softcap=self.softcap,
                stats=logprob_stats,
                entropy_grad=False,
            )
            return {"logprob": token.logprob, **{name: getattr(token, name) for name in logprob_stats}, **auxiliary}
        logits = transformed(head(hidden.flatten(0, 1)[rows]), self.scale, self.softcap)
        return {**_of_logits(logits, targets, logprob_stats), **auxiliary}

    @torch.no_grad()
    def check(self) -> None:
        """Compare with the model's own forward on a few tokens, before training; take its logits if that differs.

        Raises:
            ValueError: a later token changes the logits of an earlier one.
        """
        parameter = next(self.model.parameters())
        if parameter.is_meta or parameter.numel() == 0:  # sharded at load: nothing to run yet
            return
        name = type(self.model).__name__
        ids = _probe_ids(self.model.config.get_text_config()).to(parameter.device)
        training = self.model.training
        self.model.eval()
        try:
            difference = self._difference(ids[:, :8])
            ahead = sees_ahead(self.model, ids)
        finally:
            self.model.train(training)
        if ahead:
            hint = "" if getattr(self.model.config, "is_decoder", True) else " (or set is_decoder=True in its config)"
            raise ValueError(
                f"{name} is not causal: a later token changes the logits of an earlier one, so its log-probs are not "
                f"those of next tokens; train a causal language model{hint}."
            )
        if difference is not None:
            self.route = "model"
            logger.warning(
                f"{name} computes its logits in a way that fastdpo does not know ({difference}), so its own logits of "
                "every position are built; please report the architecture."
            )

    def _difference(self, ids: Tensor) -> str | None:
        core, head = backbone(self.model), cast(nn.Module, self.model.get_output_embeddings())
        if core is None:
            return "it has no backbone apart from its head"

        def logprobs(ids: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
            with self.installed():
                return self.model(input_ids=ids, logprob_rows=rows, logprob_targets=targets)["logprob"]

        route = Route(core, head, self.scale, self.softcap, self.route == "head", logprobs)
        return difference_at_head(self.model, ids, route)


def _probe_ids(config: Any) -> Tensor:
    """(1, 10) tokens to run a model on; none is a pad token, which some models take out themselves."""
    pad = getattr(config, "pad_token_id", None)
    known = [token for token in range(min(config.vocab_size, 11)) if token != pad] or [0]
    return torch.tensor([[known[place % len(known)] for place in range(10)]])


def _of_logits(logits: Tensor, targets: Tensor, statistics: tuple[str, ...]) -> dict[str, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.device)
    output = {"logprob": reference.logprob(logits, targets)}
    if statistics:
        with torch.no_grad():
            computed = reference.token_stats(logits, targets)
        output |= {name: computed[name] for name in statistics}
    return output


def _with_aux_loss(model: "PreTrainedModel", original: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Last hidden states, and the auxiliary loss as the architecture's own forward computes it.

    That forward multiplies one position of each sequence by the head, to no other end.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output.last_hidden_state)

    handle = cast(nn.Module, backbone(model)).register_forward_hook(keep)
    try:
        loss = original(*args, **{**kwargs, "logits_to_keep": 1}).aux_loss
    finally:
        handle.remove()
    return seen[0], loss


# what a batch has beside the model's inputs
_NOT_INPUTS = ("rows", "targets", "offsets", "lengths", *REFERENCE_COLUMNS)


def model_call(inputs: dict[str, Any]) -> dict[str, Any]:
    call = {name: value for name, value in inputs.items() if name not in _NOT_INPUTS}
    return call | {"logprob_rows": inputs["rows"], "logprob_targets": inputs["targets"]}
