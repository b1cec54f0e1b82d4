"""A Trainer that logs DPO's metrics, gives advice on them, writes their files, and says them in the model card."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy

from fastdpo.config.checks import outlive_full_disk
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.files import cut_model_links
from fastdpo.models.adapters import trained_adapter
from fastdpo.training.checkpoints.folders import model_or_sentence
from fastdpo.training.checkpoints.step_watch import NotFiniteError
from fastdpo.training.reference_trainer import ReferenceTrainer
from fastdpo.training.report import metrics
from fastdpo.training.report.advice import Advisor
from fastdpo.training.report.eval_answers import EvaluationAnswers
from fastdpo.training.report.metric_files import RUN_RECORD, MetricsReport
from fastdpo.training.report.model_card import Card, hub_names, write_card
from fastdpo.training.report.run_details import run_details
from fastdpo.training.report.speed import Stopwatch, peak_memory_gb

logger = logging.getLogger(__name__)


class MetricTrainer(ReferenceTrainer):
    """A training log has means over the window since the last one, over all processes.

    The last window is logged too, also where `logging_steps` does not divide the steps; with `logging_strategy="no"`
    its means are in the record at the end of training. A subclass calls `_start_metrics` and adds each batch's table to
    `_sums`.

    Attributes:
        advisor: what was said about numbers out of their healthy range.
        report: writes the files in `dpo_metrics`; its `details` are what summary.json says beside the metrics.
        card_details: what the model card cannot know by itself: "data" (a list of names), "command", and "base" where
            the model has no name.
    """

    args: DPOConfig

    def _start_metrics(self) -> None:
        self._sums = {"train": metrics.MetricSums(), "eval": metrics.MetricSums()}
        self._num_tokens = 0
        # of steps before a checkpoint that this process did not run: no part of its speed
        self._tokens_before = 0
        self._stopwatch = Stopwatch()
        self.card_details: dict[str, Any] = {}
        self.advisor = Advisor(self.args)
        self.add_callback(self.advisor)
        self.report = MetricsReport(run_details(self))
        self.add_callback(self.report)

    def _answer_evaluations(self) -> None:
        """The callback of `generate_during_eval`; whole weights only."""
        if not self.args.generate_during_eval:
            return
        dataset = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, dict) else self.eval_dataset
        if not isinstance(dataset, Dataset) or self._sharded:
            why = "FSDP and DeepSpeed split the weights" if self._sharded else "there is no whole eval_dataset"
            logger.warning(f"generate_during_eval is not used: {why}.")
            return
        self.add_callback(EvaluationAnswers(self.model, self.tokenizer, dataset, self._reference, self.report.files))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._memory.at_rest()
        if self.control.should_training_stop and self.args.logging_strategy != IntervalStrategy.NO:
            # else the steps since the last log are in no record (a step that was logged is not logged again); a run
            # that a signal ends keeps them in its checkpoint, and logs them when the window is full
            self.control.should_log = self.control.should_log or not self._signals.stopping
        # a pause waits for the device, so there is none in a step that only trains or logs
        away = self.control.should_evaluate or self.control.should_save
        with self._stopwatch.paused() if away else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._stopwatch.run()
        return super().get_batch_samples(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        for callback in self.callback_handler.callbacks:
            outlive_full_disk(callback)
        self.report.began = False
        try:
            with self._memory.explained():
                return super().train(*args, **kwargs)
        except NotFiniteError:
            # the window in which it happened is worth most of all; all processes are here
            loss, steps = getattr(self, "_tr_loss", None), self.state.global_step - self._globalstep_last_logged
            if loss is not None and steps > 0:
                self.log({"loss": loss.item() / steps})
            self.report.write(self.args, self.state)
            raise
        except BaseException:
            if self.report.began:  # else the files are of an earlier run
                self.report.write(self.args, self.state)
            raise
        finally:
            self._stopwatch.stop()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._memory.at_update()
        return loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        sums = self._sums["eval"]
        sums.clear()
        with self._memory.explained(), self._logprob_forward.installed():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._memory.at_rest()
        # the loss too: Trainer's mean counts the pairs that fill the last batch of several processes
        found = metrics.averages(sums.tensor(self.args.device).tolist())
        found |= metrics.margin_quantiles(sums.margins(self.args.device))
        cast(dict, output.metrics).update({f"{metric_key_prefix}_{k}": v for k, v in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; a training log gets the means since the last one, in the dict that is passed.

        The run's own record gets them where steps came after the last log, as TRL has it.
        """
        if "loss" in logs:
            # the loss is Trainer's: what was optimized, accumulation steps weighing the same
            logs.update({**self._window_metrics(), "loss": logs["loss"]})
        elif RUN_RECORD in logs:
            logs.update({name: value for name, value in self._window_metrics().items() if name != "loss"})
        super().log(logs, start_time)

    def _window_metrics(self) -> dict[str, float]:
        """The means since the last log, which this ends; {} where no step was trained."""
        totals, margins = self._train_totals(), self._train_margins()
        self._sums["train"].clear()
        found = metrics.averages(totals)
        if not found:
            return {}
        tokens = int(totals[metrics.COLUMNS.index("num_tokens")])
        self._num_tokens += tokens
        found |= {**metrics.margin_quantiles(margins), **self._speed(tokens)}
        return {**found, "num_tokens": self._num_tokens}

    def _speed(self, tokens: int) -> dict[str, float]:
        """Tokens of all processes per second of training, and the largest peak memory among them."""
        tokens, self._tokens_before = tokens - self._tokens_before, 0
        seconds = self._stopwatch.lap()
        peak = torch.tensor([peak_memory_gb(self.args.device)], dtype=torch.float32, device=self.args.device)
        found = {"peak_memory_gb": round(cast(Tensor, self.accelerator.gather(peak)).max().item(), 4)}
        return {"tokens_per_second": round(tokens / seconds, 2), **found} if seconds > 0 else found

    def _train_totals(self) -> list[float]:
        sums = self._sums["train"].tensor(self.args.device)
        return cast(Tensor, self.accelerator.reduce(sums.clone(), reduction="sum")).tolist()

    def _train_margins(self) -> Tensor:
        """The window's margins of all processes; NaN where one has fewer than another."""
        margins = self._sums["train"].margins(self.args.device)
        padded = self.accelerator.pad_across_processes(margins, pad_index=cast(int, float("nan")))
        return cast(Tensor, self.accelerator.gather(cast(Tensor, padded)))

    def extra_state(self) -> dict[str, Any]:
        return {
            **super().extra_state(),
            "num_tokens": self._num_tokens,
            "metric_sums": self._train_totals(),
            "margins": self._train_margins().tolist(),
        }

    def load_extra_state(self, state: dict[str, Any] | None) -> None:
        super().load_extra_state(state)
        self._num_tokens = state["num_tokens"] if state else 0
        self._tokens_before = 0
        self._sums["train"].clear()
        if state:
            self._tokens_before = int(state["metric_sums"][metrics.COLUMNS.index("num_tokens")])
            # the sums of all processes go on in one of them
            if self.args.process_index == 0:
                self._sums["train"].load(state["metric_sums"], state["margins"], self.args.device)

    # the model card

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; with the model's card where the folder is `args.output_dir`.

        Raises:
            CheckpointNotWritten: for an error of the disk; the card alone can be missing, with a log line.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        with model_or_sentence(str(output_dir or self.args.output_dir)):
            if self.args.should_save:
                cut_model_links(str(output_dir or self.args.output_dir))
            super().save_model(output_dir, _internal_call)
        if output_dir in (None, self.args.output_dir):
            try:
                self.create_model_card()
            except OSError as error:
                logger.warning(f"the model is saved, and its README.md cannot be written: {error.strerror or error}.")

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md in `args.output_dir`, on world process zero; a README.md of somebody's own stays.

        The arguments are those of `Trainer.create_model_card`; `tasks` names the pipeline, `dataset_args` is not used.
        """
        if not self.is_world_process_zero():
            return
        model: Any = self.accelerator.unwrap_model(cast(Any, self.model))
        adapter = isinstance(model, PeftModel)
        base = model.peft_config[trained_adapter(model)].base_model_name_or_path if adapter else model.name_or_path
        data = _listed(dataset) or _listed(dataset_tags) or self.card_details.get("data")
        extra = {"language": language, "license": license, "pipeline_tag": (_listed(tasks) or ["text-generation"])[0]}
        folder = str(self.args.output_dir)
        card = Card(
            name=model_name or Path(self.args.hub_model_id or folder).resolve().name,
            is_adapter=adapter,
            base=finetuned_from or base or self.card_details.get("base"),
            data=data or hub_names(self.train_dataset),
            pairs=len(cast(Any, self.train_dataset)) if hasattr(self.train_dataset, "__len__") else None,
            reference=self.reference_description,
            args=self.args,
            steps=self.state.global_step,
            logs=self.state.log_history,
            command=self.card_details.get("command"),
            tags=_listed(tags),
            extra={name: value for name, value in extra.items() if value is not None},
        )
        write_card(folder, card.text())


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
