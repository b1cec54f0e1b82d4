"""LLaMA-Factory's DPO trainer on fastdpo's log-probs and losses.

    from fastdpo.integrations.llama_factory import patch_llama_factory
    patch_llama_factory()  # before the trainer is built; or `with patch_llama_factory(): ...`

or, where training starts from a configuration file, in place of `llamafactory-cli train`,

    python -m fastdpo.integrations.llama_factory train.yaml
    torchrun --nproc_per_node 8 -m fastdpo.integrations.llama_factory train.yaml

What changes in `CustomDPOTrainer`:

- Log-probs of policy and reference come from the hidden states and the head through `linear_logprob`, not from logits.
  Where a model is not of that form (multimodal, a quantized or sharded head, a forward that something else replaced)
  its logits go through `fastdpo.logprob`, and a line says why.
- `pref_loss` is the loss that is trained. With TRL 0.20 and later LLaMA-Factory calls `dpo_loss` without a loss type,
  which then means sigmoid: hinge and kto_pair trained sigmoid, and ipo sigmoid on averages. With TRL 0.9 kto_pair was
  an error, and so was hinge together with `pref_ftx`.
- `ld_alpha`, `dpo_label_smoothing`, `simpo_gamma`, `pref_ftx` and `pref_bco_weight` keep LLaMA-Factory's meaning, and
  ipo, orpo and simpo its averages over completions.
- Metrics stay what they were. `logits/chosen` and `logits/rejected` are means over all positions; they come from the
  mean hidden state, or under a softcap (Gemma) from the logits of a few positions at a time.

Other stages are left alone, and so are the log-probs of KTransformers' trainer. Not tried: FSDP, DeepSpeed, Unsloth.
"""

import functools
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_origin

import torch.nn.functional as F
from torch import Tensor

from fastdpo.integrations.llama_factory_forward import RowMeansForward, forward_of
from fastdpo.integrations.patch import Patch
from fastdpo.losses import PairLogps, ld_mask_weights, preference_loss
from fastdpo.models.forward import unwrap_peft
from fastdpo.ops.logprob import logprob
from fastdpo.ops.sequence import segment_sum

logger = logging.getLogger("fastdpo.integrations.llama_factory")  # under `python -m` too

WORKS_WITH = "LLaMA-Factory 0.9.3 to 0.9.5"
IGNORED = -100
METHODS = ("concatenated_forward", "dpo_loss", "simpo_loss", "odds_ratio_loss")
AVERAGED = ("ipo", "orpo", "simpo")  # whose log-probs LLaMA-Factory divides by lengths


@dataclass
class Attribute:
    """An attribute of a module or of a class; `theirs` is None where the class has only inherited it."""

    owner: Any
    name: str
    ours: Any
    theirs: Any = None

    def put_on(self) -> None:
        self.theirs = vars(self.owner).get(self.name)
        setattr(self.owner, self.name, self.ours)

    def take_off(self) -> None:
        if self.theirs is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.theirs)


class LlamaFactoryPatch(Patch):
    """What `patch_llama_factory` returns: takes the patch off, by `undo()` or at the end of a `with` block."""


def patch_llama_factory() -> LlamaFactoryPatch:
    """LLaMA-Factory's DPO trainers that are built from here on compute through fastdpo.

    Returns:
        A handle: `.undo()` ends it, and so does leaving `with patch_llama_factory():`, also by an exception. Calls may
        be repeated and nested; the patch lasts until each of them has been undone.

    Raises:
        ImportError: LLaMA-Factory is not installed, or not a version that this fastdpo knows; the sentence names those.
    """
    return LlamaFactoryPatch.put_on(_attributes)


