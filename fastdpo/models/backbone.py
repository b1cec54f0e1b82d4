"""The parts of a causal LM that are read by name: its backbone, and the configuration of its decoder's attention.

What transformers calls `base_model` is found by a prefix that points nowhere in some architectures.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def backbone(model: "PreTrainedModel") -> nn.Module | None:
    """The module whose `last_hidden_state` enters the head; None where there is none apart from the model itself."""
    head = model.get_output_embeddings()
    # a model without a decoder by name gives itself, and `decoder` is what some call their head
    for part in (model.base_model, _decoder(model), getattr(model, "model", None)):
        if isinstance(part, nn.Module) and part is not model and part is not head:
            return part
    return None


def decoder_config(model: "PreTrainedModel") -> "PreTrainedConfig":
    """The configuration that the text layers read: a composite one's `_attn_implementation` speaks for all parts."""
    for part in (_decoder(model), backbone(model)):
        config: Any = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation"):
            return config
    return model.config


def _decoder(model: "PreTrainedModel") -> Any:
    get_decoder = getattr(model, "get_decoder", None)
    return None if get_decoder is None else get_decoder()
