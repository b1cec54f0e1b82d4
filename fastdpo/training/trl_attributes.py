"""What scripts read from TRL's DPOTrainer: the same values under the same names, from the config and the reference."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastdpo.training.reference.base import FrozenModel

Trainer = TypeVar("Trainer", bound=type)


def _argument(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.args, name)


def _loss_types(trainer: Any) -> list[str]:
    loss = trainer.args.loss_type
    return [loss] if isinstance(loss, str) else list(loss)


def _ref_model(trainer: Any) -> Any:
    """The reference's own model; None where it is the policy in another state, or precomputed."""
    return trainer._reference.model if isinstance(trainer._reference, FrozenModel) else None


ATTRIBUTES: Mapping[str, Callable[[Any], Any]] = {
    **{
        name: _argument(name)
        for name in (
            *("beta", "label_smoothing", "loss_weights", "use_weighting", "ld_alpha", "f_divergence_type"),
            *("f_alpha_divergence_coef", "max_length", "truncation_mode", "reference_free", "padding_free"),
        )
    },
    "loss_type": lambda trainer: trainer.args.loss_type,
    "loss_types": _loss_types,
    "precompute_ref_logps": _argument("precompute_ref_log_probs"),
    "precompute_ref_log_probs": _argument("precompute_ref_log_probs"),
    "ref_model": _ref_model,
    "is_peft_model": lambda trainer: trainer._memory.adapter,
    "pad_token_id": lambda trainer: trainer.tokenizer.pad_token_id,
    "padding_value": lambda trainer: trainer.tokenizer.pad_token_id,
    "aux_loss_enabled": lambda trainer: bool(trainer._router_loss_weight),
    "aux_loss_coef": lambda trainer: trainer._router_loss_weight,
    "router_aux_loss_coef": lambda trainer: trainer._router_loss_weight,
    "ref_adapter_name": _argument("ref_adapter_name"),
    "model_adapter_name": _argument("model_adapter_name"),
}


def with_trl_attributes(trainer: Trainer) -> Trainer:
    """A class's decorator: `ATTRIBUTES` as properties. Assigning to one raises, since it would change no training."""
    for name, read in ATTRIBUTES.items():
        setattr(trainer, name, property(read, _refuse(name), doc=f"As `{name}` of TRL's DPOTrainer; not to be set."))
    return trainer


def _refuse(name: str) -> Callable[[Any, Any], None]:
    def refuse(trainer: Any, value: Any) -> None:
        raise AttributeError(
            f"{name} is read when the trainer is made: give it to DPOConfig or DPOTrainer, and make another trainer."
        )

    return refuse
