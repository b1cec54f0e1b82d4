"""Room on disk for what a run will write, looked at before the first step."""

import logging
import math
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from fastdpo.files import DiskError
from fastdpo.models.adapters import adapter_tensors
from fastdpo.training.checkpoints.folders import checkpoints_by_step

logger = logging.getLogger(__name__)


class RoomCheck(TrainerCallback):
    """Before the first step: is there room for a checkpoint, and for as many as there will be at once?

    extra: gives the bytes that a checkpoint has beside model and optimizer.
    """

    def __init__(self, extra: Callable[[], int]) -> None:
        self.extra = extra

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.should_save or args.save_strategy == SaveStrategy.NO:
            return
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        checkpoint = model_size(model, all_adapters=True) + self.extra()
        if not args.save_only_model:
            # `optim` is not what runs where the trainer was given an optimizer; the smaller guess refuses no run
            running = type(getattr(optimizer, "optimizer", optimizer)).__name__
            names = (getattr(args.optim, "value", args.optim), running)
            checkpoint += min(optimizer_size(model, str(name)) for name in names)
        check_room(str(args.output_dir), model_size(model), checkpoint, checkpoints_to_come(state, args))


def model_size(model: nn.Module, all_adapters: bool = False) -> int:
    """Bytes of the model's file, or of its trained adapter's (of all its adapters')."""
    if not isinstance(model, PeftModel):
        return _size(model.parameters())
    names = model.peft_config if all_adapters else model.active_adapters
    return _size(tensor for name in names for tensor in adapter_tensors(model, name))


def optimizer_size(model: nn.Module, name: str) -> int:
    """Bytes of the state of an optimizer of that name; of an unknown one 0."""
    name = name.lower()
    if any(word in name for word in ("galore", "apollo", "lomo")):
        return 0  # of low rank, or none
    moments = {"ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}
    factor = next((count for word, count in moments.items() if word in name), 0)
    bits = 8 if "8bit" in name else 4 if "4bit" in name else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return factor * (_size(trained) if bits is None else bits * sum(p.numel() for p in trained) // 8)


def checkpoints_to_come(state: TrainerState, args: TrainingArguments) -> int:
    """How many more checkpoints than now there will be on disk at once, the one being written included."""
    steps = state.max_steps - state.global_step
    if args.save_strategy == SaveStrategy.STEPS:
        every = max(int(state.save_steps), 1)
        saves = state.max_steps // every - state.global_step // every + (state.max_steps % every > 0)
    elif args.save_strategy == SaveStrategy.EPOCH:
        saves = max(math.ceil(state.num_train_epochs - (state.epoch or 0)), 1)
    else:
        saves = 1  # the best so far, replaced by a better one
    if steps <= 0:
        return 0
    if args.save_total_limit:
        # the oldest one goes when the new one is complete
        there = len(checkpoints_by_step(str(args.output_dir)))
        saves = min(saves, max(args.save_total_limit + 1 - there, 1))
    return saves


def check_room(folder: str, final: int, checkpoint: int, count: int) -> None:
    """Compare the room in `folder` with the final model (`final` bytes) and `count` checkpoints of `checkpoint` bytes.

    Raises:
        DiskError: not even one checkpoint and the final model fit. A log line where one fits and `count` do not.
    """
    free = shutil.disk_usage(folder).free
    if free < final + checkpoint * min(count, 1):
        what, hint = f"the final model ({gigabytes(final)})", ""
        if count:
            what = f"one checkpoint ({gigabytes(checkpoint)}) and {what}"
            hint = "; save_only_model=True makes checkpoints smaller, and no run resumes from them"
        raise DiskError(
            f"the disk of output_dir {folder} has {gigabytes(free)} free, too little for {what}; free some or give "
            f"another output_dir{hint}"
        )
    if free < final + checkpoint * count:
        logger.warning(
            f"the disk of output_dir {folder} has {gigabytes(free)} free, and this run will keep {count} checkpoints "
            f"of {gigabytes(checkpoint)} there: give a save_total_limit or a larger save_steps, or free some."
        )


def _size(tensors: Iterable[Tensor]) -> int:
    different = {id(tensor): tensor for tensor in tensors}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in different)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
