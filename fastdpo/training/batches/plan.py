"""Batches of pairs under a budget of tokens: as many in each epoch, the same for the same seed on any number of starts.

Trainer reads the number of batches of an epoch once. So the epochs of a run are planned together: the one that needs
most batches sets the number, and the others split their largest.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.rows.sides import LABEL, id_columns
from fastdpo.data.tokenize_row import common_prefix_length
from fastdpo.training.checkpoints.folders import CheckpointError

logger = logging.getLogger(__name__)

Order = Callable[[int], Sequence[int]]
Batch = list[int]


class BatchPlan:
    """The batches of each epoch of a run, for all processes.

    Args:
        tokens: the tokens of each pair (see `tokens_of_pairs`).
        budget: tokens of a batch at most; a pair that has more is a batch of its own.
        padded: a batch takes the room of its longest pair for each of its pairs.
        pairs: pairs of a batch at most.
        order: epoch -> the order in which pairs are visited.
        processes: the number of batches is a multiple of it.
        epochs: how many epochs, where `steps` is None.
        steps: update steps of `accumulation` batches from each process; epochs follow until there are so many.

    Raises:
        ValueError: the batches cannot be split into as many for each process.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        budget: int,
        pairs: int,
        order: Order,
        padded: bool = False,
        processes: int = 1,
        epochs: float = 1,
        steps: int | None = None,
        accumulation: int = 1,
    ) -> None:
        self.tokens, self.budget, self.pairs, self.order = tokens, budget, pairs, order
        self.padded, self.processes = padded, processes
        self.length, done = 0, 0
        while (self._updates(accumulation) * done < steps) if steps is not None else done < epochs:
            needed = math.ceil(len(self._filled(order(done))) / processes) * processes
            self.length = max(self.length, needed)
            done += 1
            if self.length > len(tokens):
                raise ValueError(
                    f"max_tokens_per_batch {budget} leaves almost every one of {len(tokens)} pairs alone in its batch, "
                    f"and so many batches are not even over {processes} processes; raise it, or use "
                    "per_device_train_batch_size=1 instead."
                )
        self.epochs = done

    def _updates(self, accumulation: int) -> int:
        return math.ceil(self.length / self.processes / accumulation)

    def batches(self, epoch: int) -> list[Batch]:
        """The batches of an epoch: each pair once, every batch within the limits, `length` of them."""
        batches = self._filled(self.order(epoch))
        while len(batches) < self.length:
            largest = max(range(len(batches)), key=lambda index: len(batches[index]))
            whole = batches[largest]
            batches[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
        return batches

    def _filled(self, order: Sequence[int]) -> list[Batch]:
        batches: list[Batch] = []
        for index in order:
            if not batches or len(batches[-1]) == self.pairs or self._room([*batches[-1], index]) > self.budget:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _room(self, batch: Batch) -> int:
        sizes = [self.tokens[index] for index in batch]
        return len(sizes) * max(sizes) if self.padded else sum(sizes)

    def __str__(self) -> str:
        alone = sum(size > self.budget for size in self.tokens)
        over = f"; {alone} pairs have more tokens than that, each a batch of its own" if alone else ""
        mean = len(self.tokens) / self.length
        return f"{self.length} batches an epoch of up to {self.budget} tokens, {mean:.1f} pairs in the mean{over}"

    def fingerprint(self) -> str:
        """Differs where a resumed run would see other batches."""
        limits = [self.budget, self.pairs, self.padded, self.processes, self.length]
        text = json.dumps([list(self.tokens), list(self.order(0)), limits])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class PlannedBatches(Sampler[Batch]):
    """One process's batches of the epoch that `epoch()` says; a new order with each."""

    def __init__(self, plan: BatchPlan, process: int, epoch: Callable[[], int]) -> None:
        self.plan, self.process, self.epoch = plan, process, epoch

    def __iter__(self) -> Iterator[Batch]:
        yield from self.plan.batches(self.epoch())[self.process :: self.plan.processes]

    def __len__(self) -> int:
        return self.plan.length // self.plan.processes


def shuffled(size: int, seed: int) -> Order:
    """A random order for each epoch."""

    def order(epoch: int) -> list[int]:
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch)).tolist()

    return order


def by_length(lengths: Sequence[int], seed: int, pairs: int) -> Order:
    """Random orders in which neighbours are of like length: each stretch of 50 batches is sorted, longest first."""

    def order(epoch: int) -> list[int]:
        mixed = shuffled(len(lengths), seed)(epoch)
        stretch = 50 * pairs
        parts = [mixed[start : start + stretch] for start in range(0, len(mixed), stretch)]
        return [index for part in parts for index in sorted(part, key=lambda index: -lengths[index])]

    return order


