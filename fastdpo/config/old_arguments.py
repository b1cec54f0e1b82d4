"""Keyword arguments that TRL's DPOTrainer took up to 0.15, and arguments that are no DPOConfig."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, replace
from typing import Any

from transformers import TrainingArguments

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.config.old_names import OLD_NAMES, todays_names
from fastdpo.config.other_names import meant_by

logger = logging.getLogger(__name__)

_KNOWN = {field.name for field in fields(DPOConfig) if field.init}
_NEVER = {
    "model_init": "pass the model itself, or its path",
    "preprocess_logits_for_metrics": "logits are never built; compute_metrics gets each pair's log-probs and rewards",
}


def settled_arguments(args: Any, arguments: Mapping[str, Any], trainer: type) -> DPOConfig:
    """`args` as a DPOConfig, with `arguments`: further keyword arguments of the trainer, beside its own.

    A keyword that is an argument of DPOConfig, today's or an old one, goes before the one in `args`.

    Raises:
        TypeError: a keyword that never was one, or `args` that are no TrainingArguments.
    """
    parameters = inspect.signature(trainer).parameters.values()
    todays = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    for name, value in arguments.items():
        if name in _NEVER:
            if value is not None:
                raise TypeError(f"DPOTrainer takes no {name}: {_NEVER[name]}.")
        elif name not in _KNOWN and name not in OLD_NAMES:
            hint = meant_by(name, [*todays, *_KNOWN, *OLD_NAMES])
            hint = f"; {hint}" if hint else f"; it takes {', '.join(todays)}."
            raise TypeError(f"DPOTrainer has no argument {name!r}{hint}")
    arguments = {name: value for name, value in arguments.items() if name not in _NEVER and value is not None}
    if arguments:
        values = "value" if len(arguments) == 1 else "values"
        logger.warning(f"Pass {', '.join(arguments)} in DPOConfig; using the {values} given here.")
        arguments = todays_names(arguments, _KNOWN, "DPOTrainer")
    if args is None:
        return DPOConfig(**arguments)
    if isinstance(args, DPOConfig):
        return replace(args, **arguments) if arguments else args
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be a fastdpo DPOConfig, got {type(args).__name__}.")
    logger.warning(
        f"args are {type(args).__name__}: every value is taken as it is there, and fastdpo's defaults for the rest; "
        "pass a fastdpo DPOConfig."
    )
    values = {}
    for field in fields(args):
        value = getattr(args, field.name)
        # an old name that was left at its default asked for nothing
        if field.init and (field.name in _KNOWN or value != _default(field)):
            values[field.name] = value
    return DPOConfig(**{**values, **arguments})


def _default(field: "Field[Any]") -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
