"""One training run of the command: the trainer with its report, what it says, what it leaves behind."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from fastdpo.cli.checks import TrainingFailed
from fastdpo.cli.show import LogLines, ProgressBar, example_pair, result_text, say
from fastdpo.data.errors import DataError
from fastdpo.training.checkpoints import CheckpointError, resolve_resume
from fastdpo.training.config import DPOConfig
from fastdpo.training.report import MetricsReport
from fastdpo.training.trainer import DPOTrainer


@contextlib.contextmanager
def _said_already(name: str) -> Iterator[None]:
    """Hold back the warnings of one logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Session:
    """Builds the trainer (the model loads here) and says what will be trained.

    option: every argument by name, defaults filled in.
    """

    def __init__(
        self,
        args: DPOConfig,
        option: dict[str, Any],
        tokenizer: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        peft_config: Any,
    ) -> None:
        self.args, self.option, self.tokenizer = args, option, tokenizer
        self.given = {"train": len(train_dataset), "eval": len(eval_dataset) if eval_dataset is not None else None}
        resume = args.resume_from_checkpoint
        if isinstance(resume, str) and not (args.deepspeed or args.fsdp):
            # a broken checkpoint is named before the model loads
            resolve_resume(resume, str(args.output_dir), adapter=bool(option["use_peft"]))
        with _said_already("fastdpo.data.formats"):  # the trainer looks at the rows again
            self.trainer = DPOTrainer(
                option["model_name_or_path"],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                peft_config=peft_config,
            )
        # load_preferences gave a plain Dataset, and so does its tokenization
        self.pairs = cast(Dataset, self.trainer.train_dataset)
        self.main = self.trainer.is_world_process_zero()
        self.report = MetricsReport(self._details())
        for callback in (ProgressCallback, PrinterCallback):
            self.trainer.remove_callback(callback)
        if not args.disable_tqdm:
            self.trainer.add_callback(ProgressBar())
        self.trainer.add_callback(LogLines())
        self.trainer.add_callback(self.report)

    def train(self) -> str:
        """Train, save model or adapter, tokenizer and metric files; the result's text, "" on other processes."""
        trainer, args = self.trainer, self.args
        self._introduce()
        resume = args.resume_from_checkpoint
        try:
            trainer.train(resume_from_checkpoint=resume if resume else None)
            # without an evaluation during training the held-out pairs are scored once, at the end
            if trainer.eval_dataset is not None and args.eval_strategy == "no":
                trainer.evaluate()
            if args.save_strategy == "no":  # else the trainer has saved them
                trainer.save_model()
            self.report.write(args, trainer.state)
        except (DataError, CheckpointError, ImportError):  # a bad row or checkpoint, a package that an option needs
            raise
        except Exception as error:
            # the input was accepted, so this is no error of the command line even if it is a ValueError
            raise TrainingFailed from error
        if not self.main:
            return ""
        saved = "adapter" if self.option["use_peft"] else "model"
        return result_text(trainer.state, str(args.output_dir), len(self.pairs), saved) + "\n"

    def _introduce(self) -> None:
        if not self.main:
            return
        trainer = self.trainer
        say("first pair as it is trained on:")
        say(example_pair(self.tokenizer, trainer.data_collator, self.pairs[0]))
        stale = [name for name in ("model.safetensors", "adapter_model.safetensors") if self._is_stale(name)]
        if stale:
            say(f"{self.args.output_dir} holds {stale[0]} of another run, which stays beside the new files")

    def _is_stale(self, name: str) -> bool:
        """Whether an earlier run left weights of the other kind (model or adapter) in the output folder."""
        other = name.startswith("adapter") != self.option["use_peft"]
        return other and (Path(str(self.args.output_dir)) / name).is_file()

    def _details(self) -> dict[str, Any]:
        """What summary.json says besides the metrics."""
        option = self.option
        model: dict[str, Any] = {"name_or_path": option["model_name_or_path"], "revision": option["model_revision"]}
        model["trained_as"] = "lora" if option["use_peft"] else "full"
        if option["use_peft"]:
            names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
            model |= {name: option[name] for name in names}
        data: dict[str, Any] = {"name": option["dataset_name"], "eval_name": option["eval_dataset_name"]}
        data["pairs_read"] = self.given
        data["tokenized"] = {name: report.as_dict() for name, report in self.trainer.tokenize_reports.items()}
        return {"model": model, "data": data, "reference": self.trainer.reference_description}
