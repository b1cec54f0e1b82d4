"""TRL's own trainers on fastdpo's log-probs.

    import fastdpo
    fastdpo.patch_trl()  # or: with fastdpo.patch_trl(): ...

From TRL 1.15 on, the DPO, KTO, SFT, GRPO, RLOO and AsyncGRPO trainers score tokens in one place: the fused head that
`add_fused_lm_head` gives a model, whose forward ends in `ChunkedLogProbFunction`. The patch puts
`linear_logprob_stats` in that function's place (`fastdpo.integrations.trl_head`) and leaves the rest of the fused head
to TRL: which tokens are scored, an architecture's scale and softcap, gathering the weight under FSDP2 and ZeRO-3.
What changes:

- log-probs and statistics come from logits that are never rounded to bf16, in a bounded workspace;
- on a CPU, positions that nobody scores are not computed (TRL computes them and writes zeros over the results);
- `is_top1` holds for any of several equal largest logits, where TRL takes the first;
- the DPO, KTO and SFT trainers take a plain LoRA on `lm_head`; what is not of that form (DoRA, a quantized head) is
  refused by TRL as before.

A trained head's weight that ZeRO-3 gathered lives from forward to backward; TRL gathers it twice instead.
Not covered: a LoRA on `lm_head` under FSDP2 or ZeRO-3, and in GRPO and RLOO; TRL's distillation trainers.

TRL 0.15 to 1.13 score with `selective_log_softmax(logits, index)`: there the patch puts `fastdpo.logprob` in its
place, exact from the same logits, and fp32 also where they are 16-bit. What bypasses that function (Liger's losses)
stays as it is. Not covered: `padding_free` with 16-bit logits (a 16-bit model trained without bf16 or fp16 set); TRL
0.15 to 0.26 store the log-probs in a tensor of the logits' dtype there, and torch refuses.
"""

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from fastdpo.integrations.patch import Patch
from fastdpo.integrations.trl_head import OUTPUTS, ChunkedLogProb, EntropyOnDemand, UnsupportedHead, with_lora
from fastdpo.ops.logprob import logprob

logger = logging.getLogger(__name__)

WORKS_WITH = "TRL 0.15 to 1.13, 1.15 and 1.16"
# whose check of the head lets a plain LoRA pass
LORA_TRAINERS = tuple(f"trl.trainer.{name}_trainer" for name in ("dpo", "kto", "sft"))


@dataclass(frozen=True)
class Binding:
    """An object of TRL's, what stands in its place, and where: by default in every module of TRL that names it."""

    theirs: Any
    ours: Any
    modules: tuple[str, ...] = ()

    def put_on(self) -> None:
        self._exchange(self.theirs, self.ours)

    def take_off(self) -> None:
        self._exchange(self.ours, self.theirs)

    def _exchange(self, old: Any, new: Any) -> None:
        for name in self.modules or [name for name in sys.modules if name.split(".")[0] == "trl"]:
            module = sys.modules.get(name)
            for key, value in list(vars(module).items()) if module else []:
                if value is old:
                    setattr(module, key, new)


class TrlPatch(Patch):
    """What `patch_trl` returns: takes the patch off, by `undo()` or at the end of a `with` block."""


def patch_trl() -> TrlPatch:
    """TRL's trainers compute through fastdpo from here on, those that were built before as well.

    Names that code of yours took from TRL's modules before are its own: import `add_fused_lm_head` after the patch.

    Returns:
        A handle: `.undo()` ends it, and so does leaving `with patch_trl():`, also by an exception. Calls may be
        repeated and nested; the patch lasts until each of them is undone.

    Raises:
        ImportError: TRL is not installed, or not a version that this fastdpo knows; the sentence names those.
    """
    return TrlPatch.put_on(_bindings)


def _bindings() -> list[Binding]:
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        raise ImportError(f"patch_trl works with {WORKS_WITH}, and TRL cannot be imported: {error}") from error
    what, bindings = _recognise(trl.__version__, importlib.import_module("trl.trainer.utils"))
    logger.info(f"TRL {trl.__version__}: {what} computes through fastdpo.")
    return bindings


def _recognise(version: str, utils: ModuleType) -> tuple[str, list[Binding]]:
    """(what is patched, in words; the bindings), by what TRL has rather than by its version."""
    sentence = f"patch_trl works with {WORKS_WITH}, got TRL {version}, which"
    fix = "install another with pip install 'trl==1.16.*'."
    selective = getattr(utils, "selective_log_softmax", None)
    if hasattr(utils, "add_fused_lm_head"):
        function = getattr(utils, "_ChunkedLogProbFunction", None)
        if function is None:
            raise ImportError(f"{sentence} found no Triton and has no fused head without it; {fix}")
        parameters = inspect.signature(function.forward).parameters
        if list(parameters)[1:] != _names(ChunkedLogProb.apply) or parameters["outputs"].default != tuple(OUTPUTS):
            raise ImportError(f"{sentence} gives its fused head other arguments or outputs; {fix}")
        return "the fused head of its trainers", _fused_head(utils, function)
    if selective is None:
        raise ImportError(f"{sentence} has neither a fused head nor selective_log_softmax; {fix}")
    if _names(selective) != ["logits", "index"]:
        raise ImportError(f"{sentence} scores logits in Triton kernels of its own; {fix}")
    return "selective_log_softmax, with which its trainers score,", [Binding(selective, _selective(selective))]


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _fused_head(utils: ModuleType, function: Any) -> list[Binding]:
    """Bindings for TRL 1.15 and later."""
    EntropyOnDemand.asked_for = False
    here = (utils.__name__,)
    add = utils.add_fused_lm_head
    bindings = [Binding(function, ChunkedLogProb, here), Binding(add, with_lora(add))]
    use_triton = getattr(utils, "_use_triton", None)  # since 1.16 it decides where only scored positions are passed on
    if use_triton is not None:
        ours = functools.wraps(use_triton)(lambda device: device.type == "cpu" or use_triton(device))
        bindings.append(Binding(use_triton, ours, here))
    for name in LORA_TRAINERS:
        refused = getattr(importlib.import_module(name), "BaseTunerLayer", None)
        if refused is not None:
            bindings.append(Binding(refused, UnsupportedHead, (name,)))
    return bindings


def _selective(theirs: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`selective_log_softmax` of TRL 0.15 to 1.13."""

    @functools.wraps(theirs)
    def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
        if index.dim() == logits.dim():  # several tokens at each position
            return theirs(logits, index)
        return logprob(logits, index)

    return selective_log_softmax
