"""A Trainer that a kill cannot hurt: checkpoints appear whole, and resuming loses no running sum."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastdpo.files import remove_tree
from fastdpo.models.load_errors import unreadable_weights
from fastdpo.training.checkpoints import folders
from fastdpo.training.checkpoints.content_hashes import changed_file, files_of, hash_files, write_manifest
from fastdpo.training.checkpoints.disk_space import RoomCheck
from fastdpo.training.checkpoints.step_watch import StepWatch
from fastdpo.training.checkpoints.stop_signals import EvaluationLeft, Preempted, StopSignals, left_to_the_trainer
from fastdpo.training.checkpoints.weights import load_adapters, load_whole_model
from fastdpo.wording import first_line

logger = logging.getLogger(__name__)


class SafeCheckpointTrainer(Trainer):
    """Checkpoints are complete or absent, and a resumed run logs what an undisturbed one would.

    A subclass keeps running sums of its own in a checkpoint by `extra_state` and `load_extra_state`.
    """

    _staging: Path | None = None
    _push_later = False
    _loss_since_log: torch.Tensor | None = None
    _resumed: dict[str, Any] | None = None
    _began_at_checkpoint = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._signals = StopSignals()
        scaled = getattr(self.accelerator, "scaler", None) is not None
        on_nan = cast(Any, self.args).on_nan
        self._watch = StepWatch(on_nan, scaled, self._signals, self._advice_on_nan)
        for callback in (self._signals, self._watch, _BestIsHere()):
            self.add_callback(callback)

    def extra_state(self) -> dict[str, Any]:
        """JSON values to keep in a checkpoint; called on every process."""
        return {}

    def load_extra_state(self, state: dict[str, Any] | None) -> None:
        """Go on from `extra_state`'s values, or from nothing when `state` is None."""

    def save_extra_files(self, folder: Path) -> None:
        """Write what else a checkpoint must have into it; called on the process that saves."""

    def extra_file_size(self) -> int:
        """About how many bytes `save_extra_files` writes."""
        return 0

    def load_extra_files(self, folder: Path) -> None:
        """Go on with the files of `save_extra_files`; not called where training starts from scratch."""

    @property
    def _sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. True resumes from the newest complete checkpoint in output_dir, or starts from scratch."""
        run_dir = Path(self.args.output_dir or ".")
        if self.args.should_save:
            if not self._sharded:  # the sizes of all processes' parts are not known here
                self.remove_callback(RoomCheck)
                # before another callback writes a file
                self.callback_handler.callbacks.insert(0, RoomCheck(self.extra_file_size))
            for name in folders.remove_leftovers(run_dir):
                logger.warning(f"removed {name}, which a killed run left in {run_dir}.")
        adapter = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        checkpoint = self._resolve_resume(resume_from_checkpoint, run_dir, adapter)
        old = folders.checkpoints_by_step(run_dir)
        if old and not resume_from_checkpoint:
            logger.warning(
                f"{run_dir} holds checkpoints of an earlier run, up to {old[-1][1].name}; a later resume takes "
                "the highest number, so remove them or use another output_dir."
            )
        with self._signals.caught():
            return super().train(checkpoint, *args, **kwargs)

    def _advice_on_nan(self) -> str:
        """How to go on after a number that is not finite."""
        args, last = self.args, folders.checkpoints_by_step(str(self.args.output_dir or "."))
        good = f"go on from {last[-1][1]}" if last else "start again (there is no checkpoint yet)"
        lower = "with bf16 instead of fp16" if args.fp16 else f"with a learning_rate below {args.learning_rate:g}"
        return f"{good} {lower}, or look at that step's rows; on_nan='continue' trains on all the same."

    def _resolve_resume(self, resume: str | bool | None, run_dir: Path, adapter: bool) -> str | None:
        """As `checkpoints.resolve_resume`; of several processes one looks, and all go on from the same or stop."""
        answer: list[Any] = [None, None]
        if self.args.process_index == 0:
            try:
                answer[0] = folders.resolve_resume(resume, run_dir, self._sharded, adapter)
            except folders.CheckpointError as error:
                answer[1] = str(error)
        if self.args.world_size > 1:
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise folders.CheckpointError(answer[1])
        return answer[0]

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`; its workers leave SIGTERM and SIGHUP to the trainer."""
        loader = super().get_train_dataloader()
        loader.worker_init_fn = partial(left_to_the_trainer, loader.worker_init_fn)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The same for `Trainer.get_eval_dataloader`."""
        loader = super().get_eval_dataloader(eval_dataset)
        if getattr(loader.worker_init_fn, "func", None) is not left_to_the_trainer:  # persistent workers' is kept
            loader.worker_init_fn = partial(left_to_the_trainer, loader.worker_init_fn)
        return loader

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = folders.staging_folder(run_dir, self.state.global_step)
        staged, final = staging / name, run_dir / name
        if self.args.should_save:
            remove_tree(staging)
        self.accelerator.wait_for_everyone()
        with folders.whole_or_nothing(staging, final):
            self._staging, only_model = staging, self.args.save_only_model
            # the checkpoint from which an ended run goes on
            self.args.save_only_model = only_model and not self._signals.stopping
            try:
                super()._save_checkpoint(model, trial)
                state = self._running_state()
            finally:
                self._staging, self.args.save_only_model = None, only_model
            # each process has looked whether the folder of the best is there, some before it was
            best = [self.state.best_model_checkpoint]
            self.state.best_model_checkpoint = broadcast_object_list(best)[0]
            best_is_this = self.state.best_model_checkpoint == str(staged)
            if best_is_this:
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if best_is_this:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                folders.save_state(staged, state)
                self.save_extra_files(staged)
            hashes = self._hashes(staged)
            if self.args.should_save:
                write_manifest(staged, hashes)
                folders.publish(staged, final)
                staging.rmdir()
                best = self.state.best_model_checkpoint
                folders.rotate(run_dir, self.args.save_total_limit, [final, *([Path(best)] if best else [])])
        self.accelerator.wait_for_everyone()
        if self._push_later:
            self._push_later = False
            super()._push_from_checkpoint(str(final))

    def _hashes(self, folder: Path) -> dict[str, str]:
        """The content hashes of a checkpoint's files, of those that this machine has where each has its own."""
        self.accelerator.wait_for_everyone()
        args = self.args
        if args.world_size == 1 or args.save_on_each_node:
            return hash_files(folder, files_of(folder)) if args.should_save else {}
        # each process looks at its share
        names = cast(Any, broadcast_object_list([files_of(folder) if args.process_index == 0 else None]))[0]
        mine = hash_files(folder, names[args.process_index :: args.world_size])
        hashes = dict(gather_object(list(mine.items())))
        if args.process_index == 0:  # files that the others do not see
            hashes |= hash_files(folder, [name for name in names if name not in hashes])
        return hashes

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the upload runs in the background and must not read a folder that is about to be renamed
        if self._staging is not None:
            self._push_later = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._read_weights(Path(resume_from_checkpoint), model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError, TypeError) as error:
            if checkpoint is None:
                raise
            raise folders.CheckpointError(
                f"cannot resume from {checkpoint}: its optimizer is of other trainable parameters, or another "
                f"optimizer ({first_line(error)}); go on with the arguments that the run began with."
            ) from error

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        # of a checkpoint without optimizer (save_only_model) too
        reason = None
        if self.args.process_index == 0:
            reason = (None if self._sharded else unreadable_weights(best, folders.REFERENCE_NAME)) or changed_file(best)
        reason = cast(Any, broadcast_object_list([reason]))[0]
        if reason is not None:
            raise folders.CheckpointError(f"the best model cannot be taken from {best}: {reason}.")
        if not self._read_weights(best):
            super()._load_best_model()

    def _read_weights(self, folder: Path, model: Any = None) -> bool:
        """The weights of a checkpoint, every one of them, into the model; False where an engine has its own way."""
        if self._sharded:
            return False
        wrapped = cast(Any, self.model if model is None else model)
        found = self.accelerator.unwrap_model(wrapped, keep_torch_compile=False)
        if isinstance(found, PeftModel):
            load_adapters(found, folder)
        else:
            load_whole_model(cast(PreTrainedModel, found), folder)
        return True

    def _running_state(self) -> dict[str, Any]:
        loss = self._loss_since_log
        if loss is None:
            loss = torch.zeros((), device=self.args.device)
        gathered = cast(torch.Tensor, self.accelerator.gather(loss.detach().reshape(1)))
        return {
            "loss_since_log": gathered.mean().item(),
            "last_logged_step": self._globalstep_last_logged,
            **self.extra_state(),
        }

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        # the tensor that is set to zero in place when it is logged
        self._loss_since_log = tr_loss
        control = self.control
        # a callback after the watch may have asked for it
        if (control.should_log or control.should_evaluate or control.should_save) and self._watch.settle():
            self._signals.stop(control)
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationLeft:
            self._signals.stop(self.control)
        if self._signals.stopping:
            folder = Path(super()._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            if not folder.is_dir():
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            logger.warning(f"ended by a signal; {folder} is written: resume_from_checkpoint goes on from it.")
            raise Preempted

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        self._began_at_checkpoint = resume_from_checkpoint is not None
        self._resumed = folders.load_state(resume_from_checkpoint) if resume_from_checkpoint else None
        self.load_extra_state(self._resumed)
        if resume_from_checkpoint:
            self.load_extra_files(Path(resume_from_checkpoint))
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        if skip_scheduler and self.state.global_step > 0:
            # eval_on_start: the run started before, and the checkpoint's history has that evaluation
            return {}
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationLeft:
            if not skip_scheduler:
                raise
            logger.warning("ended by a signal before the first step, so there is no checkpoint of this run.")
            raise Preempted from None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; the record of a resumed run has no `train_loss`, which would cover this call only."""
        if "train_runtime" in logs and self._began_at_checkpoint:
            logs = {name: value for name, value in logs.items() if name != "train_loss"}
        super().log(logs, start_time)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            # resumed from the checkpoint of the last step: Trainer would train one more before it looks
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._watch.add_loss(loss)
        if self.accelerator.sync_gradients:
            self._watch.look_at_gradients(cast(Any, self.model))
        if self._resumed is not None:
            # Trainer's own sum is at zero before the first step, so the sum goes on as if never interrupted
            earlier = self._resumed["loss_since_log"]
            self._globalstep_last_logged = self._resumed["last_logged_step"]
            self._total_loss_scalar -= earlier
            self._resumed = None
            loss = loss + earlier
        return loss


class _BestIsHere(TrainerCallback):
    """A resumed run finds its best checkpoint in its own output_dir, which may have been moved or copied since."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = getattr(state, "best_global_step", None)
        if not step or not state.global_step:
            return
        here = Path(str(args.output_dir), f"checkpoint-{step}")
        if here.is_dir():
            state.best_model_checkpoint = str(here)
        elif args.load_best_model_at_end:
            logger.warning(
                f"resume: the best model so far was {here.name} (metric {state.best_metric}), which is not in "
                f"{args.output_dir} any more: the best of the steps to come will be taken."
            )
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None
