"""What reference log-probs depend on, as hashes: data, weights, configurations."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn

from fastdpo.data.rows.sides import LABEL, MISMATCHED, token_columns
from fastdpo.training.reference.base import Reference

# of a configuration, what changes no number
_IRRELEVANT = {
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "task_type", "auto_mapping", "lora_dropout", "init_lora_weights"),
}


def data_hash(dataset: Dataset, mismatched: bool = False) -> str:
    """SHA-256 of the token ids (and masks, and labels) of every row: all that a model sees of data, tokenizer and chat
    template. mismatched: with the completions of other rows, which go by the batch size."""
    columns = token_columns(dataset.column_names)
    if mismatched:
        columns += [name for name in dataset.column_names if name.startswith(MISMATCHED)]
    hashes = [hashlib.sha256() for _ in range(2 * len(columns))]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        for index, column in enumerate(columns):
            for chunk in cast(Any, table).column(column).chunks:
                if column == LABEL:
                    labels = chunk.to_numpy(zero_copy_only=False)
                    hashes[2 * index].update(np.ascontiguousarray(labels, np.int64).tobytes())
                    continue
                lengths = pc.call_function("list_value_length", [chunk]).to_numpy(zero_copy_only=False)
                ids = chunk.flatten().to_numpy(zero_copy_only=False)
                hashes[2 * index].update(np.ascontiguousarray(lengths, np.int64).tobytes())
                hashes[2 * index + 1].update(np.ascontiguousarray(ids, np.int64).tobytes())
    return hashlib.sha256(b"".join(part.digest() for part in hashes)).hexdigest()


def weights_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in any order of the tensors.

    Raises:
        ValueError: a tensor is not in this process: ZeRO-3 has split it.
    """
    digests = []
    for name, tensor in weights:
        if tensor.is_meta or (tensor.numel() == 0 and hasattr(tensor, "ds_id")):
            raise ValueError(
                "precompute_ref_log_probs needs whole weights before training, and ZeRO-3 splits them as they load; "
                "use ZeRO-2 or FSDP, or precompute in a run of its own (precompute_ref_dir)."
            )
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def settings_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the configurations of model and adapter, without names and versions."""
    plain = {name: _plain(config.to_dict()) for name, config in settings.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _IRRELEVANT}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def reference_settings(reference: Reference, policy: nn.Module) -> dict[str, Any]:
    """The manifest's part on the reference: its weights, its configurations, its attention."""
    settings = reference.settings(policy)
    configs = [config for config in settings.values() if not isinstance(config, PeftConfig)]
    return {
        "weights": weights_hash(reference.weights(policy)),
        # an adapter's name is no part of what it computes
        "configuration": settings_hash({str(index): config for index, config in enumerate(settings.values())}),
        "attention": configs[0].get_text_config()._attn_implementation,
    }
