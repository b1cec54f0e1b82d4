"""Batches by tokens: every pair once an epoch, as many batches in each, losses that are means over pairs."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.training.batches.plan import BatchPlan, PlannedBatches, TokenBatches, by_length, shuffled, tokens_of_pairs

TOKENS = torch.randint(3, 40, (57,), generator=torch.Generator().manual_seed(2)).tolist()


def ids(length: int, draw: torch.Generator) -> list[int]:
    return torch.randint(1, 61, (length,), generator=draw).tolist()


def pairs(count: int = 14) -> Dataset:
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(2, 12, (count, 3), generator=draw).tolist()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([{name: ids(n, draw) for name, n in zip(names, row, strict=True)} for row in sizes])


def make(folder: Path, callbacks: Any = None, train: Dataset | None = None, **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    config = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**config, **heads, initializer_range=0.3)).double()
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 61)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>")
    args = {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False}
    args |= {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
    return DPOTrainer(
        model,
        ref_model=LlamaForCausalLM(LlamaConfig(**config, **heads, initializer_range=0.2)).double(),
        args=DPOConfig(**{**args, **options}),
        train_dataset=pairs() if train is None else train,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("order", [shuffled(57, 3), by_length(TOKENS, 3, 4)], ids=["shuffled", "by length"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("processes", [1, 3])
def test_every_epoch_has_each_pair_once_in_as_many_batches(processes: int, padded: bool, order: Any) -> None:
    plan = BatchPlan(TOKENS, 90, 5, order, padded=padded, processes=processes, epochs=4)
    orders = []
    for epoch in range(4):
        batches = plan.batches(epoch)
        assert len(batches) == plan.length
        assert len(batches) % processes == 0
        assert sorted(index for batch in batches for index in batch) == list(range(57))
        for batch in batches:
            sizes = [TOKENS[index] for index in batch]
            assert 1 <= len(batch) <= 5
            assert (len(batch) * max(sizes) if padded else sum(sizes)) <= 90
        ranks = [list(PlannedBatches(plan, rank, lambda epoch=epoch: epoch)) for rank in range(processes)]
        assert all(len(rank) == plan.length // processes == len(PlannedBatches(plan, 0, int)) for rank in ranks)
        assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(57))
        orders.append(batches)
    assert orders[0] != orders[1]
    assert plan.batches(2) == orders[2]


def test_by_length_neighbours_are_alike() -> None:
    def spread(order: Any) -> int:
        return sum(abs(TOKENS[a] - TOKENS[b]) for a, b in itertools.pairwise(order))

    assert spread(by_length(TOKENS, 3, 4)(0)) < 0.2 * spread(shuffled(57, 3)(0))


def test_steps_are_covered_and_long_pairs_are_named() -> None:
    plan = BatchPlan(TOKENS, 30, 5, shuffled(57, 3), steps=100, accumulation=2)
    assert plan.epochs * plan.length / 2 >= 100
    assert max(len(batch) for batch in plan.batches(0) if max(TOKENS[i] for i in batch) > 30) == 1
    assert f"{sum(size > 30 for size in TOKENS)} pairs have more tokens than that" in str(plan)


def test_batches_that_are_not_even_over_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_batch 5 leaves almost every one of 7 pairs alone"):
        BatchPlan([5] * 7, 5, 4, shuffled(7, 0), processes=2)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_tokens_are_what_the_collator_makes(layout: str, mode: str) -> None:
    collator = DataCollatorForPreference(0, max_length=13, truncation_mode=mode, layout=layout)
    for row, tokens in zip(pairs(), tokens_of_pairs(pairs(), collator), strict=True):
        batch = collator([row])
        slots = batch["attention_mask"] if layout == "padded" else batch["documents"] >= 0
        # a few first tokens that sequences cut at different places share by chance are not counted on
        wanted = batch["input_ids"].numel() if layout == "padded" else int(slots.sum())
        assert tokens == wanted or (mode == "keep_end" and layout == "shared" and 0 < tokens - wanted < 3)


@pytest.mark.usefixtures("float64_stays")
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_an_update_is_the_mean_over_its_pairs(tmp_path: Path, layout: str) -> None:
    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters()}

    def gradients(**options: Any) -> tuple[dict[str, torch.Tensor], float, DPOTrainer]:
        callback = Gradients()
        trainer = make(tmp_path, [callback], max_steps=1, **options)
        trainer.train()
        return callback.found, trainer.state.log_history[0]["loss"], trainer

    whole, loss, _ = gradients(per_device_train_batch_size=14, batch_layout="padded")
    found, parts_loss, trainer = gradients(
        max_tokens_per_batch=70, gradient_accumulation_steps=30, batch_layout=layout, per_device_train_batch_size=14
    )
    sizes = {len(batch) for batch in trainer._batches.plan().batches(0)}
    assert len(sizes) > 1, "batches of one size would hide a wrong weight"
    assert parts_loss == pytest.approx(loss, rel=1e-9)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64_stays")
def test_weights_count_the_batches_that_trainer_divides_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are left where a subclass leaves some out."""
    weights: list[float] = []
    weigh = TokenBatches.weight

    def watched(self: TokenBatches, pairs: int, batches: int) -> Any:
        weights.append(weigh(self, pairs, batches))
        return weights[-1]

    class LeavesOut(DPOTrainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            samples, items = super().get_batch_samples(*args, **kwargs)
            return samples[:-1], items

    monkeypatch.setattr(TokenBatches, "weight", watched)
    trainer = make(tmp_path, max_steps=1, max_tokens_per_batch=70, gradient_accumulation_steps=3)
    trainer.__class__ = LeavesOut
    trainer.train()
    sizes = [len(batch) for batch in trainer._batches.plan().batches(0)[:3]]
    # the step comes after a third batch, of the next update
    assert weights[:2] == [2 * size / sum(sizes) for size in sizes[:2]]


class Killed(Exception):
    pass


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "sequential"])
def test_a_run_killed_inside_an_epoch_sees_every_pair_once(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KillAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == killed_at:
                raise Killed

    seen: list[tuple[int, ...]] = []
    compute_loss = DPOTrainer.compute_loss

    def watched(self: DPOTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sums = inputs["targets"].split(inputs["offsets"].diff().tolist())
        seen.extend(tuple(chosen.tolist()) for chosen in sums[: len(sums) // 2])
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "compute_loss", watched)
    options = {"max_tokens_per_batch": 60, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    options |= {"train_sampling_strategy": strategy}
    killed_at = 0
    whole = make(tmp_path / "whole", **options)
    whole.train()
    undisturbed, seen[:] = list(seen), []
    batches = whole._batches.plan().length
    killed_at = batches + batches // 2
    with pytest.raises(Killed):
        make(tmp_path / "run", [KillAt()], **options).train()
    # the step that was killed has no checkpoint, and is trained again
    again = len(whole._batches.plan().batches(1)[killed_at - batches - 1])
    before = seen[:-again]
    seen[:] = []
    resumed = make(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert [*before, *seen] == undisturbed
    counts = Counter(undisturbed)
    assert set(counts.values()) == {3}
    assert len(counts) == 14
    assert losses(resumed)[-batches:] == pytest.approx(losses(whole)[-batches:], rel=1e-12)


def losses(trainer: DPOTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_checkpoint_of_other_batches_is_refused(tmp_path: Path) -> None:
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    make(tmp_path, max_tokens_per_batch=60, **options).train()
    for other in ({"max_tokens_per_batch": 80}, {"max_tokens_per_batch": 60, "seed": 7}, {}):
        with pytest.raises(ValueError, match="the checkpoint's run went through other batches"):
            make(tmp_path, **{**options, "max_steps": 6, **other}).train(resume_from_checkpoint=True)


def test_grouping_by_its_older_name(tmp_path: Path) -> None:
    run = make(tmp_path, max_tokens_per_batch=60)
    run.args.group_by_length = True  # pyright: ignore[reportAttributeAccessIssue] a field of transformers 5.0
    plan = run._batches.plan()
    assert plan is not None
    assert plan.order(0) == by_length(plan.tokens, run.args.seed, 4)(0)
    assert plan.order(0) != shuffled(14, run.args.seed)(0)


def test_what_cannot_be_planned_is_named(tmp_path: Path) -> None:
    stream = make(tmp_path, train=pairs().to_iterable_dataset(), max_steps=2, max_tokens_per_batch=60)
    with pytest.raises(ValueError, match="needs a whole train_dataset"):
        stream.train()
    with pytest.raises(ValueError, match="auto_find_batch_size changes the pairs of a batch"):
        make(tmp_path, max_tokens_per_batch=60, auto_find_batch_size=True)
    with pytest.raises(ValueError, match="max_tokens_per_batch must be at least 2, got 1"):
        make(tmp_path, max_tokens_per_batch=1)
