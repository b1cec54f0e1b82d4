"""Why a model cannot be loaded or trained, in one sentence that names it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from fastdpo.json_text import read_json

# what a class's name ends with, of models whose trunk a causal LM of the same config would load without a word
OTHER_KINDS = {
    "Classification": "a classifier",
    "QuestionAnswering": "a model that marks answers in a text",
    "MaskedLM": "a masked language model",
}
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)", re.S)


def check_causal_lm(config: PreTrainedConfig) -> None:
    """Refuse the configuration of a model that is no text-only causal LM. Raises ValueError with one sentence."""
    name = (config.architectures or [config.model_type])[0]
    # of two decoders, as an encoder-decoder may have, there is no one text config
    text = config if config.is_encoder_decoder else config.get_text_config()
    built: Any = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING).get(type(config), None)
    # of some multimodal models AutoModelForCausalLM loads the text model alone
    text_alone = text is not config and built is not None and built.config_class is type(text)
    check_text_causal_lm(text if text_alone else config, getattr(built, "__name__", name) if text_alone else name)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise ValueError(f"{name} is no causal language model that transformers knows; fastdpo trains those.")


def check_text_causal_lm(config: PreTrainedConfig, name: str) -> None:
    """The same for a class of this name, which need not be one that transformers knows."""
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; fastdpo trains causal language models.")
    if config.get_text_config() is not config:
        raise ValueError(
            f"{name} is a multimodal model, which fastdpo does not train yet; use its text-only causal LM."
        )
    kind = next((kind for ending, kind in OTHER_KINDS.items() if name.endswith(ending)), None)
    if kind is not None:
        raise ValueError(f"{name} is {kind}; fastdpo trains causal language models.")


def why_no_weights(path: str) -> str | None:
    """What is wrong with the weight files of a model's folder; None where nothing is, or `path` is no folder."""
    folder = Path(path)
    reason = unreadable_weights(folder) if folder.is_dir() else None
    pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if reason == "the weights are missing" and pickles:
        return (
            f"its weights are a pickle ({pickles[0]}), which can run code when it is read; convert them to "
            'safetensors, or set model_init_kwargs to {"use_safetensors": false} if you trust the file.'
        )
    return f"{reason}; copy or download the model again." if reason else None


def check_loaded(loaded: Mapping[str, Any], what: str) -> None:
    """Refuse weights that do not cover the model: transformers would make up the rest with a warning.

    loaded: `output_loading_info`; weights that are tied to others are not missing. `what` begins the sentence.
    """
    mismatched = sorted(loaded["mismatched_keys"])
    if mismatched:
        name, stored, built = mismatched[0]
        raise ValueError(
            f"{what}: its weights have {name} of shape {tuple(stored)}, and its config.json makes it {tuple(built)}; "
            "they are not of one model."
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{what}: its weights lack {missing[0]}{more}, which would start at random; give a complete checkpoint of "
            "a causal LM."
        )


def size_mismatch(error: BaseException) -> tuple[str, str, str] | None:
    """Name, stored and wanted shape of the first tensor that torch's load_state_dict found too large or too small."""
    match = _MISMATCH.search(str(error))
    return (match[1], f"({match[2]})", f"({match[3]})") if match else None


def unreadable_weights(folder: Path, *others: str) -> str | None:
    """Why the safetensors files of a model or adapter in `folder`, and those that match `others`, cannot be read; None
    if they can."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            shards = set(read_json(index)["weight_map"].values())
            files = [folder / name for name in sorted(shards)]
        else:
            names = ("model.safetensors", "adapter_model.safetensors")
            files = [folder / name for name in names if (folder / name).is_file()]
            files += sorted(folder.glob("*/adapter_model.safetensors"))
    except (ValueError, KeyError, AttributeError, OSError, RecursionError):
        return f"{index.name} is not readable"
    if not files:
        return "the weights are missing"
    for path in [*files, *(path for pattern in others for path in folder.glob(pattern))]:
        try:
            # the header says how long the file must be
            with safe_open(path, framework="pt"):
                pass
        except FileNotFoundError:
            return f"{path.name} is missing"
        except (SafetensorError, OSError):
            return f"{path.name} is not readable"
    return None
