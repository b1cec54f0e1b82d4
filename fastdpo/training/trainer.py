"""`DPOTrainer`: transformers' `Trainer` with preference losses, a reference, metrics and crash-safe checkpoints."""

import logging
from contextlib import nullcontext
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import SaveStrategy

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.config.old_arguments import settled_arguments
from fastdpo.config.trackers import outlive_full_disk
from fastdpo.data.collate import REFERENCE_COLUMNS, UNPAIRED_REFERENCE_COLUMNS
from fastdpo.data.rows.sides import LABEL, MISMATCHED, SIDES, UNPAIRED
from fastdpo.data.tokenize_dataset import TokenizeReport
from fastdpo.files import check_output_dir
from fastdpo.losses.unpaired import UnpairedOptions
from fastdpo.models.forward import LogprobForward, model_call
from fastdpo.models.load import check_arguments, check_vocabulary, load_tokenizer, policy_to_train, router_loss_weight
from fastdpo.training import pair_datasets
from fastdpo.training.batches.layout import choose_layout
from fastdpo.training.batches.plan import TokenBatches, plan_batches, planned_loader
from fastdpo.training.checkpoints.run_facts import RunFacts
from fastdpo.training.checkpoints.run_lock import output_dir_locked
from fastdpo.training.checkpoints.trainer import CrashSafeTrainer
from fastdpo.training.objectives import AnswerObjective, PairObjective
from fastdpo.training.pair_datasets import PairDataset
from fastdpo.training.reference.base import FrozenModel, NoReference
from fastdpo.training.reference.choose import make_reference
from fastdpo.training.reference.precomputed import free_memory, precompute_for
from fastdpo.training.reference.saved import ReferenceFile
from fastdpo.training.report import metrics
from fastdpo.training.report.advice import Advisor
from fastdpo.training.report.eval_answers import answers_of
from fastdpo.training.report.metric_files import RUN_RECORD, MetricsReport
from fastdpo.training.report.model_card import card_of, write_card
from fastdpo.training.report.out_of_memory import MemoryWatch, explains_loading
from fastdpo.training.report.run_details import run_details
from fastdpo.training.report.speed import Stopwatch, speed_metrics
from fastdpo.training.trl_attributes import with_trl_attributes

logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


