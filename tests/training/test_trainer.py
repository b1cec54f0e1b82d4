"""DPOTrainer on a tiny model: its loss, metrics, reference and saved files, and the Trainer's known traps."""

import gc
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    TrainerCallback,
)

from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.models.adapters import adapter_off
from fastdpo.training.reference.base import FrozenModel
from fastdpo.training.reference.inside_policy import AdapterOff
from fastdpo.training.trainer import DPOTrainer
from tiny_runs import lora, make, model, pairs

PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
METRICS = (
    *PAIR_METRICS,
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
)


def train_logs(trainer: DPOTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def first_batch(trainer: DPOTrainer) -> dict[str, Tensor]:
    """As padded rows, which the definitions below take to the model's own forward."""
    usual, trainer.data_collator = trainer.data_collator, replace(trainer.data_collator, layout="padded")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.data_collator = usual
    return batch


# the loss


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("policy", [model, lambda: model(attention_dropout=0.5)], ids=["plain", "dropout"])
def test_first_loss_is_ln_2_to_the_last_bit(tmp_path: Path, peft: bool, policy: Any) -> None:
    trainer = make(tmp_path, policy(), peft_config=lora(lora_dropout=0.5) if peft else None)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    assert torch.equal(loss.detach(), torch.tensor(math.log(2)))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.model.parameters())


def test_loss_and_metrics_equal_the_definition(tmp_path: Path) -> None:
    reference = model(initializer_range=0.3)
    trainer = make(tmp_path, ref_model=reference, beta=0.3, per_device_train_batch_size=4)
    batch = first_batch(trainer)
    trainer.model.eval()
    loss, _ = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    trainer.log({"loss": 0.0})

    def sums(policy: Any) -> tuple[Tensor, Tensor]:
        logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scored = logits.flatten(0, 1)[batch["rows"]].log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
        total = torch.stack([part.sum() for part in scored.split(batch["offsets"].diff().tolist())])
        chosen, rejected = total.chunk(2)
        return chosen, rejected

    (chosen, rejected), (ref_chosen, ref_rejected) = sums(trainer.model), sums(reference)
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(margin).mean())
    metrics = trainer.evaluate(pairs())
    assert {f"eval_{name}" for name in METRICS} <= metrics.keys()


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.usefixtures("float64_stays")
def test_accumulation_is_one_batch_in_float64(tmp_path: Path, peft: bool) -> None:
    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}

    class WithLabels(DataCollatorForPreference):
        def __call__(self, examples: Any) -> dict[str, Tensor]:
            batch = super().__call__(examples)
            return {**batch, "labels": batch["input_ids"]}

    def gradients(size: int, steps: int, collator: Any = None) -> dict[str, Tensor]:
        callback = Gradients()
        policy = model().double()
        if peft:
            policy = get_peft_model(policy, lora(), autocast_adapter_dtype=False).double()
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(3))
        trainer = make(
            tmp_path,
            policy,
            train=pairs(4),
            ref_model=model(initializer_range=0.3).double(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            callbacks=[callback],
            data_collator=collator,
        )
        trainer.train()
        return callback.found

    whole = gradients(4, 1)
    # a batch with labels: Trainer would count their tokens and scale loss and gradients by the steps
    for parts in (gradients(1, 4), gradients(1, 4, WithLabels(pad_token_id=0))):
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            assert gradient.dtype == torch.float64
            torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-9)


