"""A Trainer whose batches have the layout that the run allows, and hold so many tokens instead of so many pairs."""

import logging
import math
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.models.forward import LogprobForward, unwrap_peft
from fastdpo.training.batches.layout import Data, Logprobs, check_given_layout, longest_sequence, settle_layout, window
from fastdpo.training.batches.plan import BatchPlan, PlannedBatches, by_length, shuffled, tokens_of_pairs
from fastdpo.training.checkpoints.folders import CheckpointError
from fastdpo.training.checkpoints.stop_signals import left_to_the_trainer
from fastdpo.training.metric_trainer import MetricTrainer
from fastdpo.training.reference.base import FrozenModel, Reference
from fastdpo.training.reference.precomputed import on_device
from fastdpo.training.reference_trainer import model_call

logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


class LayoutTrainer(MetricTrainer):
    """A subclass makes the policy and its log-prob forward, and calls `_set_layout` before `_set_reference`.

    Attributes:
        layout_description: one line that says the layout of the batches and why.
    """

    _router_loss_weight: float
    _plan: BatchPlan | None = None
    _window: int | None = None
    # where the collator cuts
    _max_length: int | None = None
    # pairs of all processes in the batches of one update
    _window_pairs: int | Tensor = 0

    def _set_layout(self, reference: Reference, own_collator: bool) -> None:
        args, policy, collator = self.args, cast(Model, self.model), self.data_collator
        if args.world_size > 1:
            # one process may have tried a forward for which the others do not hold the weights yet
            forwards = [self._logprob_forward, *([reference.forward] if isinstance(reference, FrozenModel) else [])]
            for forward, route in zip(forwards, broadcast_object_list([f.route for f in forwards]), strict=True):
                forward.route = route
        if own_collator:
            if args.batch_layout not in ("auto", "padded"):
                raise ValueError(
                    f"batch_layout {args.batch_layout!r} and a data_collator both say how batches are laid out; leave "
                    "one out, or pass DataCollatorForPreference(..., layout=...)."
                )
            self.layout_description = "as the given data_collator makes them"
            if not isinstance(collator, DataCollatorForPreference) or collator.layout == "padded":
                return
        models: list[tuple[nn.Module, LogprobForward]] = [(policy, self._logprob_forward)]
        if isinstance(reference, FrozenModel):
            models.append((reference.model, reference.forward))
        evals = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        datasets = [dataset for dataset in (self.train_dataset, *evals) if dataset is not None]
        collator = cast(DataCollatorForPreference, collator)
        self._max_length = collator.max_length
        data = Data.of(datasets, self._max_length)
        no_probe = "" if data.rows else "there is no whole dataset to look at"
        if self.is_fsdp_enabled or any(p.is_meta or p.numel() == 0 for p in policy.parameters()):
            no_probe = "the weights are split over processes"
        needs_padding = ""
        if self._router_loss_weight:
            needs_padding = "the router's auxiliary loss counts the tokens of padded rows"
        elif args.neftune_noise_alpha:
            needs_padding = "NEFTune scales its noise by the length of a row"
        with ExitStack() as stack:
            if not no_probe:
                for model, _ in models:
                    stack.enter_context(on_device(model, args.device))
            made = [
                Logprobs(*model, self._model_inputs, lambda: self.accelerator.autocast(), args.device)
                for model in models
            ]
            if own_collator:
                check_given_layout(collator, made, data, needs_padding, no_probe)
            else:
                self.data_collator, self.layout_description = settle_layout(
                    args.batch_layout, collator, made, data, needs_padding, no_probe, bool(args.torch_compile)
                )
        if self.accelerator.num_processes > 1 and not own_collator:
            # rounding may tell processes different things
            found = [self.data_collator, self.layout_description, self._logprob_forward.attention]
            self.data_collator, self.layout_description, attention = broadcast_object_list(found)
            for _, forward in models:
                forward.attention = attention
        if self.data_collator.layout != "padded":
            sizes = [window(cast(PreTrainedModel, unwrap_peft(model)).config.get_text_config()) for model, _ in models]
            self._window = min((size for size in sizes if size is not None), default=None)
        if args.should_log:
            logger.warning(f"batches: {self.layout_description}.")

    def _model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return model_call(cast(dict, self._prepare_inputs(batch)))

    def _check_window(self, dataset: Any, name: str) -> None:
        """Refuse a dataset, given after the layout was chosen, for which it would not be exact."""
        if self._window is None:
            return
        if isinstance(dataset, Dataset):
            longest = longest_sequence(dataset, self._max_length) if len(dataset) else 0
            what = f"has a sequence of {longest} tokens"
        else:
            longest = math.inf if self._max_length is None else self._max_length
            what = f"is a stream, whose sequences may have {longest} tokens"
        if longest > self._window:
            raise ValueError(
                f"{name} {what}, the model's attention reaches back {self._window} and batches are "
                f"{self.layout_description}, which is not exact then; use batch_layout='padded', or a max_length "
                "within the window."
            )

    # batches by tokens

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer.get_train_dataloader`; with `max_tokens_per_batch` the planned batches of this process."""
        plan = self._batch_plan()
        if plan is None:
            return super().get_train_dataloader()
        args = self.args
        dataset = self._remove_unused_columns(cast(Any, self.train_dataset), description="training")
        # the plan knows the processes, so the loader is not one that accelerate shards and evens out
        return DataLoader(
            cast(Any, dataset),
            batch_sampler=PlannedBatches(plan, args.process_index, lambda: math.floor(self.state.epoch or 0)),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(left_to_the_trainer, None),
        )

    def _batch_plan(self) -> BatchPlan | None:
        args = self.args
        if args.max_tokens_per_batch is None or self._plan is not None:
            return self._plan
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset) or dataset is None:
            raise ValueError("max_tokens_per_batch plans the batches of all epochs, which needs a whole train_dataset.")
        collator = self.data_collator
        pairs, seed = args.per_device_train_batch_size, args.seed if args.data_seed is None else args.data_seed
        if not isinstance(collator, DataCollatorForPreference):
            raise ValueError(
                f"max_tokens_per_batch needs to know how batches are made, and data_collator is a "
                f"{type(collator).__name__}; leave one out, or pass a DataCollatorForPreference."
            )
        tokens = tokens_of_pairs(cast(Dataset, dataset), collator)
        # the older of the transformers that this works with call it group_by_length
        strategy = getattr(args, "train_sampling_strategy", "random")
        strategy = "group_by_length" if getattr(args, "group_by_length", False) else strategy
        if strategy == "sequential":
            order: Any = lambda epoch: range(len(tokens))  # noqa: E731
        elif strategy == "random":
            order = shuffled(len(tokens), seed)
        else:
            order = by_length(tokens, seed, pairs)
        self._plan = BatchPlan(
            tokens,
            args.max_tokens_per_batch,
            pairs,
            order,
            padded=collator.layout == "padded",
            processes=args.world_size,
            epochs=args.num_train_epochs,
            steps=args.max_steps if args.max_steps > 0 else None,
            accumulation=args.gradient_accumulation_steps,
        )
        if args.should_log:
            logger.warning(f"max_tokens_per_batch: {self._plan}.")
        return self._plan

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self._plan is not None:
            pairs = sum(len(batch["lengths"]) // 2 for batch in samples)
            if self.args.world_size > 1:
                found = torch.tensor([pairs], device=self.args.device)
                self._window_pairs = cast(Tensor, self.accelerator.gather(found)).sum()
            else:
                self._window_pairs = pairs
        return samples, items

    def _window_weight(self, pairs: int) -> float | Tensor:
        """What makes a batch's mean over `pairs` its part of the mean over all pairs of an update.

        Trainer divides by the number of batches, and gradients are averaged over processes. 1 where every batch holds
        as many pairs (`per_device_train_batch_size`), as Trainer has it.
        """
        if self._plan is None:
            return 1.0
        return pairs * self.current_gradient_accumulation_steps * self.args.world_size / self._window_pairs

    def extra_state(self) -> dict[str, Any]:
        plan = self._batch_plan()
        return {**super().extra_state(), **({} if plan is None else {"batch_plan": plan.fingerprint()})}

    def load_extra_state(self, state: dict[str, Any] | None) -> None:
        plan = self._batch_plan()
        if state is not None and state.get("batch_plan") != (None if plan is None else plan.fingerprint()):
            raise CheckpointError(
                "cannot resume: the checkpoint's run went through other batches (max_tokens_per_batch, batch size, "
                "epochs, seed, processes, layout or data are different), so that pairs would be seen twice or never; "
                "go on with the arguments that it began with."
            )
        super().load_extra_state(state)
