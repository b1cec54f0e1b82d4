"""Training on single answers: what a batch is, the loss by definition, layouts, references, evaluation and resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

import tiny_runs
from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.formats import normalize_dataset
from fastdpo.ops.sequence import segment_sum
from fastdpo.training.trainer import DPOTrainer
from fastdpo.training.unpaired_rows import as_unpaired, with_mismatched
from tiny_runs import by_definition, make, model, pairs

KINDS = ("kto", "bco", "apo_zero_unpaired")


def answers(count: int = 8, seed: int = 1) -> Dataset:
    rows = cast(Any, pairs(count, seed))
    labels = np.random.default_rng(seed).random(count) < 0.5
    labels[:2] = (True, False)
    return Dataset.from_list(
        [
            {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": bool(label)}
            for row, label in zip(rows, labels, strict=True)
        ]
    )


def run(folder: Path, loss: str, train: Any = None, **options: Any) -> DPOTrainer:
    return make(folder, train=answers() if train is None else train, loss_type=loss, **options)


def sums(policy: nn.Module, batch: dict[str, Any]) -> Tensor:
    return segment_sum(by_definition(policy, batch).double(), batch["offsets"])


# rows


def test_a_pair_becomes_two_rows_in_trls_order() -> None:
    trl = pytest.importorskip("trl.data_utils")
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(1203)]
    normal = cast(Dataset, normalize_dataset(Dataset.from_list(rows)))
    ours = cast(Dataset, as_unpaired(normal, "train"))
    theirs = trl.unpair_preference_dataset(Dataset.from_list(rows))
    names = ["prompt", "completion", "label"]
    assert ours.select_columns(names)[:] == theirs.select_columns(names)[:]
    streamed = as_unpaired(IterableDataset.from_generator(lambda: iter(rows)), "train")
    assert list(streamed) == ours.to_list()
    assert as_unpaired(ours, "train") is ours


def test_pairs_whose_messages_have_other_keys_and_tokenized_ones_become_rows() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    pair = {
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [call],
        "rejected": [{"role": "assistant", "content": "!"}],
    }
    rows = as_unpaired(normalize_dataset(Dataset.from_list([pair])), "train")
    assert [row["label"] for row in cast(Any, rows)] == [True, False]
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4], "prompt_mask": [0], "chosen_mask": [1]}
    rows = as_unpaired(Dataset.from_list([{**ids, "rejected_mask": [0, 1], "label": 7}]), "train")
    assert cast(Dataset, rows).to_list() == [
        {"prompt_ids": [1], "completion_ids": [2], "prompt_mask": [0], "completion_mask": [1], "label": True},
        {"prompt_ids": [1], "completion_ids": [3, 4], "prompt_mask": [0], "completion_mask": [0, 1], "label": False},
    ]


@pytest.mark.parametrize(
    ("rows", "block", "wanted"),
    [
        (6, 3, [2, 0, 1, 5, 3, 4]),
        (5, 3, [2, 0, 1, 4, 3]),
        (5, 2, [1, 0, 3, 2, 3]),  # the last one is alone in its block
        (4, 9, [3, 0, 1, 2]),
        (1, 2, [0]),
    ],
)
def test_every_row_gets_the_completion_of_another(rows: int, block: int, wanted: list[int]) -> None:
    data = Dataset.from_list([{"prompt_ids": [9], "completion_ids": [i], "label": True} for i in range(rows)])
    found = cast(Dataset, with_mismatched(data, block))
    assert [ids for (ids,) in found["KL_completion_ids"]] == wanted
    assert with_mismatched(found, block) is found
    whole = rows - rows % block
    stream = with_mismatched(data.to_iterable_dataset(), block)
    assert [row["KL_completion_ids"][0] for row in cast(Any, stream)][:whole] == wanted[:whole]


def test_a_batch_has_one_sequence_a_row_and_its_mismatched_ones_apart() -> None:
    data = with_mismatched(answers(3), 3)
    rows = [cast(dict, row) for row in cast(Any, data)]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    assert batch["label"].tolist() == [row["label"] for row in rows]
    for part, name in ((batch, "completion_ids"), (batch["kl"], "KL_completion_ids")):
        assert len(part["input_ids"]) == 3
        assert "labels" not in part
        for index, row in enumerate(rows):
            length = int(part["lengths"][index])
            assert part["input_ids"][index, :length].tolist() == row["prompt_ids"] + row[name]
            begin, end = part["offsets"][index : index + 2].tolist()
            assert part["targets"][begin:end].tolist() == row[name]
    packed = DataCollatorForPreference(pad_token_id=0, layout="packed", max_row_tokens=1000)(rows)
    assert len(packed["input_ids"]) == 1
    with pytest.raises(ValueError, match="layout 'shared' is for pairs"):
        DataCollatorForPreference(pad_token_id=0, layout="shared")(rows)


# the loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_is_its_definition(tmp_path: Path, kind: str) -> None:
    policy = model(seed=5)
    trainer = run(tmp_path, kind, policy=policy, ref_model=model(seed=3), desirable_weight=1.3, beta=0.2)
    rows = [cast(dict, trainer.train_dataset[i]) for i in range(4)]
    batch = replace(trainer.data_collator, layout="padded")(rows)
    loss, table = trainer.compute_loss(policy.train(), batch, return_outputs=True)
    reward = 0.2 * (sums(policy, batch) - sums(model(seed=3), batch))
    shift = 0.0
    if kind == "kto":
        shift = 0.2 * max(0.0, float((sums(policy, batch["kl"]) - sums(model(seed=3), batch["kl"])).mean()))
        assert shift > 0
    elif kind == "bco":
        shift = float(reward.mean())
    good = batch["label"]
    x = torch.where(good, reward - shift, shift - reward)
    losses = (-torch.nn.functional.logsigmoid(x) if kind == "bco" else torch.sigmoid(-x)) * torch.where(good, 1.3, 1.0)
    assert float(loss) == pytest.approx(float(losses.mean()), rel=1e-5)
    logged = trainer._objective.columns.averages(table.sum(0).tolist())
    assert logged["rewards/chosen"] == pytest.approx(float(reward[good].mean()), rel=1e-4)
    assert logged["rewards/rejected"] == pytest.approx(float(reward[~good].mean()), rel=1e-4)
    assert logged["rewards/margins"] == pytest.approx(logged["rewards/chosen"] - logged["rewards/rejected"])
    assert logged["logps/chosen"] == pytest.approx(float(sums(policy, batch)[good].mean()), rel=1e-5)
    assert logged.get("kl", 0) == pytest.approx(shift / 0.2 if kind == "kto" else 0)
    assert logged.get("delta", 0) == pytest.approx(shift if kind == "bco" else 0, rel=1e-4)


def test_no_gradient_goes_through_the_estimate_of_the_kl(tmp_path: Path) -> None:
    policy = model(seed=5)
    trainer = run(tmp_path, "kto", policy=policy, ref_model=model(seed=3))
    batch = replace(trainer.data_collator, layout="padded")([cast(dict, trainer.train_dataset[i]) for i in range(4)])
    trainer.compute_loss(policy.train(), batch).backward()
    grad = cast(Tensor, policy.lm_head.weight.grad).clone()
    policy.zero_grad()
    # the same loss, whose shift is a number
    kl = float(trainer._objective.columns.averages(trainer.compute_loss(policy, batch, True)[1].sum(0).tolist())["kl"])
    assert kl > 0
    trainer._objective.shift = lambda *_, **__: torch.tensor(kl)  # type: ignore[method-assign]
    trainer.compute_loss(policy, batch).backward()
    torch.testing.assert_close(grad, cast(Tensor, policy.lm_head.weight.grad), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_give_the_same_training(tmp_path: Path, kind: str) -> None:
    data = answers(8)
    logs = {}
    for layout in ("padded", "packed"):
        policy = model(seed=3).double()
        trainer = run(tmp_path / layout, kind, data, policy=policy, batch_layout=layout)
        assert trainer.layout_description.startswith(layout)
        trainer.train()
        logs[layout] = [
            {
                name: line[name]
                for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "kl")
                if name in line
            }
            for line in trainer.state.log_history
            if "loss" in line
        ]
    for padded, packed in zip(logs["padded"], logs["packed"], strict=True):
        assert padded == pytest.approx(packed, rel=1e-9, abs=1e-9)
    assert run(tmp_path, kind, data).layout_description == "packed, since single answers share no prompt"
    with pytest.raises(ValueError, match="'shared' is not exact here: single answers share no prompt"):
        run(tmp_path, kind, data, batch_layout="shared")


def test_training_moves_the_two_kinds_apart(tmp_path: Path) -> None:
    for kind in KINDS:
        trainer = run(tmp_path / kind, kind, max_steps=40, learning_rate=1e-2)
        trainer.train()
        last = [line for line in trainer.state.log_history if "rewards/margins" in line][-1]
        assert last["rewards/margins"] > 1, kind


# references, evaluation, budgets


@pytest.mark.parametrize("kind", KINDS)
def test_precomputed_log_probs_give_the_same_training(tmp_path: Path, kind: str) -> None:
    options = {"eval_dataset": answers(5, seed=4), "eval_strategy": "epoch", "desirable_weight": 1.2}
    online = run(tmp_path / "online", kind, **options)
    stored = run(tmp_path / "stored", kind, precompute_ref_log_probs=True, precompute_ref_batch_size=3, **options)
    columns = {"ref_logps", "ref_KL_logps"} if kind == "kto" else {"ref_logps"}
    assert columns == {name for name in cast(Dataset, stored.train_dataset).column_names if name.startswith("ref_")}
    online.train()
    stored.train()
    names = ("loss", "eval_loss", "rewards/chosen", "eval_rewards/chosen", "kl", "eval_kl")
    for one, other in zip(online.state.log_history, stored.state.log_history, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & set(names):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    # a second run reads them
    again = run(tmp_path / "stored", kind, precompute_ref_log_probs=True, **options)
    assert again.train_dataset["ref_logps"] == stored.train_dataset["ref_logps"]
    if kind == "kto":
        with pytest.raises(ValueError, match=r"holds reference log-probs of other settings: .*data"):
            run(tmp_path / "stored", kind, precompute_ref_log_probs=True, per_device_train_batch_size=4, **options)


def test_log_probs_that_came_with_the_rows_are_used(tmp_path: Path) -> None:
    data = with_mismatched(answers(4), 2)
    data = cast(Dataset, data).add_column("ref_logps", [-10.0] * 4).add_column("ref_KL_logps", [-1000.0] * 4)
    trainer = run(tmp_path, "kto", data, precompute_ref_log_probs=True)
    assert trainer.reference_description == "log-probs given with the dataset (ref_logps, ref_KL_logps)"
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 800


def test_evaluation_counts_every_answer_once_and_metrics_get_labels(tmp_path: Path) -> None:
    seen = {}

    def measure(prediction: Any) -> dict[str, float]:
        seen.update(prediction.predictions, labels=prediction.label_ids)
        return {"auc": 0.5}

    held_out = answers(5, seed=4)
    trainer = run(tmp_path, "bco", eval_dataset=held_out, compute_metrics=measure)
    logged = trainer.evaluate()
    assert seen["labels"].tolist() == [int(label) for label in held_out["label"]]
    assert seen["rewards"].shape == seen["logps"].shape == seen["tokens"].shape == (5,)
    assert logged["eval_auc"] == 0.5
    assert logged["eval_loss"] == pytest.approx(np.log(2))
    assert {"eval_logps/chosen", "eval_rewards/margins", "eval_delta", "eval_length/rejected"} <= logged.keys()


def test_windows_of_one_kind_have_no_metrics_of_the_other(tmp_path: Path) -> None:
    data = answers(4).remove_columns("label").add_column("label", [True, True, False, False])
    trainer = run(tmp_path, "kto", cast(Dataset, data), max_steps=2)
    trainer.train()
    first, second = [line for line in trainer.state.log_history if "loss" in line]
    assert "rewards/chosen" in first
    assert first.keys().isdisjoint({"rewards/rejected", "rewards/margins", "logps/rejected", "length/rejected"})
    assert "rewards/rejected" in second
    assert second.keys().isdisjoint({"rewards/chosen", "rewards/margins", "logps/chosen", "length/chosen"})


def test_batches_of_a_budget_of_tokens(tmp_path: Path) -> None:
    data = answers(12)
    trainer = run(tmp_path, "kto", data, max_tokens_per_batch=30, per_device_train_batch_size=4, max_steps=6)
    trainer.train()
    assert len(tiny_runs.losses(trainer)) == 6


# data of the wrong kind, and what is said of the right one


def test_data_of_the_other_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ValueError, match=r"train dataset: the rows are single answers with a label, and the loss sigmoid"
    ):
        run(tmp_path, "sigmoid")
    trainer = run(tmp_path, "kto", pairs(40))
    assert len(cast(Dataset, trainer.train_dataset)) == 80
    assert "have one kind of answers alone: shuffle the rows" in caplog.text


def test_unbalanced_answers_are_advised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = cast(Any, answers(8).remove_columns("label").add_column("label", [True] * 6 + [False] * 2))
    run(tmp_path, "kto", data)
    said = "6 desirable and 2 undesirable answers weigh 3.00 to 1, and the KTO paper takes 1 to 4/3"
    assert said in caplog.text
    assert (
        "desirable_weight between 0.33 and 0.44, or undesirable_weight between 2.25 and 3.00, not both" in caplog.text
    )
    for weights in ({"desirable_weight": 0.4}, {"undesirable_weight": 2.5}):
        caplog.clear()
        run(tmp_path, "kto", data, **weights)
        assert "weigh" not in caplog.text
    run(tmp_path, "bco", cast(Any, data.select(range(6))))
    assert "all 6 answers are desirable: nothing tells the model what the other kind is" in caplog.text


def test_a_stream_of_answers(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "kto")
    whole.train()
    stream = run(tmp_path / "stream", "kto", answers().to_iterable_dataset())
    stream.train()
    assert tiny_runs.losses(stream) == pytest.approx(tiny_runs.losses(whole), rel=1e-6)


# resume


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_logs_the_same(tmp_path: Path, kind: str) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "logging_steps": 2}
    whole = run(tmp_path / "whole", kind, answers(16), **options)
    whole.train()
    resumed = run(tmp_path / "resumed", kind, answers(16), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for one, other in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "kl", "delta", "num_tokens"):
            assert one.get(name) == other.get(name), (one["step"], name)
    if kind == "bco":
        assert whole._objective.state_dict() == resumed._objective.state_dict()
        assert whole._objective.state_dict()["running_rewards"][1] == 16
