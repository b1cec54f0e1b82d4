"""Which layout a run's batches have: the config's word first, then a comparison on the run's own longest rows."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.layouts import BATCH_LAYOUTS
from fastdpo.data.tokenize_row import ID_COLUMNS
from fastdpo.models.attention import FLEX, flex_refusal
from fastdpo.models.backbone import decoder_config
from fastdpo.models.document_attention import DOCUMENTS
from fastdpo.models.forward import LogprobForward, unwrap_peft
from fastdpo.ops.switches import widest_float
from fastdpo.training.reference.inside_policy import evaluating

logger = logging.getLogger(__name__)

# taken at their word where a comparison cannot be run, since FSDP or ZeRO-3 has split the weights
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite")
# a row has room for a whole batch: FlexAttention skips what no token may see
WHOLE_BATCH = 1 << 31
# what two kernels of a right layout may differ by, root mean square over tokens, in nats
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}


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


class Logprobs:
    """Log-probs (M,) of a collated batch under a model: no dropout, no gradient, no random number drawn.

    In float64 where the device has it.

    device: where the model is trained; left out, where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: LogprobForward,
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        autocast: Callable[[], AbstractContextManager[Any]],
        device: torch.device | None = None,
    ) -> None:
        self.model, self.forward, self.prepare, self.autocast = model, forward, prepare, autocast
        causal_lm = cast(PreTrainedModel, unwrap_peft(model))
        self.device = next(causal_lm.parameters()).device if device is None else device
        # what learned positions end at
        self.positions: int | None = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
        with autocast():
            mixed = torch.is_autocast_enabled(self.device.type)
            self.dtype = torch.get_autocast_dtype(self.device.type) if mixed else causal_lm.dtype

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            evaluating(self.model),
            self.autocast(),
            self.forward.installed(),
        ):
            return self.model(**self.prepare(batch))["logprob"].to(widest_float(self.device.type))


def difference(logprobs: Logprobs, collator: DataCollatorForPreference, rows: Sequence[dict[str, Any]]) -> str | None:
    """How a layout's log-probs of rows differ from those of padded rows, in words; None where they do not.

    They may by three times what padding alone changes, and by rounding: root mean square over tokens.
    """
    padded = replace(collator, layout="padded", pad_to_multiple_of=None)
    batch = padded(rows)
    width = batch["input_ids"].shape[1]
    wider = replace(padded, pad_to_multiple_of=max(width, min(width + 19, logprobs.positions or width + 19)))
    wanted = logprobs(batch)
    noise, off = _distance(logprobs(wider(rows)), wanted), _distance(logprobs(collator(rows)), wanted)
    allowed = max(3 * noise, ROUNDING[logprobs.dtype])
    logger.debug(f"{collator.layout}: {off:.3g} nats from padded, padding alone {noise:.3g}, allowed {allowed:.3g}.")
    if off <= allowed:
        return None
    return f"log-probs of {collator.layout} rows are off by {off:.3g} nats a token, where rounding is {allowed:.3g}"


def _distance(one: Tensor, other: Tensor) -> float:
    """Root mean square; infinite where a value is NaN."""
    return float((one - other).square().mean().sqrt().nan_to_num(nan=math.inf))


class Data(NamedTuple):
    """What a layout is judged on: `rows` to compare on, and the longest sequence of the run, None where unknown."""

    rows: list[dict[str, Any]]
    longest: int | None

    @classmethod
    def of(cls, datasets: Sequence[Any], max_length: int | None) -> "Data":
        """See `_telling_rows`, of the first dataset; streams show no rows."""
        known = [dataset for dataset in datasets if isinstance(dataset, Dataset) and len(dataset)]
        if len(known) < len(datasets) or not known:
            return cls([], max_length)
        return cls(_telling_rows(known[0], max_length), max(longest_sequence(one, max_length) for one in known))


def longest_sequence(dataset: Dataset, max_length: int | None) -> int:
    """Tokens of the longest sequence after the cut."""
    longest = max(p + max(c, r) for p, c, r in zip(*_lengths(dataset), strict=True))
    return longest if max_length is None else min(longest, max_length)


