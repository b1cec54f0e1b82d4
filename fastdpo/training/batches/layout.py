"""Which layout a run's batches have: the config's word first, then a comparison on the run's own longest rows."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, NamedTuple, cast

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.layouts import BATCH_LAYOUTS
from fastdpo.models.attention import FLEX, flex_refusal
from fastdpo.models.backbone import decoder_config
from fastdpo.models.document_attention import DOCUMENTS
from fastdpo.models.forward import LogprobForward, unwrap_peft
from fastdpo.models.load import on_device
from fastdpo.training.batches.probe import LayoutProbe, ProbeRows, difference, longest_sequence

logger = logging.getLogger(__name__)

# taken at their word where a comparison cannot be run, since FSDP or ZeRO-3 has split the weights
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite")
# a row has room for a whole batch: FlexAttention skips what no token may see
WHOLE_BATCH = 1 << 31


class Limit(NamedTuple):
    """The layouts that a model allows: up to `widest` in the order of `BATCH_LAYOUTS`; `reason` where not all."""

    widest: str
    reason: str = ""

    def allows(self, layout: str) -> bool:
        return BATCH_LAYOUTS.index(layout) <= BATCH_LAYOUTS.index(self.widest)


def window(config: Any) -> int | None:
    """How many tokens the shortest attention of a model reaches back, where some layer's is limited."""
    kinds = set(getattr(config, "layer_types", None) or [])
    sizes = []
    if getattr(config, "use_sliding_window", True) or "sliding_attention" in kinds:
        sizes.append(getattr(config, "sliding_window", None))
    sizes.append(getattr(config, "attention_chunk_size", None))
    return min((size for size in sizes if size is not None), default=None)


def config_limit(model: nn.Module, longest: int | None) -> Limit:
    """What a model's configuration says of rows that hold several sequences.

    longest: the longest sequence of the run in tokens, None where it is not known. A mask of our own replaces the
    model's sliding window, which makes no difference where no sequence is longer than the window.
    """
    if isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values()):
        return Limit("padded", "the adapter puts tokens in front of every row")
    causal_lm = cast(PreTrainedModel, unwrap_peft(model))
    config = causal_lm.config.get_text_config()
    name = config.model_type
    kinds = set(getattr(config, "layer_types", None) or [])
    odd = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
    if odd or getattr(causal_lm, "_is_stateful", False):
        what = f"{', '.join(odd)} layers" if odd else "recurrent layers"
        return Limit("padded", f"{name} has {what}, which carry a state along the row")
    if "position_ids" not in inspect.signature(type(causal_lm).forward).parameters:
        return Limit("padded", f"{type(causal_lm).__name__} takes no position_ids")
    size = window(config)
    if size is not None and (longest is None or longest > size):
        rows = "rows may be longer" if longest is None else f"the longest sequence has {longest}"
        return Limit("padded", f"its attention reaches back {size} tokens and {rows}")
    kind = decoder_config(causal_lm)._attn_implementation
    if "flash" in (kind or ""):
        return Limit("packed", f"{kind} takes no mask of another form")
    return Limit("shared")


