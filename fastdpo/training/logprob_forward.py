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

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob import linear_logprob_stats
from fastdpo.training.head_parts import HeadParts, head_parts

if TYPE_CHECKING:  # LLaMA-Factory's trainer uses this module beside a transformers that is older than these names
    from transformers import PreTrainedConfig, PreTrainedModel

    from fastdpo.data.layouts import Span

logger = logging.getLogger(__name__)

STATISTICS = ("entropy", "mean_logit", "is_top1")


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The causal LM inside a PEFT model, or the model itself."""
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


def logit_transform(config: "PreTrainedConfig") -> tuple[float, float | None]:
    """(logit_scale, softcap): what the architecture does to `hidden @ weight.T` before the softmax.

    Multipliers are `logit_scale` (Cohere), `output_multiplier` and `lm_head_multiplier` (Falcon-H1);
    `logits_scaling` divides (Granite) but for HyperCLOVA X, which multiplies. A softcap (Gemma) comes after.
    """
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if value is not None:
            scale = 1.0 / value if name == "logits_scaling" and config.model_type != "hyperclovax" else float(value)
            break
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, softcap if softcap is None else float(softcap)


class LogprobForward:
    """Gives a causal LM a forward call that returns log-probs, while `installed()`.

    `model(input_ids=..., attention_mask=..., logprob_rows=(M,), logprob_targets=(M,), logprob_stats=())` then
    returns `{"logprob": (M,) fp32, ...}` with one (M,) tensor for each statistic asked for. `documents` and `branches`
    (R, T) and `spans` stand in for the mask where rows hold several sequences (see `attention.allowed`). With
    `output_router_logits=True` it returns a mixture of experts' own `"aux_loss"` (a scalar). A head that is a linear
    layer, perhaps with a LoRA, goes to `linear_logprob_stats` (`route` is "head"). Any other (DoRA, a quantized head)
    is called on the scored rows, so (M, V) logits exist ("module"). Where either differs from what the model's own
    forward says of a few tokens (a multiplier that no config names), its own logits of every position are built
    ("model"). One line is logged for both.

    Attributes:
        attention: what `config._attn_implementation` is while `installed()`; None: what it is anyway.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = cast("PreTrainedModel", unwrap_peft(model))
        self.scale, self.softcap = logit_transform(self.model.config)
        head = self.model.get_output_embeddings()
        if head is None or self.model.base_model is self.model:
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
        found = attributes.get("forward")
        config = self.model.config
        usual = config._attn_implementation
        if self._depth == 0:
            self.model.forward = self._make(self.model.forward) if self._ours is None else self._ours
            if self.attention is not None:
                config._attn_implementation = self.attention
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                if self.attention is not None:
                    config._attn_implementation = usual
                self._ours = attributes.pop("forward")
                if found is not None:
                    self.model.forward = found

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
            from fastdpo.training.attention import attention_mask

            kind = model.config._attn_implementation
            kwargs["attention_mask"] = attention_mask(kind, model.dtype, documents, branches, spans)
        if self.route == "model":
            output = original(*args, **kwargs)
            logits = output.logits.flatten(0, 1)[logprob_rows.to(output.logits.device)]
            found = _of_logits(logits, logprob_targets, logprob_stats)
            return found if getattr(output, "aux_loss", None) is None else {**found, "aux_loss": output.aux_loss}
        auxiliary: dict[str, Tensor] = {}
        if kwargs.get("output_router_logits"):
            hidden, auxiliary["aux_loss"] = _with_aux_loss(model, original, *args, **kwargs)
        else:
            # looked up at each call: FSDP and PEFT replace modules after the patch
            hidden = model.base_model(*args, **kwargs).last_hidden_state
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
        logits = head(hidden.flatten(0, 1)[rows])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return {**_of_logits(logits, targets, logprob_stats), **auxiliary}

    @torch.no_grad()
    def check(self) -> None:
        """Compare with the model's own logits on a few tokens, before training; take its logits if they differ."""
        parameter = next(self.model.parameters())
        if parameter.is_meta or parameter.numel() == 0:  # sharded at load: nothing to run yet
            return
        vocabulary = self.model.config.vocab_size
        ids = torch.arange(8, device=parameter.device)[None] % vocabulary
        # many targets predicted from one position: the shape of the distribution, which a wrong scale changes
        targets = torch.arange(0, vocabulary, max(1, vocabulary // 64), device=parameter.device)
        rows = torch.full_like(targets, ids.shape[1] - 1)
        training = self.model.training
        self.model.eval()
        with self.installed():
            ours = self.model(input_ids=ids, logprob_rows=rows, logprob_targets=targets)["logprob"]
            logits = self.model(input_ids=ids, use_cache=False).logits
        self.model.train(training)
        ours = ours.to(logits.device).double()
        theirs = logits[0, -1].double().log_softmax(-1)[targets.to(logits.device)]
        error = (ours - theirs).abs().max()
        # rounding of 16-bit logits is proportional to their size, spread tells a wrong scale from rounding
        eps = torch.finfo(logits.dtype).eps
        allowed = 0.02 * theirs.std() + 16 * eps * (1 + logits.abs().max())
        if not error <= allowed:
            self.route = "model"
            logger.warning(
                f"{type(self.model).__name__} computes its logits in a way that fastdpo does not know (log-probs "
                f"from the head's weight are off by {error:.3g} nats), so its own logits of every position are built; "
                "please report the architecture."
            )


def _of_logits(logits: Tensor, targets: Tensor, statistics: tuple[str, ...]) -> dict[str, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.device)
    output = {"logprob": reference.logprob(logits, targets)}
    if statistics:
        with torch.no_grad():
            found = reference.token_stats(logits, targets)
        output |= {name: found[name] for name in statistics}
    return output


def _with_aux_loss(model: "PreTrainedModel", original: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Last hidden states, and the auxiliary loss as the architecture's own forward computes it.

    That forward multiplies one position of each sequence by the head, to no other end.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output.last_hidden_state)

    handle = model.base_model.register_forward_hook(keep)
    try:
        loss = original(*args, **{**kwargs, "logits_to_keep": 1}).aux_loss
    finally:
        handle.remove()
    return seen[0], loss