def _telling_rows(dataset: Dataset, max_length: int | None) -> list[dict[str, Any]]:
    """The rows with the longest prompt, the longest sequence, and most tokens of prompt and both answers."""
    limit = max_length or math.inf
    lengths = [
        (min(p, limit), min(p + c, limit), min(p + r, limit)) for p, c, r in zip(*_lengths(dataset), strict=True)
    ]
    together = [chosen + rejected - prompt for prompt, chosen, rejected in lengths]
    keys = (lambda row: lengths[row][0], lambda row: max(lengths[row][1:]), lambda row: together[row])
    # among equals, as many are where rows are cut, the one with most answer tokens to compare
    found = {max(range(len(lengths)), key=lambda row: (key(row), together[row] - lengths[row][0])) for key in keys}
    return [cast("dict[str, Any]", dataset[row]) for row in sorted(found)]


def _lengths(dataset: Dataset) -> list[list[int]]:
    table = dataset.with_format("arrow")
    return [pc.call_function("list_value_length", [table[name][:]]).to_pylist() for name in ID_COLUMNS]


def settle_layout(
    wanted: str,
    collator: DataCollatorForPreference,
    models: Sequence[Logprobs],
    data: Data,
    needs_padding: str = "",
    no_probe: str = "",
    compiled: bool = False,
) -> tuple[DataCollatorForPreference, str]:
    """The collator of a run's layout, and one line that says the layout and why; models get their attention.

    Args:
        wanted: one of `BATCH_LAYOUTS`, or "auto": the widest that configurations and comparison allow.
        models: the policy, and a reference model of its own.
        needs_padding: why the run trains on padded rows, whatever the models allow; "" where it need not.
        no_probe: why nothing can be compared; "" where it can.
        compiled: the model goes through torch.compile, which would compile anew for each batch's documents.

    Raises:
        ValueError: a layout that was asked for by name would give other log-probs.
    """
    limit = _limit(models, data, needs_padding)
    if wanted == "padded":
        return collator, "padded, as asked for"
    if wanted != "auto" and not limit.allows(wanted):
        raise ValueError(f"batch_layout {wanted!r} is not exact here: {limit.reason}; use 'auto' or 'padded'.")
    candidates = [wanted] if wanted != "auto" else [name for name in reversed(BATCH_LAYOUTS) if limit.allows(name)]
    reasons = [limit.reason] if limit.reason else []
    note = f" (not compared with padded rows: {no_probe})" if no_probe else ""
    for layout in candidates:
        if layout == "padded":
            break
        refused = ""
        for laid, attention in _ways(replace(collator, layout=layout), models, compiled):
            for one in models:
                one.forward.attention = attention
            found = _refusal(laid, models, data, no_probe)
            if found is None or (wanted != "auto" and no_probe):
                return laid, f"{layout}{f', since {reasons[0]}' if reasons else ''}{note}"
            logger.info(f"{layout} rows with {attention or 'a mask'}: {found}.")
            refused = found
        if wanted != "auto":
            raise ValueError(f"batch_layout {wanted!r} is not exact here: {refused}; use 'auto' or 'padded'.")
        reasons.append(refused)
    for one in models:
        one.forward.attention = None
    return collator, f"padded, since {'; '.join(reasons)}"


def check_given_layout(
    collator: DataCollatorForPreference, models: Sequence[Logprobs], data: Data, needs_padding: str, no_probe: str
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


def _limit(models: Sequence[Logprobs], data: Data, needs_padding: str) -> Limit:
    if needs_padding:
        return Limit("padded", needs_padding)
    limits = [config_limit(one.model, data.longest) for one in models]
    return min(limits, key=lambda limit: BATCH_LAYOUTS.index(limit.widest))


def _refusal(laid: DataCollatorForPreference, models: Sequence[Logprobs], data: Data, no_probe: str) -> str | None:
    if no_probe:
        plain = all(one.forward.model.config.model_type in PLAIN for one in models)
        return None if plain else f"{laid.layout} rows were not compared with padded ones: {no_probe}"
    try:
        return next((found for one in models if (found := difference(one, laid, data.rows))), None)
    except Exception as error:  # models that take no such mask fail in their own ways
        return f"{laid.layout} rows do not run ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _ways(
    collator: DataCollatorForPreference, models: Sequence[Logprobs], compiled: bool
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
    refusal = next((found for found in refusals if found is not None), None)
    if refusal is None:
        # the kernel's blocks: fewer shapes to compile for
        yield replace(collator, max_row_tokens=WHOLE_BATCH, pad_to_multiple_of=collator.pad_to_multiple_of or 128), FLEX
    else:
        level = logging.INFO if models[0].device.type == "cuda" else logging.DEBUG
        logger.log(level, f"no FlexAttention: {refusal}.")
    if all(kind == "sdpa" for kind in kinds) and not compiled:
        yield replace(collator, max_row_tokens=WHOLE_BATCH), DOCUMENTS
    yield collator, None