def test_batches_have_no_labels(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert "labels" not in first_batch(trainer)
    trainer._set_signature_columns_if_needed()
    assert "labels" not in trainer._signature_columns


def test_aggregate_mean_takes_averages_in_the_loss(tmp_path: Path) -> None:
    logged = []
    for aggregate in ("sum", "mean"):
        trainer = make(tmp_path, train=pairs(2), max_steps=3, aggregate=aggregate)
        lengths = first_batch(trainer)["offsets"].diff()
        trainer.train()
        logged.append(train_logs(trainer))
    assert len(set(lengths.tolist())) > 1
    batch = first_batch(make(tmp_path, train=pairs(2), max_steps=1))
    policy = model()
    logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    scored = logits.flatten(0, 1)[batch["rows"]].log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    parts = scored.split(lengths.tolist())
    # logps are sums whatever the loss does with them
    for line in (logged[0][0], logged[1][0]):
        assert line["logps/chosen"] == pytest.approx(float(sum(p.sum() for p in parts[:2]) / 2), rel=1e-5)
    # rewards are the loss's own: after a step about a completion's length apart
    ratio = logged[0][1]["rewards/margins"] / logged[1][1]["rewards/margins"]
    assert 0.5 * min(lengths) < ratio < 2 * max(lengths)


@pytest.mark.parametrize("loss", ["hinge", "simpo", "orpo", "kto_pair", ["sigmoid", "ipo"], ["sigmoid", "sft"]])
def test_every_loss_trains(tmp_path: Path, loss: Any) -> None:
    trainer = make(tmp_path, loss_type=loss, max_steps=8, num_train_epochs=1)
    trainer.train()
    logs = train_logs(trainer)
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"]
    # where the reference is the start, nothing is preferred yet
    assert (logs[0]["rewards/margins"] == 0.0) == (loss not in ("simpo", "orpo"))
    assert all(math.isfinite(line["loss"]) for line in logs)


@pytest.mark.parametrize("peft", [False, True])
def test_checkpointing_changes_no_number(tmp_path: Path, peft: bool) -> None:
    runs = []
    for options in ({}, {"gradient_checkpointing": True}, {"reentrant": True}):
        if options.pop("reentrant", False):
            kwargs = {"use_reentrant": True}
            options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
        trainer = make(tmp_path, peft_config=lora() if peft else None, **options)
        trainer.train()
        runs.append([line["loss"] for line in train_logs(trainer)])
    assert runs[0][-1] != runs[0][0]
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)
    assert runs[2] == pytest.approx(runs[0], rel=1e-6)


# metrics


def test_logged_means_cover_the_window(tmp_path: Path) -> None:
    def run(**options: Any) -> list[dict[str, float]]:
        reference = model(initializer_range=0.3)
        trainer = make(tmp_path, ref_model=reference, **{"max_steps": 4, "learning_rate": 0.0, **options})
        trainer.train()
        return train_logs(trainer)

    single = run()
    assert set(METRICS) <= single[0].keys()
    both = run(logging_steps=2)
    assert len(both) == 2
    for name in ("loss", *PAIR_METRICS, "logps/chosen", "logps/rejected"):
        wanted = [(a[name] + b[name]) / 2 for a, b in ((single[0], single[1]), (single[2], single[3]))]
        assert [line[name] for line in both] == pytest.approx(wanted, rel=1e-6), name
    # tokens weigh the token means, and the count goes on
    assert [line["num_tokens"] for line in both] == [single[1]["num_tokens"], single[3]["num_tokens"]]
    accumulated = run(gradient_accumulation_steps=2, max_steps=2)
    for name in (*PAIR_METRICS, "entropy", "logits/chosen", "mean_token_accuracy", "num_tokens"):
        assert [line[name] for line in accumulated] == pytest.approx([line[name] for line in both]), name


def test_evaluation_weighs_every_pair_once(tmp_path: Path) -> None:
    data = pairs(5, seed=4)
    results = []
    for size in (2, 5):
        trainer = make(
            tmp_path,
            ref_model=model(initializer_range=0.3),
            eval_dataset=data,
            per_device_eval_batch_size=size,
        )
        results.append(trainer.evaluate())
    for name in ("loss", *METRICS):
        assert results[0][f"eval_{name}"] == pytest.approx(results[1][f"eval_{name}"], rel=1e-5), name
    assert results[0]["eval_rewards/accuracies"] * 5 == pytest.approx(round(results[0]["eval_rewards/accuracies"] * 5))


def test_best_model_by_a_reward_metric(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        eval_dataset=pairs(4, seed=5),
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
    )
    trainer.train()
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    best = max(evaluations, key=lambda line: line["eval_rewards/margins"])
    checkpoint = Path(trainer.state.best_model_checkpoint)
    assert checkpoint == tmp_path / f"checkpoint-{best['step']}"
    # the state inside the checkpoint names the final folder, not the one it was written in
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(checkpoint)
    again = trainer.evaluate()
    assert again["eval_rewards/margins"] == pytest.approx(best["eval_rewards/margins"], rel=1e-5)


def test_log_updates_the_dict_it_is_given(tmp_path: Path) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = make(tmp_path, max_steps=1, callbacks=[Watch()])
    trainer.train()
    assert set(METRICS) <= seen[0].keys()
    logs: dict[str, float] = {"loss": 1.0}
    trainer.compute_loss(trainer.model.train(), first_batch(trainer))
    trainer.log(logs)
    assert set(METRICS) <= logs.keys()


