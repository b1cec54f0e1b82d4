"""Models and adapters from folders, as they were saved: for merging and comparing, not for training."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastdpo.models.adapters import WEIGHTS, resize_to_adapter
from fastdpo.models.load import is_adapter_folder
from fastdpo.models.load_errors import check_loaded, size_mismatch, why_no_weights
from fastdpo.models.size import check_adapter_rank, check_model_size, check_parts, checked_config
from fastdpo.wording import first_line, first_sentence


def read_adapter_config(adapter: str) -> PeftConfig:
    """The configuration of an adapter that changes weights. Raises ValueError with one sentence."""
    folder = Path(adapter)
    if not folder.is_dir():
        raise ValueError(f"no such adapter: the folder {adapter} does not exist")
    if not (folder / "adapter_config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        if (folder / "config.json").is_file():
            raise ValueError(f"{adapter} holds a whole model, not an adapter: there is nothing to merge")
        hint = f"; give one of its sub-folders: {', '.join(inside)}" if inside else ""
        raise ValueError(f"the folder {adapter} holds no adapter (adapter_config.json){hint}")
    if not (folder / WEIGHTS).is_file():
        other = "adapter_model.bin"
        reason = f", only the pickle file {other}, which is not read" if (folder / other).is_file() else ""
        raise ValueError(f"the folder {adapter} holds no {WEIGHTS}{reason}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):
            pass
        config = PeftConfig.from_pretrained(adapter)
    except KeyError as error:
        raise ValueError(f"the adapter {adapter} is of type {error.args[0]}, which PEFT does not know") from error
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"the adapter {adapter} cannot be read: {first_line(error)}") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{adapter} is an adapter of type {kind}, which changes no weights; LoRA is wanted")
    check_adapter_rank(config, adapter)
    return config


def load_model(path: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The causal LM in a folder or on the hub, in eval mode; dtype: the checkpoint's own if None.

    A folder that holds an adapter gives the PeftModel over the base model that it names.
    Raises ValueError with one sentence.
    """
    if is_adapter_folder(path):
        config = read_adapter_config(path)
        if not config.base_model_name_or_path:
            raise ValueError(f"the adapter {path} does not say which model it belongs to")
        base = load_model(config.base_model_name_or_path, dtype, trust_remote_code)
        return load_adapter(base, path, config.base_model_name_or_path)
    try:
        check_model_size(checked_config(path, trust_remote_code=trust_remote_code), path)
        model, loaded = cast(
            Any,
            AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype or "auto",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # reading a pickle can run code
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # its own complaint names none of them
            ),
        )
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = why_no_weights(path) or first_sentence(error)
        raise ValueError(f"the model {path} cannot be loaded: {reason}") from error
    check_loaded(loaded, f"the model {path} cannot be loaded")
    return model.eval()


def load_adapter(
    model: PreTrainedModel | PeftModel, adapter: str, base: str, *, name: str = "default", trainable: bool = False
) -> PeftModel:
    """The adapter over its base model, or beside a PeftModel's own, which stays active.

    An embedding that was resized for training is resized here too, in a model without adapters. base: what a message
    calls the model. Raises ValueError where one does not fit the other.
    """
    if not isinstance(model, PeftModel):
        resize_to_adapter(model, adapter)
    try:
        with warnings.catch_warnings():
            # an adapter of another model would otherwise start at random, with no more than a warning
            warnings.filterwarnings("error", message=".*Found missing adapter keys")
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")  # merging unties it
            if isinstance(model, PeftModel):
                model.load_adapter(adapter, name, is_trainable=trainable)
                return model
            loaded = PeftModel.from_pretrained(model, adapter, adapter_name=name, is_trainable=trainable)
            return cast(PeftModel, loaded).eval()
    except (UserWarning, ValueError, RuntimeError, KeyError) as error:
        mismatch = size_mismatch(error)
        reason = " ".join(str(error).split())[:300]
        if mismatch is not None:
            reason = f"{mismatch[0]} has shape {mismatch[1]} in the adapter and needs {mismatch[2]}"
        raise ValueError(f"the adapter {adapter} does not fit the base model {base}: {reason}") from error


def load_tokenizer_of(folders: list[str], trust_remote_code: bool = False) -> Any:
    """The tokenizer of the first of `folders` (or hub names) that has one. Raises ValueError where none has."""
    places = [name for name in folders if not Path(name).is_dir() or Path(name, "tokenizer_config.json").is_file()]
    if not places:
        raise ValueError(f"there is no tokenizer in {' or '.join(folders)}")
    try:
        check_parts(places[0])  # the tokenizer's class reads the config too
        return AutoTokenizer.from_pretrained(places[0], trust_remote_code=trust_remote_code)
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises no narrower class for a broken tokenizer.json
        raise ValueError(f"the tokenizer in {places[0]} cannot be read: {first_line(error)}") from error