def settle_layout(
    choice: str,
    collator: DataCollatorForPreference,
    models: Sequence[LayoutProbe],
    data: ProbeRows,
    needs_padding: str = "",
    no_probe: str = "",
    compiled: bool = False,
) -> tuple[DataCollatorForPreference, str]:
    """The collator of a run's layout, and one line that says the layout and why; models get their attention.

    Args:
        choice: one of `BATCH_LAYOUTS`, or "auto": the widest that configurations and comparison allow.
        models: the policy, and a reference model of its own.
        needs_padding: why the run trains on padded rows, whatever the models allow; "" where it need not.
        no_probe: why nothing can be compared; "" where it can.
        compiled: the model goes through torch.compile, which would compile anew for each batch's documents.

    Raises:
        ValueError: a layout that was asked for by name would give other log-probs.
    """
    limit = _limit(models, data, needs_padding)
    if choice == "padded":
        return collator, "padded, as asked for"
    if choice != "auto" and not limit.allows(choice):
        raise ValueError(f"batch_layout {choice!r} is not exact here: {limit.reason}; use 'auto' or 'padded'.")
    candidates = [choice] if choice != "auto" else [name for name in reversed(BATCH_LAYOUTS) if limit.allows(name)]
    reasons = [limit.reason] if limit.reason else []
    note = f" (not compared with padded rows: {no_probe})" if no_probe else ""
    for layout in candidates:
        if layout == "padded":
            break
        refused = ""
        for laid, attention in _ways(replace(collator, layout=layout), models, compiled):
            for one in models:
                one.forward.attention = attention
            refusal = _refusal(laid, models, data, no_probe)
            if refusal is None or (choice != "auto" and no_probe):
                return laid, f"{layout}{f', since {reasons[0]}' if reasons else ''}{note}"
            logger.info(f"{layout} rows with {attention or 'a mask'}: {refusal}.")
            refused = refusal
        if choice != "auto":
            raise ValueError(f"batch_layout {choice!r} is not exact here: {refused}; use 'auto' or 'padded'.")
        reasons.append(refused)
    for one in models:
        one.forward.attention = None
    return collator, f"padded, since {'; '.join(reasons)}"


def check_given_layout(
    collator: DataCollatorForPreference,
    models: Sequence[LayoutProbe],
    data: ProbeRows,
    needs_padding: str,
    no_probe: str,
) -> None:
    """Raise `ValueError` where the layout of a collator that somebody gave would give other log-probs."""
    limit = _limit(models, data, needs_padding)
    if not limit.allows(collator.layout):
        refused: str | None = limit.reason
    else:
        refused = None if no_probe else _refusal(collator, models, data, "")
    if refused:
        raise ValueError(
            f"the data_collator's layout {collator.layout!r} is not exact here: {refused}; use layout='padded', or "
            "leave data_collator out."
        )


def _limit(models: Sequence[LayoutProbe], data: ProbeRows, needs_padding: str) -> Limit:
    if needs_padding:
        return Limit("padded", needs_padding)
    limits = [config_limit(one.model, data.longest) for one in models]
    if data.unpaired:
        limits.append(Limit("packed", "single answers share no prompt"))
    return min(limits, key=lambda limit: BATCH_LAYOUTS.index(limit.widest))


def _refusal(
    laid: DataCollatorForPreference, models: Sequence[LayoutProbe], data: ProbeRows, no_probe: str
) -> str | None:
    if no_probe:
        plain = all(one.forward.model.config.model_type in PLAIN for one in models)
        return None if plain else f"{laid.layout} rows were not compared with padded ones: {no_probe}"
    try:
        return next((off for one in models if (off := difference(one, laid, data.rows))), None)
    except Exception as error:  # models that take no such mask fail in their own ways
        return f"{laid.layout} rows do not run ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _ways(
    collator: DataCollatorForPreference, models: Sequence[LayoutProbe], compiled: bool
) -> Iterator[tuple[DataCollatorForPreference, str | None]]:
    """How rows of a layout can be attended to, the best first: the collator, and the attention to switch to.

    FlexAttention, PyTorch's kernels document by document, and FlashAttention take a whole batch as one row. With a mask
    over all of T x T a row is as long as the longest pair.
    """
    kinds = [decoder_config(one.forward.model)._attn_implementation for one in models]
    if any("flash" in (kind or "") for kind in kinds):
        yield replace(collator, max_row_tokens=WHOLE_BATCH, pad_to_multiple_of=None), None
        return
    refusals = [flex_refusal(one.forward.model, one.device) for one in models]
    refusal = next((reason for reason in refusals if reason is not None), None)
    if refusal is None:
        # the kernel's blocks: fewer shapes to compile for
        yield replace(collator, max_row_tokens=WHOLE_BATCH, pad_to_multiple_of=collator.pad_to_multiple_of or 128), FLEX
    else:
        level = logging.INFO if models[0].device.type == "cuda" else logging.DEBUG
        logger.log(level, f"no FlexAttention: {refusal}.")
    if all(kind == "sdpa" for kind in kinds) and not compiled:
        yield replace(collator, max_row_tokens=WHOLE_BATCH), DOCUMENTS
    yield collator, None


