"""Weights of a checkpoint into the model of a run: every tensor of it, under whatever name it was saved, or an error.

`save_pretrained` writes many architectures under other tensor names than `state_dict()` has (experts one by one,
`embed_out`), and only `from_pretrained` knows the way back. `Trainer` matches raw names and passes over what it does
not find, so that such weights would go on from the base model's values.
"""

import copy
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from fastdpo.models.adapters import adapter_state, reload_adapter, trained_adapter
from fastdpo.training.checkpoints.folders import CheckpointError

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_whole_model(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights in `folder`, which `save_pretrained` wrote, into `model`, bit by bit.

    Takes the memory of one more copy on the CPU for a moment, as reading the file does.

    Raises:
        CheckpointError: a tensor of the model is missing in the folder, has another shape, or one is left over.
    """
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    widest = torch.float32
    for dtype in dtypes:  # wide enough for all of them, so that nothing is rounded on the way
        widest = torch.promote_types(widest, dtype)
    config = copy.deepcopy(model.config)
    level = logging.getLogger("transformers").level
    # its table of missing keys would be of names that the sentence below has
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # some classes set rows of weights that were just read (an embedding's padding row): nothing is to be initialized
    classes = {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}
    try:
        with ExitStack() as stack:
            for one in classes:
                stack.enter_context(patch.object(one, "_init_weights", lambda self, module: None))
            stored, info = cast(
                Any,
                type(model).from_pretrained(
                    str(folder),
                    config=config,
                    dtype=widest if len(dtypes) > 1 else next(iter(dtypes), widest),
                    attn_implementation="eager",
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                ),
            )
    finally:
        logging.getLogger("transformers").setLevel(level)
    if info["mismatched_keys"]:
        name, shape, built = sorted(info["mismatched_keys"])[0]
        raise _other_shape(folder, name, tuple(shape), tuple(built))
    check_names(folder, info["missing_keys"], info["unexpected_keys"])
    model.load_state_dict(stored.state_dict())


def load_adapters(model: PeftModel, folder: Path) -> None:
    """Put the adapters in `folder`, which `save_pretrained` wrote, into `model`, and see that they have arrived.

    PEFT writes the adapter "default" at the root and any other into a folder of its name.

    Raises:
        CheckpointError: an adapter or a tensor is missing or left over, or has another shape.
    """
    folders = {path.parent.name: path.parent for path in folder.glob(f"*/{ADAPTER_WEIGHTS}")}
    if (folder / ADAPTER_WEIGHTS).is_file():
        # a final adapter lies at the root, whatever its name
        folders["default" if "default" in model.peft_config else trained_adapter(model)] = folder
    check_names(
        folder, model.peft_config.keys() - folders.keys(), folders.keys() - model.peft_config.keys(), "the adapter "
    )
    for name, place in folders.items():
        stored = load_file(place / ADAPTER_WEIGHTS)
        ours = adapter_state(model, name)
        check_names(place, ours.keys() - stored.keys(), stored.keys() - ours.keys())
        for key, value in stored.items():
            if ours[key].shape != value.shape:
                raise _other_shape(place, key, tuple(value.shape), tuple(ours[key].shape))
        reload_adapter(model, name, place)
        for key, value in adapter_state(model, name).items():
            # a checkpoint of on_nan="continue" may have NaN
            expected = stored[key].to(value.dtype)
            if not torch.allclose(value.detach().cpu(), expected, rtol=0.0, atol=0.0, equal_nan=True):
                raise CheckpointError(
                    f"cannot use the weights in {place}: {key} could not be put into this run's model."
                )


def check_names(folder: Path, missing: Iterable[str], unexpected: Iterable[str], kind: str = "") -> None:
    """Raises CheckpointError with one sentence that names the first tensor of each kind."""
    parts = []
    for names, what in ((missing, "lacks"), (unexpected, "has")):
        ordered = sorted(names)
        if ordered:
            more = f" and {len(ordered) - 1} more" if len(ordered) > 1 else ""
            parts.append(
                f"it {what} {kind}{ordered[0]}{more}{'' if what == 'lacks' else ', for which there is no place'}"
            )
    if parts:
        raise CheckpointError(
            f"cannot use the weights in {folder}: {' and '.join(parts)}; go on with the model and the arguments that "
            "the run began with."
        )


def _other_shape(folder: Path, name: str, stored: tuple[int, ...], built: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"cannot use the weights in {folder}: {name} has shape {stored} there and {built} in this run; go on with the "
        "arguments that the run began with."
    )
