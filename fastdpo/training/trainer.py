"""`DPOTrainer`: transformers' `Trainer` with DPO's loss, reference, metrics and crash-safe checkpoints."""

import logging
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import SaveStrategy

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.config.old_arguments import settled_arguments
from fastdpo.data.collate import REFERENCE_COLUMNS, DataCollatorForPreference
from fastdpo.data.tokenize_dataset import TokenizeReport
from fastdpo.data.tokenize_row import ID_COLUMNS, MASK_COLUMNS
from fastdpo.files import check_output_dir
from fastdpo.losses.from_tokens import pair_logps
from fastdpo.losses.preference import pair_losses
from fastdpo.models.adapters import choose_adapters
from fastdpo.models.forward import STATISTICS, LogprobForward
from fastdpo.models.load import (
    check_arguments,
    check_token_ids,
    check_vocabulary,
    disable_dropout,
    load_policy,
    load_tokenizer,
    router_loss_weight,
)
from fastdpo.training.bars import dataset_bars
from fastdpo.training.checkpoints.run_lock import output_dir_locked
from fastdpo.training.layout_trainer import LayoutTrainer
from fastdpo.training.pair_datasets import PairDataset, prepare_dataset
from fastdpo.training.reference.base import FrozenModel
from fastdpo.training.reference.choose import make_reference
from fastdpo.training.reference.precomputed import free_memory, stored_logps
from fastdpo.training.reference_trainer import model_call
from fastdpo.training.report import metrics
from fastdpo.training.report.out_of_memory import explains_loading

logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel

ARGUMENTS = (
    "model",
    "ref_model",
    "args",
    "data_collator",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "quantization_config",
    "peft_config",
)