class BatchLayout(NamedTuple):
    """How a run's batches are laid out: the collator that makes them, and one line that says the layout and why.

    window: how far the models' attention reaches back, where rows of several sequences rely on it. max_length: where
    the collator cuts.
    """

    collator: Any
    description: str
    window: int | None = None
    max_length: int | None = None

    def check(self, dataset: Any, name: str) -> None:
        """Refuse a dataset that came after the layout was chosen, and for which it would not be exact."""
        if self.window is None:
            return
        if isinstance(dataset, Dataset):
            longest = longest_sequence(dataset, self.max_length) if len(dataset) else 0
            what = f"has a sequence of {longest} tokens"
        else:
            longest = math.inf if self.max_length is None else self.max_length
            what = f"is a stream, whose sequences may have {longest} tokens"
        if longest > self.window:
            raise ValueError(
                f"{name} {what}, the model's attention reaches back {self.window} and batches are "
                f"{self.description}, which is not exact then; use batch_layout='padded', or a max_length "
                "within the window."
            )


def choose_layout(
    args: DPOConfig,
    collator: Any,
    own_collator: bool,
    datasets: Sequence[Any],
    models: Sequence[tuple[nn.Module, LogprobForward]],
    inputs_of: Callable[[dict[str, Any]], dict[str, Any]],
    autocast: Callable[[], AbstractContextManager[Any]],
    router_loss: bool,
    sharded: bool,
) -> BatchLayout:
    """The layout of a run's batches, the same in every process; models get their attention.

    Args:
        own_collator: the collator is the user's own and decides.
        datasets: of training and evaluation, tokenized.
        models: the policy, and a reference model of its own, each with its log-prob forward.
        inputs_of: a batch -> the inputs of such a forward.
        router_loss: the router's auxiliary loss is part of the loss. sharded: FSDP will split the weights.

    Raises:
        ValueError: the layout that was asked for would give other log-probs.
    """
    forwards = [forward for _, forward in models]
    if args.world_size > 1:
        # one process may have tried a forward for which the others do not hold the weights yet
        for forward, route in zip(forwards, broadcast_object_list([f.route for f in forwards]), strict=True):
            forward.route = route
    description = "as the given data_collator makes them"
    if own_collator:
        if args.batch_layout not in ("auto", "padded"):
            raise ValueError(
                f"batch_layout {args.batch_layout!r} and a data_collator both say how batches are laid out; leave "
                "one out, or pass DataCollatorForPreference(..., layout=...)."
            )
        if not isinstance(collator, DataCollatorForPreference) or collator.layout == "padded":
            return BatchLayout(collator, description)
    max_length = collator.max_length
    rows = ProbeRows.of(datasets, max_length)._replace(unpaired=args.unpaired)
    no_probe = "" if rows.rows else "there is no whole dataset to look at"
    if sharded or any(p.is_meta or p.numel() == 0 for p in models[0][0].parameters()):
        no_probe = "the weights are split over processes"
    needs_padding = ""
    if router_loss:
        needs_padding = "the router's auxiliary loss counts the tokens of padded rows"
    elif args.neftune_noise_alpha:
        needs_padding = "NEFTune scales its noise by the length of a row"
    with ExitStack() as stack:
        if not no_probe:
            for model, _ in models:
                stack.enter_context(on_device(model, args.device))
        probes = [LayoutProbe(*model, inputs_of, autocast, args.device) for model in models]
        if own_collator:
            check_given_layout(collator, probes, rows, needs_padding, no_probe)
        else:
            collator, description = settle_layout(
                args.batch_layout, collator, probes, rows, needs_padding, no_probe, bool(args.torch_compile)
            )
    if args.world_size > 1 and not own_collator:
        # rounding may tell processes different things
        collator, description, attention = broadcast_object_list([collator, description, forwards[0].attention])
        for forward in forwards:
            forward.attention = attention
    reach = None
    if collator.layout != "padded":
        sizes = [window(cast(PreTrainedModel, unwrap_peft(model)).config.get_text_config()) for model, _ in models]
        reach = min((size for size in sizes if size is not None), default=None)
    if args.should_log:
        logger.warning(f"batches: {description}.")
    return BatchLayout(collator, description, reach, max_length)