def _attributes() -> list[Attribute]:
    try:
        package = importlib.import_module("llamafactory")
    except ImportError as error:
        raise ImportError(
            f"patch_llama_factory needs {WORKS_WITH}, and no LLaMA-Factory can be imported ({error})."
        ) from error
    version = str(getattr(package, "__version__", "an unknown version"))
    sentence = f"patch_llama_factory works with {WORKS_WITH}, {version} is installed"
    if not re.match(r"0\.9\.[345](?!\d)", version):
        raise ImportError(f"{sentence}.")
    module = importlib.import_module("llamafactory.train.dpo.trainer")
    trainer = module.CustomDPOTrainer
    missing = [name for name in METHODS if not hasattr(trainer, name)]
    if missing:
        raise ImportError(f"{sentence}, whose DPO trainer has no {missing[0]}.")
    logger.info(f"LLaMA-Factory {version}: log-probs and pref_loss of its DPO trainer compute through fastdpo.")
    return [
        Attribute(module, "get_batch_logps", get_batch_logps),
        Attribute(trainer, "__init__", _init(trainer)),
        *(
            Attribute(trainer, name, _with_forwards(getattr(trainer, name)))
            for name in ("train", "evaluate", "predict")
        ),
        Attribute(trainer, "concatenated_forward", _concatenated_forward(trainer.concatenated_forward)),
        Attribute(trainer, "dpo_loss", dpo_loss),
        Attribute(trainer, "simpo_loss", simpo_loss),
        Attribute(trainer, "odds_ratio_loss", odds_ratio_loss),
    ]


# the losses, as methods of CustomDPOTrainer; its `compute_preference_loss`, which calls them, stays as it is


