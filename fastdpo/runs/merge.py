"""An adapter into its base model: one folder that every loader reads, checked before it appears."""

import gc
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fastdpo.files import sync_folder, sync_tree, why_not_written
from fastdpo.models.load import is_adapter_folder
from fastdpo.models.saved import load_adapter, load_model, load_tokenizer_of, read_adapter_config
from fastdpo.runs.saved_run import no_base_model
from fastdpo.wording import first_sentence

logger = logging.getLogger(__name__)

# root mean square of the difference of logits over that of the logits: the rounding of the written weights
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class MergeCheckFailed(RuntimeError):
    """The merged model, read back, does not compute what the model with its adapter computes."""


def merge_adapter(
    adapter: str,
    out: str,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge the adapter in the folder `adapter` into its base model and write model and tokenizer to `out`.

    base: the model, where it is not the one that the adapter names. dtype: of the written weights; the base model's
    if None (merging and checking happen in float32, or wider). A tied head that the adapter changes is untied: config
    and files then have both matrices. A base model that is stored quantized is dequantized first.

    The files are written to a hidden folder beside `out`, read back, and renamed when their logits of a few tokens are
    those of the base model with its adapter. Returns what was done, as plain JSON.

    Raises:
        ValueError: one sentence: no such adapter or base model, one that does not fit the other, or `out` is in use.
        MergeCheckFailed: the logits differ by more than `TOLERANCE`; nothing is left of the merged model.
        RuntimeError: the files cannot be written.
    """
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; give another folder")
    config = read_adapter_config(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(no_base_model(adapter))
    tokenizer = load_tokenizer_of([adapter, base], trust_remote_code)
    model: Any = _load_base(base, trust_remote_code)
    written_dtype = dtype or model.dtype
    # 16-bit activations would differ by as much as a short training changes them
    model = model.to(torch.promote_types(torch.promote_types(model.dtype, written_dtype), torch.float32))
    peft_model = load_adapter(model, adapter, base)
    expected_dtype, probe = model.dtype, _probe(model)
    expected = _logits(peft_model, probe)
    with peft_model.disable_adapter():
        effect = _relative(_logits(peft_model, probe), expected)
    untied = _untie(peft_model)
    # `safe_merge` refuses an adapter that makes weights NaN or infinite
    merged = cast(Any, peft_model).merge_and_unload(safe_merge=True).to(written_dtype)
    del model, peft_model

    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        merged.save_pretrained(staging, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(staging)
        del merged
        gc.collect()
        again = AutoModelForCausalLM.from_pretrained(staging, dtype=expected_dtype, trust_remote_code=trust_remote_code)
        difference = _relative(_logits(again, probe), expected)
        tolerance = TOLERANCE[written_dtype]
        if not difference <= tolerance:
            raise MergeCheckFailed(
                f"the merged model's logits are off by {difference:.2g} of their size (rounding to {written_dtype} "
                f"explains {tolerance:g}), so {out} is not written"
            )
        if difference > effect / 2:
            logger.warning(
                f"rounding to {written_dtype} moves the logits by {difference:.1e}, about as much as the adapter "
                f"does ({effect:.1e}): a wider dtype keeps more of what was trained"
            )
        sync_tree(staging)
        if target.is_dir():
            target.rmdir()
        os.replace(staging, target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"{out} cannot be written: {why_not_written(error) or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "adapter": adapter,
        "base": base,
        "out": out,
        "dtype": str(written_dtype).removeprefix("torch."),
        "untied_head": untied,
        "files": {path.name: path.stat().st_size for path in sorted(target.iterdir())},
        "check": {"tokens": probe.numel(), "adapter_effect": effect, "difference": difference, "tolerance": tolerance},
    }


def _load_base(base: str, trust_remote_code: bool) -> PreTrainedModel:
    """The base model, dequantized."""
    if is_adapter_folder(base):
        raise ValueError(f"the base model {base} is itself an adapter; merge that one first, and give the result")
    if not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise ValueError(f"the base model {base} is not there; give the folder where it is now as base")
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model {base} cannot be loaded ({first_sentence(error)[:-1]}); give its folder as base"
        ) from error
    stored: Any = getattr(config, "quantization_config", None)
    method = str(getattr(stored, "quant_method", None) or dict(stored or {}).get("quant_method"))
    if "bitsandbytes" in method and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"the base model {base} is stored quantized, and dequantizing it needs bitsandbytes, which is not "
            "installed: install it, or give the model that it was quantized from as base"
        )
    model = load_model(base, trust_remote_code=trust_remote_code)
    if getattr(model, "hf_quantizer", None) is not None:
        # adding to quantized weights would round the adapter away
        model = model.dequantize()
    return model


def _untie(peft_model: PeftModel) -> bool:
    """Give the head a matrix of its own where it shares the embedding's and the adapter changes either."""
    model = cast(Any, peft_model.get_base_model())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    own = [_plain(module) for module in (head, embedding)]
    changed = any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in (head, embedding))
    if not changed or own[0].weight is not own[1].weight:
        return False
    own[0].weight = nn.Parameter(own[0].weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    logger.info("the adapter changes the head or the embedding, which share one matrix: the merged model has two")
    return True


def _plain(module: nn.Module) -> Any:
    """The layer as the base model has it."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _probe(model: PreTrainedModel) -> Tensor:
    """(1, 16) ids from all over the vocabulary."""
    vocabulary = cast(Any, model.get_input_embeddings()).weight.shape[0]
    return torch.arange(16)[None] * max(1, vocabulary // 16) % vocabulary


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.cpu().double()


def _relative(merged: Tensor, expected: Tensor) -> float:
    return float((merged - expected).square().mean().sqrt() / expected.square().mean().sqrt())
