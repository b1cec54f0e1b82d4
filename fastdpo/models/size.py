"""What a config.json asks for against what the weights beside it hold, before anything of that size is built."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# each of these is a module, or several: so many are built in seconds, and no model of weights has more
_PARTS = {
    re.compile(r"^(n|num|number)_(\w+_)?(layers?|blocks?)$|^(\w+_)?(layers|depth)$"): 1000,
    re.compile(r"experts?$"): 1_000_000,
}
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_FLOATS = ("F64", "F32", "F16", "BF16")
# elements of a model that is a few sizes off: loading it names the tensor that does not fit
_SLACK = 50_000_000


# torch's words for a shape that no tensor can have
_TOO_LARGE = re.compile("overflow|negative dimension|[Ss]torage size")


class Stored(NamedTuple):
    """Tensors in the safetensors files of a folder, how many weights fit into them (a byte may hold several), and the
    longest side of one."""

    tensors: int
    weights: int
    longest: int


def checked_config(path: str, **hub: Any) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained`, without starting on a config that names more layers than anybody could build.

    Raises OSError and ImportError as it does, and ValueError for whatever else is wrong with the file.
    """
    try:
        check_parts(path, **hub)
        return AutoConfig.from_pretrained(path, **hub)
    except (OSError, ValueError, ImportError):
        raise
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # there is no narrower class for a value that does not fit
        raise ValueError(str(error)) from error


def check_parts(path: str, **hub: Any) -> None:
    """Compare the numbers of layers and experts in a config.json with the tensors in the folder.

    Raises ValueError with a sentence that names the field; whatever else is wrong with the file is left to its reader.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=hub.get("revision"))
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return
    if not isinstance(config, Mapping):
        return
    stored = _stored(path)
    for name, value in _integers(config):
        if name in _LAYERS and value < 0:  # range() would make none of it
            raise ValueError(f"{name} is {value}; give the config.json that belongs to the weights")
        for pattern, built in _PARTS.items():
            most = max(built, stored.tensors if stored else 0)
            if pattern.search(name) and value > most:
                held = f"its weights are {stored.tensors:,} tensors" if stored else f"more than {most:,} are not built"
                shown = f"{value:,}" if value < 10**15 else f"a number of {len(str(value))} digits"
                raise ValueError(f"{name} is {shown}, and {held}; give the config.json that belongs to the weights")


def check_model_size(config: PreTrainedConfig, path: str) -> None:
    """Compare the model that `config` makes with the weights in the folder `path`; builds it without memory.

    A model with code of its own, and one whose weights are not here as safetensors, is left alone.

    Raises ValueError with a sentence where the model is several times what the weights are.
    """
    stored = _stored(path)
    if stored is None or getattr(config, "auto_map", None):
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        size = sum(parameter.numel() for parameter in model.parameters())
        tables = sum(buffer.numel() for buffer in model.buffers())
    except (RuntimeError, OverflowError, MemoryError) as error:
        if not (isinstance(error, OverflowError | MemoryError) or _TOO_LARGE.search(str(error))):
            return
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"its config.json makes a model that cannot be built ({reason})") from error
    except Exception:  # loading the weights meets it too, and says it in its own words
        return
    most = 4 * stored.weights + _SLACK
    if size > most or tables > 16 * most:
        what = f"{size:,} weights" if size > most else f"tables of {tables:,} numbers"
        raise ValueError(
            f"its config.json makes a model with {what}, and its files hold {stored.weights:,} weights; they are not "
            "of one model"
        )


def check_adapter_rank(config: PeftConfig, folder: str) -> None:
    """Raise ValueError with a sentence where a LoRA's rank is none that its weights can have."""
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        return
    stored = _stored(folder)
    ranks = [getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()]
    if stored is not None and stored.longest < max(ranks):
        raise ValueError(
            f"the adapter {folder} has rank {max(ranks):,} in its adapter_config.json, and no side of its weights is "
            f"longer than {stored.longest:,}; they are not of one adapter"
        )


def _integers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer of a config under its name, those of the configs in it too."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _integers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def _stored(path: str) -> Stored | None:
    """What the headers of a folder's safetensors files say; None where there are none that can be read."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("pytorch_model*.bin")):
        return None
    files = sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model*.safetensors")])
    return _headers(tuple((str(file), file.stat().st_mtime_ns) for file in files)) if files else None


@lru_cache(maxsize=8)
def _headers(files: tuple[tuple[str, int], ...]) -> Stored | None:
    tensors = weights = longest = 0
    try:
        for name, _ in files:
            with safe_open(name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 no mapping
                    tensor = file.get_slice(key)
                    shape = tensor.get_shape()
                    count = math.prod(shape)
                    longest = max([longest, *shape])
                    tensors += 1
                    # a 32-bit integer holds up to sixteen quantized weights
                    weights += count * (1 if tensor.get_dtype() in _FLOATS else 16)
    except (OSError, SafetensorError):
        return None
    return Stored(tensors, weights, longest)