def tokens_of_pairs(dataset: Dataset, collator: DataCollatorForPreference) -> list[int]:
    """The slots that each row's own sequences take in the collator's layout, after its cut; padding of rows aside."""
    tokens, columns = [], id_columns(dataset.column_names)
    for row in cast("Any", dataset.select_columns(columns)):
        prompt, *completions = (row[name] for name in columns)
        both = [len(prompt) + len(completion) for completion in completions]
        limit = collator.max_length or max(both)
        kept = [min(length, limit) for length in both]
        if collator.layout == "padded":
            tokens.append(len(kept) * max(kept))
            continue
        shared = 0
        if collator.layout == "shared":
            shared = len(prompt) + common_prefix_length(*completions)
            if collator.truncation_mode == "keep_end":
                # what is cut off in front must be as long for both
                cuts = [length - keep for length, keep in zip(both, kept, strict=True)]
                shared = max(shared - cuts[0], 0) if cuts[0] == cuts[1] else 0
            shared = min(shared, *kept)
        tokens.append(sum(kept) - shared)
    return tokens


def plan_batches(args: DPOConfig, dataset: Any, collator: Any) -> BatchPlan | None:
    """The plan of `max_tokens_per_batch`, None without it.

    Raises:
        ValueError: for a stream, and for a collator that is not known.
    """
    if args.max_tokens_per_batch is None:
        return None
    if isinstance(dataset, IterableDataset) or dataset is None:
        raise ValueError("max_tokens_per_batch plans the batches of all epochs, which needs a whole train_dataset.")
    if not isinstance(collator, DataCollatorForPreference):
        raise ValueError(
            f"max_tokens_per_batch needs to know how batches are made, and data_collator is a "
            f"{type(collator).__name__}; leave one out, or pass a DataCollatorForPreference."
        )
    pairs, seed = args.per_device_train_batch_size, args.seed if args.data_seed is None else args.data_seed
    tokens = tokens_of_pairs(cast(Dataset, dataset), collator)
    # the older of the transformers that this works with call it group_by_length
    strategy = getattr(args, "train_sampling_strategy", "random")
    strategy = "group_by_length" if getattr(args, "group_by_length", False) else strategy
    if strategy == "sequential":
        order: Order = lambda epoch: range(len(tokens))  # noqa: E731
    elif strategy == "random":
        order = shuffled(len(tokens), seed)
    else:
        order = by_length(tokens, seed, pairs)
    plan = BatchPlan(
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
        logger.warning(f"max_tokens_per_batch: {plan}.")
    return plan


def planned_loader(
    plan: BatchPlan, dataset: Any, collator: Any, args: DPOConfig, epoch: Callable[[], float]
) -> DataLoader:
    """This process's batches. The plan knows the processes, so the loader is not one that accelerate shards."""
    return DataLoader(
        dataset,
        batch_sampler=PlannedBatches(plan, args.process_index, lambda: math.floor(epoch())),
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


class TokenBatches:
    """The planned batches of a run, where it has any: a `Part` of its checkpoints, and what a batch's mean weighs.

    plan: makes the plan, once it is needed; None where the run has none.
    """

    def __init__(self, accelerator: Accelerator, plan: Callable[[], BatchPlan | None]) -> None:
        self.accelerator, self._make = accelerator, plan
        self._plan: BatchPlan | None = None
        # of one update, over all processes
        self._pairs: int | Tensor = 0

    def plan(self) -> BatchPlan | None:
        if self._plan is None:
            self._plan = self._make()
        return self._plan

    @property
    def planned(self) -> bool:
        """Whether batches differ in size, and so weigh differently."""
        return self._plan is not None

    def begin_update(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """This process's batches of the next update."""
        if not self.planned:
            return
        self._pairs = sum(len(batch["lengths"]) // (1 if LABEL in batch else 2) for batch in batches)
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([self._pairs], device=self.accelerator.device)
            self._pairs = cast(Tensor, self.accelerator.gather(mine)).sum()

    def weight(self, pairs: int, batches: int) -> float | Tensor:
        """What makes a batch's mean over `pairs` its part of the mean over all pairs of an update.

        Trainer divides by the number of this process's `batches` in it, and gradients are averaged over processes.
        """
        return pairs * batches * self.accelerator.num_processes / self._pairs

    def state_dict(self) -> dict[str, Any]:
        plan = self.plan()
        return {} if plan is None else {"batch_plan": plan.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Raises CheckpointError where the checkpoint's run went through other batches."""
        if state is not None and state.get("batch_plan") != self.state_dict().get("batch_plan"):
            raise CheckpointError(
                "cannot resume: the checkpoint's run went through other batches (max_tokens_per_batch, batch size, "
                "epochs, seed, processes, layout or data are different), so that pairs would be seen twice or never; "
                "go on with the arguments that it began with."
            )