def dpo_loss(
    self: Any, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, loss_type: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses by `pref_loss`, chosen rewards and rejected rewards, (B,) each, from log-probs (B,), sums or averages."""
    device = self.accelerator.device
    pairs = PairLogps(chosen.to(device), rejected.to(device), ref_chosen.to(device), ref_rejected.to(device))
    output = preference_loss(pairs, loss_type or self.loss_type, self.beta, label_smoothing=self.label_smoothing)
    # LLaMA-Factory adds pref_ftx in place, to what hinge's backward would read
    return output.losses.clone(), output.chosen_rewards, output.rejected_rewards


def simpo_loss(self: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
    """SimPO's losses (B,) from average log-probs (B,)."""
    pairs = PairLogps(chosen, rejected, chosen, rejected)
    return preference_loss(pairs, "simpo", self.beta, simpo_gamma=self.simpo_gamma).losses


def odds_ratio_loss(self: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO's losses (B,), with the likelihood term, from average log-probs (B,)."""
    return preference_loss(PairLogps(chosen, rejected, chosen, rejected), "orpo", self.beta).losses


# log-probs


def get_batch_logps(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = IGNORED, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """LLaMA-Factory's function of that name: from logits (2B, T, V) and unshifted labels (2B, T), sums and lengths.

    Returns:
        log-probs (2B,) of the labels, summed over those that are not `label_pad_token_id`, and how many they are (2B,).
        `ld_alpha` weighs tokens beyond the length that both completions of a pair have.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be {tuple(logits.shape[:-1])} like logits, got {tuple(labels.shape)}.")
    targets, scored = _predicted(labels, label_pad_token_id)
    # labels are shifted, not logits: a slice of those would be copied
    return _sums(logprob(logits, targets, ignore_index=label_pad_token_id)[scored], scored, ld_alpha)


def _predicted(labels: Tensor, ignored: int = IGNORED) -> tuple[Tensor, Tensor]:
    """The label that each position predicts, and whether it is scored, (2B, T) each."""
    targets = F.pad(labels[:, 1:], (0, 1), value=ignored)
    return targets, targets != ignored


def _sums(tokens: Tensor, scored: Tensor, ld_alpha: float | None) -> tuple[Tensor, Tensor]:
    """Sums over rows, and their lengths, (2B,) each; tokens (M,) are those of `scored` (2B, T), row by row."""
    lengths = scored.sum(1)
    if ld_alpha is not None:
        tokens = tokens * ld_mask_weights(scored, ld_alpha)[scored]
    return segment_sum(tokens, F.pad(lengths.cumsum(0), (1, 0))), lengths


def _concatenated_forward(theirs: Callable[..., Any]) -> Callable[..., Any]:
    # a dict from 0.9.4 on, a tuple of its values before
    as_dict = get_origin(inspect.signature(theirs).return_annotation) is dict

    @functools.wraps(theirs)
    def concatenated_forward(self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False) -> Any:
        ours = _forwards(self).get(id(unwrap_peft(self.accelerator.unwrap_model(model))))
        if ours is None:
            return theirs(self, model, batch, is_ref_model=is_ref_model)  # through get_batch_logps
        targets, scored = _predicted(batch["labels"])
        rows = scored.flatten().nonzero().squeeze(1)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with ours.installed():
            scores = model(**inputs, logprob_rows=rows, logprob_targets=targets[scored])
        tokens = scores["logprob"]
        logps, lengths = _sums(tokens, scored.to(tokens.device), None if is_ref_model else self.ld_alpha)
        averages = logps / lengths.clamp(min=1)  # 0, not NaN, where no token is scored
        chosen, rejected = (averages if self.loss_type in AVERAGED else logps).chunk(2)
        chosen_logits, rejected_logits = scores["all_logits"].chunk(2)
        output = {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            # (B,) instead of (B, T, V); all that is read is their mean, which is the same
            "chosen_logits": chosen_logits,
            "rejected_logits": rejected_logits,
            "chosen_logps_avg": averages[: len(chosen)],
        }
        return output if as_dict else tuple(output.values())

    return concatenated_forward


# the models' forwards: in place while the trainer runs, so that accelerate wraps them


def _forwards(trainer: Any) -> dict[int, RowMeansForward]:
    """By the id of a causal LM; a model that is not in it is asked for its logits."""
    if "_fastdpo_forwards" not in vars(trainer):
        _say_why("this trainer", "it was built before patch_llama_factory()")
        trainer._fastdpo_forwards = {}
    return trainer._fastdpo_forwards


def _init(trainer: Any) -> Callable[..., None]:
    theirs = trainer.__init__

    @functools.wraps(theirs)
    def __init__(self: Any, model: Any, ref_model: Any, *args: Any, **kwargs: Any) -> None:
        if type(self).concatenated_forward is not trainer.concatenated_forward:
            logger.warning(
                f"{type(self).__name__} has a concatenated_forward of its own: its log-probs are computed through "
                "fastdpo only where that calls LLaMA-Factory's."
            )
        self._fastdpo_forwards = {}
        for role, one in (("policy", model), ("reference", ref_model)):
            causal_lm = None if one is None else unwrap_peft(one)
            if causal_lm is not None and id(causal_lm) not in self._fastdpo_forwards:
                forward_or_reason = forward_of(causal_lm)
                if isinstance(forward_or_reason, str):
                    _say_why(f"the {role} ({type(causal_lm).__name__})", forward_or_reason)
                else:
                    self._fastdpo_forwards[id(causal_lm)] = forward_or_reason
        with _installed(self):
            theirs(self, model, ref_model, *args, **kwargs)

    return __init__


def _with_forwards(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _installed(self):
            return theirs(self, *args, **kwargs)

    return run


@contextmanager
def _installed(trainer: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for forward in _forwards(trainer).values():
            stack.enter_context(forward.installed())
        yield


def _say_why(whose: str, why: str) -> None:
    logger.warning(f"the log-probs of {whose} are computed from full logits: {why}.")


def main() -> None:
    """`llamafactory-cli train` in this process, patched."""
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
    if len(sys.argv) < 2:
        sys.exit("usage: python -m fastdpo.integrations.llama_factory CONFIG.yaml [name=value ...]")
    logging.getLogger("fastdpo").setLevel(logging.INFO)
    logging.getLogger("fastdpo").addHandler(logging.StreamHandler())
    try:
        patch_llama_factory()
    except ImportError as error:
        sys.exit(str(error))
    importlib.import_module("llamafactory.train.tuner").run_exp()


if __name__ == "__main__":
    main()