class DPOTrainer(LayoutTrainer):
    """Trains a causal language model on preference pairs; the constructor's order is TRL 1.16's.

    Args:
        model: the policy: a path of a model or of a LoRA adapter, a loaded causal LM, or one with a PEFT adapter.
        ref_model: the reference, a path or a loaded model. Left out: see `make_reference`; without an adapter a
            frozen copy of the starting policy, with a fresh one the base model.
        args: a `DPOConfig`; left out, its defaults.
        data_collator: left out, `DataCollatorForPreference`.
        train_dataset, eval_dataset: preference pairs in any format that `normalize_dataset` takes, or
            tokenized; `eval_dataset` may be a dict of them. An `IterableDataset` needs `args.max_steps`.
        processing_class: the tokenizer (`tokenizer=` is accepted too); left out, the model's own.
        compute_metrics: called after an evaluation with `predictions`, a dict of arrays (N,) over the pairs (see
            `metrics.PREDICTIONS`), and `label_ids`, zeros (N,): the chosen answer is the right one.
        peft_config: train a fresh adapter of this kind.
        old_arguments: what TRL's trainer took up to 0.15 (beta, max_length, ...), one log line for all.

    Attributes:
        reference_description: one line that says what the reference is.
        tokenize_reports: counts of kept, dropped and truncated rows for each dataset.

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
        args = settled_arguments(args, old_arguments, ARGUMENTS)
        if tokenizer is not None:
            logger.warning("tokenizer is processing_class today; taken as that.")
        check_arguments(model, ref_model, args)
        if args.should_save:
            check_output_dir(str(args.output_dir), "output_dir")
        self.tokenizer = load_tokenizer(processing_class or tokenizer, model, args)
        self.tokenize_reports: dict[str, TokenizeReport] = {}
        evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        given: dict[str, Any] = {"train_dataset": train_dataset, **evals}
        if train_dataset is not None:
            train_dataset = self._prepare_dataset(train_dataset, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: self._prepare_dataset(v, args, k) for k, v in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, args, "eval")
        own_collator = data_collator is not None
        if data_collator is None:
            data_collator = DataCollatorForPreference(
                pad_token_id=cast(int, self.tokenizer.pad_token_id),
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_to_multiple_of=cast("int | None", args.pad_to_multiple_of),
            )

        policy = load_policy(model, args, peft_config, quantization_config)
        choose_adapters(policy, args)
        check_vocabulary(self.tokenizer, policy)
        self._router_loss_weight = router_loss_weight(policy, args)
        for name, dataset in given.items():
            check_token_ids(dataset, policy.config.get_text_config().vocab_size, name)
        if args.disable_dropout:
            disable_dropout(policy)
        self._use_cache = policy.config.use_cache
        checkpointing = cast("dict[str, Any]", args.gradient_checkpointing_kwargs or {})
        if isinstance(policy, PeftModel) and checkpointing.get("use_reentrant"):
            # re-entrant checkpointing drops the gradient where no input of a block asks for one
            policy.enable_input_require_grads()
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator,
            train_dataset=cast(Any, train_dataset),
            eval_dataset=cast(Any, eval_dataset),
            processing_class=self.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, which would run nn.DataParallel; start "
                "with `accelerate launch` or `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        # every call of ours says use_cache=False, so the config need not change
        policy.config.use_cache = self._use_cache
        self.model_accepts_loss_kwargs = False
        self._logprob_forward = LogprobForward(policy)
        reference = make_reference(
            policy,
            ref_model,
            args,
            lambda: self.accelerator.autocast(),
            created_adapter=peft_config is not None,
            sharded=self.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
        )
        if isinstance(reference, FrozenModel):
            check_vocabulary(self.tokenizer, cast(PreTrainedModel, reference.model), "reference")
        self._set_layout(reference, own_collator)
        self._set_reference(reference)
        if args.precompute_ref_log_probs:
            free_memory()
        self._loss_options = args.loss_options()
        self._statistics = STATISTICS + (("log_sum_sq_probs",) if args.use_weighting else ())
        self._start_metrics()
        self._answer_evaluations()

    def _prepare_dataset(self, dataset: PairDataset, args: DPOConfig, name: str) -> PairDataset:
        with dataset_bars(shown=not args.disable_tqdm):
            dataset, self.tokenize_reports[name] = prepare_dataset(dataset, self.tokenizer, args, name)
        return dataset

    # what Trainer would ask the model's signature for

    def _set_signature_columns_if_needed(self) -> None:
        # the sampler reads the lengths, the collator the ids
        self._signature_columns = [*ID_COLUMNS, *MASK_COLUMNS, *REFERENCE_COLUMNS, self.args.length_column_name]

    # the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of the batch's pairs; with `return_outputs` also its (B, K) metric table."""
        training = cast(Model, self.model).training
        self._memory.at("training" if training else "evaluation", inputs)
        call = model_call(inputs)
        router = {"output_router_logits": True} if self._router_loss_weight else {}
        with self._logprob_forward.installed():
            # the reference goes first: the policy's activations are not in memory yet
            reference = stored_logps(inputs) or self._reference(cast(Model, self.model), call)
            policy = model(**call, **router, logprob_stats=self._statistics)
        offsets = inputs["offsets"].to(policy["logprob"].device)
        logps = pair_logps(policy, reference, offsets, self._loss_options)
        output = pair_losses(logps, self._loss_options)
        loss = output.losses.mean()
        weight, aux_loss = self._router_loss_weight, policy.get("aux_loss")
        if aux_loss is not None:
            loss = loss + weight * aux_loss.to(loss.device)
        lengths = inputs["lengths"] if "lengths" in inputs else inputs["attention_mask"].sum(1)
        table = metrics.batch_table(output, logps, policy, offsets, lengths, aux_loss, weight)
        if training:
            self._sums["train"].add(table)
            loss = loss * self._window_weight(len(table))
        else:
            # drops the pairs that accelerate repeats to fill the last batch
            self._sums["eval"].add(cast(Tensor, self.accelerator.gather_for_metrics(table)))
        return (loss, table) if return_outputs else loss

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
        return loss, cast(Any, metrics.predictions(table)), torch.zeros_like(table[:, 0], dtype=torch.long)

    # metrics

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; a dataset given here may hold text or messages."""
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self._prepare_dataset(eval_dataset, self.args, metric_key_prefix)
            self._check_window(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """The metrics of `test_dataset`, which may hold text or messages, and its predictions (see the class)."""
        test_dataset = self._prepare_dataset(test_dataset, self.args, metric_key_prefix)
        self._check_window(test_dataset, "test_dataset")
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    # training and resuming

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where checkpoints are saved, output_dir gets the final model or adapter and the tokenizer.

        Afterwards the policy's `forward` and `config.use_cache` are as they were found.

        Raises:
            FolderInUse: another run trains in output_dir.
        """
        with output_dir_locked(self.args, self):
            with self._logprob_forward.installed():
                output = super().train(*args, **kwargs)
            cast(Model, self._logprob_forward.model).config.use_cache = self._use_cache
            if self.args.save_strategy != SaveStrategy.NO:
                self.save_model()
        return output