@with_trl_attributes
class DPOTrainer(CrashSafeTrainer):
    """Trains a causal language model on preference pairs; the constructor's order is TRL 1.16's.

    A training log has means over the window since the last one, over all processes. The last window is logged too, also
    where `logging_steps` does not divide the steps; with `logging_strategy="no"` its means are in the record at the end
    of training.

    Args:
        model: the policy: a path of a model or of a LoRA adapter, a loaded causal LM, or one with a PEFT adapter.
        ref_model: the reference, a path or a loaded model. Left out: see `make_reference`; without an adapter a
            frozen copy of the starting policy, with a fresh one the base model.
        args: a `DPOConfig`; left out, its defaults.
        data_collator: left out, `DataCollatorForPreference`.
        train_dataset, eval_dataset: preference pairs, or unpaired answers with a label for the losses of those (pairs
            are taken apart for them), in any format that `normalize_dataset` takes, or tokenized; `eval_dataset` may be
            a dict of them. An `IterableDataset` needs `args.max_steps`.
        processing_class: the tokenizer (`tokenizer=` is accepted too); left out, the model's own.
        compute_metrics: called after an evaluation with `predictions`, a dict of arrays (N,) over the rows (see
            `metrics.predictions`), and `label_ids` (N,): zeros for pairs, whose chosen answer is the right one; 1 for
            a desirable unpaired answer.
        peft_config: train a fresh adapter of this kind.
        old_arguments: what TRL's trainer took up to 0.15 (beta, max_length, ...), one log line for all.

    Attributes:
        reference_description, layout_description: one line each that says what the reference is, and how batches are
            laid out and why; reference_origin: the reference for a program (`Reference.origin`).
        tokenize_reports: counts of kept, dropped and truncated rows for each dataset.
        advisor: what was said about numbers out of their healthy range.
        report: writes the files in `dpo_metrics`; its `details` are what summary.json says beside the metrics.
        card_details: what the model card cannot know by itself: "data" (a list of names), "command", and "base" where
            the model has no name.

    Raises:
        ValueError, TypeError, DataError: one sentence each, before the weights are loaded where possible.
    """

    # Trainer divides the loss by the accumulation steps (before 5.19: model_accepts_loss_kwargs, below)
    loss_is_scaled_for_ga = False
    args: DPOConfig

    @explains_loading
    def __init__(
        self,
        model: str | Model,
        ref_model: str | Model | None = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: PairDataset | None = None,
        eval_dataset: PairDataset | dict[str, PairDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **old_arguments: Any,
    ) -> None:
        args = settled_arguments(args, old_arguments, DPOTrainer)
        if tokenizer is not None:
            logger.warning("tokenizer= is now processing_class=; using it.")
        check_arguments(model, ref_model, args)
        if args.should_save:
            check_output_dir(str(args.output_dir), "output_dir")
        self.tokenizer = load_tokenizer(processing_class or tokenizer, model, args)
        self.tokenize_reports: dict[str, TokenizeReport] = {}
        preparing = self.tokenizer, args, self.tokenize_reports
        train_pairs = pair_datasets.prepare_all(train_dataset, "train", *preparing)
        eval_pairs = pair_datasets.prepare_all(eval_dataset, "eval", *preparing)
        policy = policy_to_train(model, args, self.tokenizer, peft_config, quantization_config)
        self._router_loss_weight = router_loss_weight(policy, args)
        pair_datasets.check_all_token_ids(train_dataset, eval_dataset, policy.config.get_text_config().vocab_size)
        use_cache = policy.config.use_cache
        super().__init__(
            model=policy,
            args=args,
            data_collator=pair_datasets.collator_for(self.tokenizer, args) if data_collator is None else data_collator,
            train_dataset=train_pairs,
            eval_dataset=eval_pairs,
            processing_class=self.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            on_nan=args.on_nan,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, which would run nn.DataParallel; start "
                "with `accelerate launch` or `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        self.model_accepts_loss_kwargs = False
        # every call of ours says use_cache=False, so the config need not change
        self._use_cache = policy.config.use_cache = use_cache
        options = args.loss_options()
        unpaired = isinstance(options, UnpairedOptions)
        self._objective = AnswerObjective(options, self.accelerator) if unpaired else PairObjective(options)
        self._logprob_forward = LogprobForward(policy)
        self._reference = make_reference(
            policy,
            ref_model,
            args,
            lambda: self.accelerator.autocast(),
            created_adapter=peft_config is not None,
            sharded=self.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
        )
        models: list[tuple[nn.Module, LogprobForward]] = [(policy, self._logprob_forward)]
        if isinstance(self._reference, FrozenModel):
            check_vocabulary(self.tokenizer, cast(PreTrainedModel, self._reference.model), "reference")
            models.append((self._reference.model, self._reference.forward))
        self._layout = choose_layout(
            args,
            self.data_collator,
            data_collator is not None,
            list(pair_datasets.by_name(train_pairs, eval_pairs).values()),
            models,
            self._model_inputs,
            lambda: self.accelerator.autocast(),
            router_loss=bool(self._router_loss_weight),
            sharded=self.is_fsdp_enabled,
        )
        self.layout_description, self.data_collator = self._layout.description, self._layout.collator
        self._memory = MemoryWatch(args, isinstance(policy, PeftModel))
        if args.precompute_ref_log_probs and not isinstance(self._reference, NoReference):
            del models  # nothing is to keep the reference's model
            self._reference = precompute_for(self, self._reference, policy)
            free_memory()
        self.reference_description, self.reference_origin = self._reference.description, dict(self._reference.origin)
        if args.should_log:
            logger.warning(f"reference: {self.reference_description}.")
        self._metrics = metrics.MetricWindow(self.accelerator, self._objective.columns)
        self._batches = TokenBatches(
            self.accelerator, lambda: plan_batches(self.args, self.train_dataset, self.data_collator)
        )
        self._facts = RunFacts(policy, self.reference_origin)
        self.parts = [self._batches, self._facts, self._metrics]
        self.parts += [self._objective] if isinstance(self._objective, AnswerObjective) else []
        self.file_parts = [ReferenceFile(self._reference)]
        self._stopwatch = Stopwatch()
        self.advisor = Advisor(args)
        self.card_details: dict[str, Any] = {}
        self.report = MetricsReport(run_details(self))
        answers = answers_of(self, self.report.files, self._sharded)
        for callback in (*self._reference.callbacks(policy), self.advisor, self.report, *answers):
            self.add_callback(callback)

    def _model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return model_call(cast(dict, self._prepare_inputs(batch)))

    # training, in the order in which Trainer calls

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where checkpoints are saved, output_dir gets the final model or adapter and the tokenizer.

        Afterwards the policy's `forward` and `config.use_cache` are as they were found.

        Raises:
            FolderInUse: another run trains in output_dir.
        """
        with output_dir_locked(self.args, self):
            for callback in self.callback_handler.callbacks:
                outlive_full_disk(callback)
            self._facts.begin(self.args, self.train_dataset, self.eval_dataset)
            self._reference.policy_moves()
            self.report.began = False
            try:
                with self._memory.explained(), self._logprob_forward.installed():
                    output = super().train(*args, **kwargs)
            except BaseException:
                if self.report.began:  # else the files are of an earlier run
                    self.report.write(self.args, self.state)
                raise
            finally:
                self._stopwatch.stop()
            cast(Model, self._logprob_forward.model).config.use_cache = self._use_cache
            if self.args.save_strategy != SaveStrategy.NO:
                self.save_model()
        return output

    def _set_signature_columns_if_needed(self) -> None:
        # what Trainer would ask the model's signature for: the sampler reads the lengths, the collator the ids
        parts = ("prompt", *SIDES, *UNPAIRED, *(MISMATCHED + side for side in UNPAIRED))
        tokens = [f"{part}_{what}" for part in parts for what in ("ids", "mask")]
        reference = (*REFERENCE_COLUMNS, *UNPAIRED_REFERENCE_COLUMNS)
        self._signature_columns = [*tokens, LABEL, *reference, self.args.length_column_name]

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`; with `max_tokens_per_batch` the planned batches of this process."""
        plan = self._batches.plan()
        if plan is None:
            return super().get_train_dataloader()
        dataset = self._remove_unused_columns(cast(Any, self.train_dataset), description="training")
        loader = planned_loader(plan, dataset, self.data_collator, self.args, lambda: self.state.epoch or 0)
        return self._signals.spare(loader)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._stopwatch.run()
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._batches.begin_update(samples)
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of the batch's rows; with `return_outputs` also its (B, K) metric table."""
        training = cast(Model, self.model).training
        self._memory.at("training" if training else "evaluation", inputs, self.data_collator)
        call = model_call(inputs)
        router = {"output_router_logits": True} if self._router_loss_weight else {}
        policy_model = cast(Model, self.model)
        with self._logprob_forward.installed():
            # the reference goes first: the policy's activations are not in memory yet
            reference = self._objective.stored(inputs) or self._reference(policy_model, call)
            shift = self._objective.shift(
                inputs,
                policy=lambda others: model(**others)["logprob"],
                reference=lambda others: cast(Tensor, self._reference(policy_model, others)),
            )
            policy = model(**call, **router, logprob_stats=self._objective.statistics)
        losses, columns = cast(Any, self._objective)(inputs, policy, reference, shift, training)
        loss, aux_loss = losses.mean(), policy.get("aux_loss")
        if aux_loss is not None:
            added = self._router_loss_weight * aux_loss.to(loss.device)
            loss = loss + added
            columns |= {"loss": losses + added, "aux_loss": aux_loss.to(losses)}
        table = self._objective.columns.table(columns)
        if training:
            self._metrics.training.add(table)
            if self._batches.planned:
                loss = loss * self._batches.weight(len(table), self.current_gradient_accumulation_steps)
        else:
            # drops the rows that accelerate repeats to fill the last batch
            self._metrics.evaluation.add(cast(Tensor, self.accelerator.gather_for_metrics(table)))
        return (loss, table) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._memory.at_update()
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._memory.at_rest()
        # a pause waits for the device, so there is none in a step that only trains or logs
        away = self.control.should_evaluate or self.control.should_save
        with self._stopwatch.paused() if away else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; a training log gets the means since the last one, in the dict that is passed.

        The run's own record gets them where steps came after the last log, as TRL has it.
        """
        if "loss" in logs:
            # the loss is Trainer's: what was optimized, accumulation steps weighing the same
            logs.update({**self._window(), "loss": logs["loss"]})
        elif RUN_RECORD in logs:
            logs.update({name: value for name, value in self._window().items() if name != "loss"})
        super().log(logs, start_time)

    def _window(self) -> dict[str, float]:
        means, tokens = self._metrics.close()
        if not means:
            return {}
        speed = speed_metrics(self._stopwatch.lap(), tokens, self.accelerator)
        return {**means, **speed, "num_tokens": self._metrics.num_tokens}

    # evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; a dataset given here may hold text or messages."""
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self._tokenized(eval_dataset, metric_key_prefix, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """The metrics of `test_dataset`, which may hold text or messages, and its predictions (see the class)."""
        test_dataset = self._tokenized(test_dataset, metric_key_prefix, "test_dataset")
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _tokenized(self, dataset: PairDataset, name: str, argument: str) -> Any:
        dataset, self.tokenize_reports[name] = pair_datasets.prepare(dataset, name, self.tokenizer, self.args)
        self._layout.check(dataset, argument)
        return dataset

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._metrics.evaluation.clear()
        with self._memory.explained(), self._logprob_forward.installed():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._memory.at_rest()
        means = {f"{metric_key_prefix}_{name}": value for name, value in self._metrics.evaluated().items()}
        cast(dict, output.metrics).update(means)
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # Trainer's own computes a loss only where a batch has labels
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, table = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        columns = self._objective.columns
        return loss, cast(Any, metrics.predictions(columns, table)), metrics.labels(columns, table)

    # the model and its card

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; with the model's card where the folder is `args.output_dir`.

        Raises:
            CheckpointNotWritten: for an error of the disk; the card alone can be missing, with a log line.
        """
        super().save_model(output_dir, _internal_call)
        if not _internal_call and output_dir in (None, self.args.output_dir):
            try:
                self.create_model_card()
            except OSError as error:
                logger.warning(f"the model is saved, and its README.md cannot be written: {error.strerror or error}.")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **others: Any,
    ) -> None:
        """Write README.md in `args.output_dir`, on world process zero; a README.md of somebody's own stays.

        The arguments are TRL's; others: those of `Trainer.create_model_card`, by their names.
        """
        if self.is_world_process_zero():
            card = card_of(self, model_name, dataset_name, tags, **others)
            write_card(str(self.args.output_dir), card.text())
