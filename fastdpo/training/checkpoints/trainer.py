"""A Trainer that a kill cannot hurt: checkpoints appear whole, and a resumed run goes on exactly."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from fastdpo.files import cut_model_links, remove_tree
from fastdpo.models.adapters import saved_at_root, trained_adapter, trained_beside
from fastdpo.models.load_errors import unreadable_weights
from fastdpo.training.checkpoints import folders
from fastdpo.training.checkpoints.content_hashes import changed_file, hash_checkpoint, write_manifest
from fastdpo.training.checkpoints.disk_space import RoomCheck
from fastdpo.training.checkpoints.parts import FilePart, Part
from fastdpo.training.checkpoints.step_watch import NotFiniteError, StepWatch
from fastdpo.training.checkpoints.stop_signals import EvaluationLeft, Preempted, StopSignals
from fastdpo.training.checkpoints.weights import load_adapters, load_whole_model
from fastdpo.wording import first_line

logger = logging.getLogger(__name__)


class CrashSafeTrainer(Trainer):
    """Checkpoints are complete or absent, and a resumed run logs what an undisturbed one would.

    The final model of a PEFT model is the trained adapter, whatever its name, at the root of its folder; checkpoints
    keep PEFT's sub-folders. A SIGTERM or SIGHUP writes a checkpoint and ends the run.

    on_nan: "stop" raises `NotFiniteError` where a loss, gradient or weight is not finite; "continue" says it once.

    Attributes:
        parts: what a checkpoint must keep as JSON values; loaded in this order before training begins.
        file_parts: what it must keep in files of their own.
    """

    def __init__(self, *args: Any, on_nan: str = "stop", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: list[Part] = []
        self.file_parts: list[FilePart] = []
        # where the checkpoint that is being written lies
        self._staging: Path | None = None
        self._push_later = False
        # of the checkpoint that this run goes on from
        self._resumed: dict[str, Any] | None = None
        self._began_at_checkpoint = False
        self._signals = StopSignals()
        scaled = getattr(self.accelerator, "scaler", None) is not None
        self._watch = StepWatch(on_nan, scaled, self._signals, self._advice_on_nan)
        for callback in (self._signals, self._watch, _BestIsHere(), _LossGoesOn(self)):
            self.add_callback(callback)

    @property
    def _sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _advice_on_nan(self) -> str:
        """How to go on after a number that is not finite."""
        args, last = self.args, folders.checkpoints_by_step(str(self.args.output_dir or "."))
        good = f"go on from {last[-1][1]}" if last else "start again (there is no checkpoint yet)"
        lower = "with bf16 instead of fp16" if args.fp16 else f"with a learning_rate below {args.learning_rate:g}"
        return f"{good} {lower}, or look at that step's rows; on_nan='continue' trains on all the same."

    # the start

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. True resumes from the newest complete checkpoint in output_dir, or starts from scratch.

        Raises:
            ValueError: nothing is trainable, or something is that belongs to no adapter and so would not be saved.
        """
        self._check_trained()
        run_dir = Path(self.args.output_dir or ".")
        if self.args.should_save:
            if not self._sharded:  # the sizes of all processes' parts are not known here
                self.remove_callback(RoomCheck)
                # before another callback writes a file
                room = RoomCheck(lambda: sum(part.size() for part in self.file_parts))
                self.callback_handler.callbacks.insert(0, room)
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
        try:
            with self._signals.caught():
                return super().train(checkpoint, *args, **kwargs)
        except NotFiniteError:
            # the window in which it happened is worth most of all; all processes are here
            steps = self.state.global_step - self._globalstep_last_logged
            if steps > 0:
                self.log({"loss": self._tr_loss.item() / steps})
            raise

    def _check_trained(self) -> None:
        model = self.model
        if isinstance(model, nn.Module) and not any(p.requires_grad for p in model.parameters()):
            what = f"of the adapter {trained_adapter(model)!r} " if isinstance(model, PeftModel) else ""
            raise ValueError(
                f"no weight {what}is trainable; load an adapter with is_trainable=True, or name it in "
                "model_adapter_name."
            )
        beside = trained_beside(model) if isinstance(model, PeftModel) else []
        if beside and not self._sharded:
            more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
            raise ValueError(
                f"{beside[0]}{more} would be trained and belongs to no adapter, so that neither a checkpoint nor the "
                "final adapter would hold it; name its module in the adapter's modules_to_save, or freeze it."
            )

    def _resolve_resume(self, resume: str | bool | None, run_dir: Path, adapter: bool) -> str | None:
        """As `folders.resolve_resume`; of several processes one looks, and all go on from the same or stop."""
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._read_weights(Path(resume_from_checkpoint), model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _read_weights(self, folder: Path, model: Any = None) -> bool:
        """The weights of a checkpoint, every one of them, into the model; False where an engine has its own way."""
        if self._sharded:
            return False
        wrapped = cast(Any, self.model if model is None else model)
        plain = self.accelerator.unwrap_model(wrapped, keep_torch_compile=False)
        if isinstance(plain, PeftModel):
            load_adapters(plain, folder)
        else:
            load_whole_model(cast(PreTrainedModel, plain), folder)
        return True

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        # here, since auto_find_batch_size begins anew, and before an optimizer's state meets other weights
        self._began_at_checkpoint = resume_from_checkpoint is not None
        self._resumed = folders.load_state(resume_from_checkpoint) if resume_from_checkpoint else None
        for part in self.parts:
            part.load_state_dict(self._resumed)
        for part in self.file_parts if resume_from_checkpoint else []:
            part.load(Path(cast(str, resume_from_checkpoint)))
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`; its workers leave SIGTERM and SIGHUP to the trainer."""
        return self._signals.spare(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The same for `Trainer.get_eval_dataloader`."""
        return self._signals.spare(super().get_eval_dataloader(eval_dataset))

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

    # a step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            # resumed from the checkpoint of the last step: Trainer would train one more before it looks
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._watch.add_loss(loss)
        if self.accelerator.sync_gradients:
            self._watch.look_at_gradients(cast(Any, self.model))
        return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        control = self.control
        if control.should_training_stop and self.args.logging_strategy != IntervalStrategy.NO:
            # else the steps since the last log are in no record (a step that was logged is not logged again); a run
            # that a signal ends keeps them in its checkpoint, and logs them when the window is full
            control.should_log = control.should_log or not self._signals.stopping
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; the record of a resumed run has no `train_loss`, which would cover this call only."""
        if "train_runtime" in logs and self._began_at_checkpoint:
            logs = {name: value for name, value in logs.items() if name != "train_loss"}
        super().log(logs, start_time)

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

    # a checkpoint

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
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
                for part in self.file_parts:
                    part.save(staged)
            self.accelerator.wait_for_everyone()
            hashes = hash_checkpoint(staged, self.args)
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

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _running_state(self) -> dict[str, Any]:
        loss = cast(Tensor, self.accelerator.gather(self._tr_loss.detach().reshape(1)))
        state = {"loss_since_log": loss.mean().item(), "last_logged_step": self._globalstep_last_logged}
        for part in self.parts:
            state |= part.state_dict()
        return state

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # the upload runs in the background and must not read a folder that is about to be renamed
        if self._staging is not None:
            self._push_later = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    # the end

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`. Raises CheckpointNotWritten for an error of the disk."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = str(output_dir or self.args.output_dir)
        with folders.model_or_sentence(folder):
            if self.args.should_save:
                cut_model_links(folder)
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._adapter_at_root():
            super()._save(output_dir, state_dict)

    @contextmanager
    def _adapter_at_root(self) -> Iterator[None]:
        """Of a final model; Trainer restores what lies at a checkpoint's root under the name "default"."""
        model = self.model
        if self._staging is None and isinstance(model, PeftModel) and list(model.peft_config) != ["default"]:
            with saved_at_root(model):
                yield
        else:
            yield


class _LossGoesOn(TrainerCallback):
    """In a resumed run Trainer's own sum of losses goes on as if it had never been interrupted."""

    def __init__(self, trainer: CrashSafeTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, resumed = self.trainer, self.trainer._resumed
        if resumed is not None and state.global_step < state.max_steps:  # else no step comes that could log it
            trainer._tr_loss += resumed["loss_since_log"]
            # what this call reports as train_loss is of its own steps
            trainer._total_loss_scalar -= resumed["loss_since_log"]
            trainer._globalstep_last_logged = resumed["last_logged_step"]


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
