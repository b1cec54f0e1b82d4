"""One training run of the command: the trainer with its report, what it says, what it leaves behind."""

from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset
from transformers import PrinterCallback, ProgressCallback

from fastdpo.cli.errors import TrainingFailed
from fastdpo.cli.example_pair import example_pair
from fastdpo.cli.terminal import say
from fastdpo.cli.train.data import dataset_names
from fastdpo.cli.train.models import freeze_layers, load_models
from fastdpo.cli.train.parsing import DEFAULTS
from fastdpo.cli.train.show import LogLines, ProgressBar, command_text, result_text
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.errors import DataError
from fastdpo.files import DiskError
from fastdpo.training.checkpoints.disk_space import check_room, model_size
from fastdpo.training.checkpoints.folders import CheckpointError, resolve_resume
from fastdpo.training.checkpoints.run_lock import output_dir_locked
from fastdpo.training.checkpoints.stop_signals import Preempted
from fastdpo.training.trainer import DPOTrainer

# what summary.json says of a model where it is asked for
MODEL_DETAILS = (
    *("adapter_name_or_path", "create_new_adapter", "load_in_4bit", "load_in_8bit", "ref_model", "ref_adapters"),
    *("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
)
# and of the data
DATA_DETAILS = (
    "datasets",
    "dataset_config",
    "dataset_train_split",
    "data_scale_rate",
    "max_samples",
    "test_split_size",
)


class Session:
    """Builds the trainer (the model loads here) and says what will be trained.

    option: every argument by name, defaults filled in.
    """

    def __init__(
        self,
        args: DPOConfig,
        option: dict[str, Any],
        tokenizer: Any,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | None,
        peft_config: Any,
    ) -> None:
        self.args, self.option, self.tokenizer = args, option, tokenizer
        self.adapter = bool(option["use_peft"] or option["adapter_name_or_path"])  # that is what is trained and saved
        sets = {"train": train_dataset, "eval": eval_dataset}
        self.pairs_read = {name: len(data) if isinstance(data, Dataset) else None for name, data in sets.items()}
        resume = args.resume_from_checkpoint
        if isinstance(resume, str) and not (args.deepspeed or args.fsdp):
            # a broken checkpoint is named before the model loads
            resolve_resume(resume, str(args.output_dir), adapter=self.adapter)
        models = load_models(option, args, peft_config)
        self.trainer = DPOTrainer(
            models.policy,
            models.reference,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=models.quantization_config,
            peft_config=models.peft_config,
        )
        if option["freeze_trainable_layers"] is not None:
            freeze = (option[f"freeze_{what}"] for what in ("trainable_layers", "trainable_modules", "extra_modules"))
            freeze_layers(cast(Any, self.trainer.model), *freeze)
        self.pairs = cast("Dataset | IterableDataset", self.trainer.train_dataset)
        self.main = self.trainer.is_world_process_zero()
        self.trainer.card_details = {
            "data": dataset_names(option),
            "command": command_text(option),
        }
        if option["create_new_adapter"]:
            self.trainer.card_details["base"] = self._model_name()
        self.report = self.trainer.report
        self.report.details |= self._details()
        for callback in (ProgressCallback, PrinterCallback):
            self.trainer.remove_callback(callback)
        if not args.disable_tqdm:
            self.trainer.add_callback(ProgressBar())
        self.trainer.add_callback(LogLines())

    def train(self) -> str:
        """Train, save model or adapter, tokenizer and metric files; the result's text, "" on other processes."""
        trainer, args = self.trainer, self.args
        self._introduce()
        resume = args.resume_from_checkpoint
        try:
            with output_dir_locked(args, trainer):
                if args.save_strategy == "no":
                    check_room(str(args.output_dir), model_size(cast(Any, trainer.model)), 0, 0)
                trainer.train(resume_from_checkpoint=resume if resume else None)
                # without an evaluation during training the held-out pairs are scored once, at the end
                if trainer.eval_dataset is not None and args.eval_strategy == "no":
                    trainer.evaluate()
                if args.save_strategy == "no":  # else the trainer has saved them
                    trainer.save_model()
        except Preempted:
            # as at the end of a run: a process that ends before the others may abort in its group's threads
            trainer.accelerator.end_training()
            raise
        # a bad row or checkpoint, a full disk, a package that an option needs
        except (DataError, CheckpointError, DiskError, ImportError):
            raise
        except Exception as error:
            # the input was accepted, so this is no error of the command line even if it is a ValueError
            raise TrainingFailed from error
        if not self.main:
            return ""
        saved = "adapter" if self.adapter else "model"
        files = args.metric_files and self.report.files.lost() is None
        rows = f"{self._pairs_trained()} {args.rows_are}"
        return result_text(trainer.state, str(args.output_dir), rows, saved, files) + "\n"

    def _introduce(self) -> None:
        if not self.main:
            return
        trainer = self.trainer
        say(f"first {self.args.rows_are[:-1]} as it is trained on:")
        say(example_pair(self.tokenizer, trainer.data_collator, next(iter(cast(Any, self.pairs)))))
        stale = [name for name in ("model.safetensors", "adapter_model.safetensors") if self._is_stale(name)]
        if stale:
            say(f"{self.args.output_dir} holds {stale[0]} of another run, which stays beside the new files")

    def _pairs_trained(self) -> int:
        """All pairs of the data; of a stream those that the steps took."""
        if isinstance(self.pairs, Dataset):
            return len(self.pairs)
        args = self.args
        update = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.trainer.state.global_step * update

    def _is_stale(self, name: str) -> bool:
        """Whether an earlier run left weights of the other kind (model or adapter) in the output folder."""
        other = name.startswith("adapter") != self.adapter
        return other and (Path(str(self.args.output_dir)) / name).is_file()

    def _model_name(self) -> str:
        """What the training began with; of a fresh adapter over merged ones it is in no folder."""
        name, merged = self.option["model_name_or_path"], self.option["adapter_name_or_path"]
        return f"{name} with {' and '.join(merged)} merged" if self.option["create_new_adapter"] else name

    def _details(self) -> dict[str, Any]:
        """What summary.json says of model and data: more than the trainer knows."""
        option = self.option
        model: dict[str, Any] = {"name_or_path": self._model_name(), "revision": option["model_revision"]}
        model["trained_as"] = "lora" if self.adapter else "full"
        model |= {name: option[name] for name in MODEL_DETAILS if option[name]}
        if option["use_peft"]:
            names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
            model |= {name: option[name] for name in names}
        data: dict[str, Any] = {"name": ", ".join(dataset_names(option)), "eval_name": option["eval_dataset_name"]}
        data |= {name: option[name] for name in DATA_DETAILS if option[name] != DEFAULTS[name]}
        data["pairs_read"] = self.pairs_read
        data["tokenized"] = {name: report.as_dict() for name, report in self.trainer.tokenize_reports.items()}
        return {"model": model, "data": data}