def test_a_dict_of_evaluation_sets(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_dataset={"a": pairs(2, 6), "b": pairs(3, 7)})
    metrics = trainer.evaluate()
    assert {"eval_a_rewards/margins", "eval_b_rewards/margins", "eval_a_loss", "eval_b_loss"} <= metrics.keys()


def test_columns_survive_remove_unused_columns(tmp_path: Path) -> None:
    data = pairs().add_column("source", ["x"] * 8)
    trainer = make(tmp_path, train=data, eval_dataset=data, remove_unused_columns=True)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_nan_loss_is_logged_as_nan(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    kwargs["model"].lm_head.weight[5, 0] = math.nan

    trainer = make(tmp_path, callbacks=[Poison()], on_nan="continue")
    trainer.train()
    losses = [line["loss"] for line in train_logs(trainer)]
    assert all(map(math.isfinite, losses[:2]))
    assert math.isnan(losses[2])


# models, adapters and the reference


def test_reference_is_frozen_and_stays(tmp_path: Path) -> None:
    policy = model()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    trainer = make(tmp_path, policy)
    assert trainer.reference_description == "a frozen copy of the starting policy"
    assert trainer.reference_origin == {"kind": "start"}
    trainer.train()
    reference = trainer._reference
    assert isinstance(reference, FrozenModel)
    assert not any(p.requires_grad for p in reference.model.parameters())
    for name, tensor in reference.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, policy.state_dict()[name]) or "norm" in name


def test_reference_given_as_a_path(tmp_path: Path) -> None:
    model(initializer_range=0.3).save_pretrained(tmp_path / "ref")
    by_path = make(tmp_path, ref_model=str(tmp_path / "ref"))
    by_instance = make(tmp_path, ref_model=model(initializer_range=0.3))
    losses = [t.compute_loss(t.model, first_batch(t)) for t in (by_path, by_instance)]
    assert torch.equal(losses[0], losses[1])
    assert str(tmp_path / "ref") in by_path.reference_description
    assert by_path.reference_origin == {"kind": "model", "path": str(tmp_path / "ref")}
    assert by_instance.reference_origin == {"kind": "model"}
    assert not torch.equal(losses[0], torch.tensor(math.log(2)))


def test_adapter_reference_is_the_base_model_in_one_copy(tmp_path: Path) -> None:
    gc.collect()
    before = sum(isinstance(item, LlamaForCausalLM) for item in gc.get_objects())
    trainer = make(tmp_path, peft_config=lora())
    gc.collect()
    assert sum(isinstance(item, LlamaForCausalLM) for item in gc.get_objects()) == before + 1
    assert isinstance(trainer._reference, AdapterOff)
    assert "adapter switched off" in trainer.reference_description
    assert trainer.reference_origin == {"kind": "base"}
    trainer.train()

    batch = first_batch(trainer)
    call = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    call |= {"logprob_rows": batch["rows"], "logprob_targets": batch["targets"]}
    trainer.model.train()
    adapted = trainer.model
    assert isinstance(adapted, PeftModel)
    with trainer._logprob_forward.installed():
        reference = trainer._reference(adapted, call)
        policy = adapted(**call)["logprob"]
    assert adapted.training
    assert not reference.requires_grad
    untrained = model()
    logits = untrained(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    base = logits.flatten(0, 1)[batch["rows"]].log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    torch.testing.assert_close(reference, base.detach(), rtol=1e-5, atol=1e-5)
    assert (policy - reference).abs().max() > 1e-2


def test_reference_pass_restores_every_requires_grad_and_the_active_adapter(tmp_path: Path) -> None:
    policy = get_peft_model(model(), lora(), adapter_name="dpo_train")
    policy.add_adapter("other", lora())
    policy.set_adapter("dpo_train")
    for name, parameter in policy.named_parameters():
        if "layers.0" in name and "dpo_train" in name and "lora_A" in name:
            parameter.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    with adapter_off(policy):
        pass
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == wanted
    # what PEFT alone does
    with policy.disable_adapter():
        pass
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} != wanted
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(wanted[name])

    trainer = make(tmp_path, policy)
    trainer.train()
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == wanted
    assert policy.active_adapters == ["dpo_train"]


def test_reference_is_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = get_peft_model(model(), lora(init_lora_weights=False))
    make(tmp_path, policy)
    said = [line for line in caplog.messages if line.startswith("reference: ")]
    assert said == ["reference: the adapter 'default' as it was at the start, kept as a frozen copy."]


# data and arguments
