"""`train_step`: whole trainers, checked against TRL's before they are timed, one after the other in every round."""

import json
import math
import re
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from fastdpo.ops.sequence import segment_sum

pytest.importorskip("trl")

ENTRIES = {"fastdpo", "fastdpo padded", "fastdpo packed", "fastdpo shared", "trl"}


@pytest.fixture
def train_step(bench):
    return bench.train_step


@pytest.fixture
def toy(train_step):
    """The quick case."""
    (case,) = train_step.cases.train_cases("cpu", True, inputs="synthetic")
    return case


@pytest.fixture
def measure(bench, train_step, toy):
    """measure(entries by name, case=..., rounds=...) -> rows and what is missing, both by entry."""

    def measure(entries, case=toy, rounds=1, budget=None):
        timer, rounds = bench.measure.timing.Timer("cpu"), bench.measure.timing.Rounds(rounds)
        budget = budget or bench.measure.timing.Budget(None)
        rows, missing = train_step.step.measure_training(case, entries, rounds, timer, budget)
        return {row.entry: row for row in rows}, {m.entry: m.reason for m in missing}

    return measure


@pytest.fixture
def entries(bench, train_step):
    """entries(**changed) -> fastdpo padded and TRL's trainer, or with arguments of its own in place of the first."""

    def entries(**changed):
        from fastdpo import DPOConfig, DPOTrainer

        made = bench.measure.entries.make_entries(train_step.peers.FACTORIES, "cpu", ["fastdpo padded", "trl"])
        if changed:
            run = partial(train_step.peers.trainer_of, DPOTrainer, DPOConfig, **changed)
            made["fastdpo padded"] = replace(made["fastdpo padded"], run=run)
        return made

    return entries


def test_a_run_has_a_row_for_every_trainer_with_all_its_conditions(bench, train_step, tmp_path, capsys):
    status, record = bench.measured(tmp_path, "--plot", case="train_step")
    assert status == 0
    assert record["complete"]
    assert record["missing"] == record["refused"] == []
    assert [row["entry"] for row in record["rows"]] == [factory.name for factory in train_step.peers.FACTORIES]
    assert {row["entry"] for row in record["rows"]} >= ENTRIES
    assert record["environment"]["data"] == train_step.data.DESCRIPTIONS["synthetic"]
    assert {"trl", "transformers", "peft", "accelerate"} <= set(record["environment"]["versions"])
    rows = {row["entry"]: row for row in record["rows"]}
    for row in record["rows"]:
        assert row["case"] == "toy, 2 pairs of 64 fp32 full synthetic"
        assert (row["head"], row["mode"], row["pairs"], row["length"], row["steps"]) == ("toy", "full", 2, 64, 3)
        assert row["best_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["rounds"] == 2
        assert row["pairs_per_s"] == pytest.approx(2e3 / row["median_ms"])
        assert row["best_pairs_per_s"] == pytest.approx(2e3 / row["best_ms"])
        assert len(row["losses"]) == len(row["margins"]) == 3
        assert row["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert row["error"].keys() == row["tolerance"].keys()
        assert all(row["error"][name] <= limit for name, limit in row["tolerance"].items())
        assert row["peak_mib"] > 0
        # policy, reference and two moments, fp32
        weights = 2 * 128 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 3 * 16
        assert row["resting_mib"] * 2**20 == pytest.approx(4 * 4 * weights, rel=0.02)
    assert rows["trl"]["positions"] == rows["fastdpo padded"]["positions"] > rows["fastdpo packed"]["positions"]
    assert rows["fastdpo packed"]["positions"] > rows["fastdpo shared"]["positions"]
    assert rows["fastdpo"]["batches"].startswith("shared")
    assert rows["trl"]["batches"] == ""
    assert rows["fastdpo"]["host_reads"] < 5 < rows["trl"]["host_reads"]
    printed = capsys.readouterr().out
    assert re.search(r"\n  trl +[\d.]+ +1\.00 x +[\d.]+ +[\d.]+ - [\d.]+ ", printed)
    assert re.search(r"over trl, one after the other: head and synchronisation .* x, no padding .* x, prompts", printed)
    assert "these ratios are CPU ratios" in printed
    (path,) = tmp_path.glob("*.json")
    table = bench.show.readme.table(path)
    assert table.count("\n| toy, 2 pairs of 64 fp32 full synthetic | ") == 1
    assert table.splitlines()[-1] == f"![train_step: pairs per second and memory](bench/results/{path.stem}.png)"
    assert "random words with the lengths of real pairs" in table
    assert Image.open(path.with_suffix(".png")).info[bench.show.plot.DIGEST] == bench.show.plot.digest(record)


@pytest.mark.parametrize("fault", ["beta", "mask"])
def test_a_trainer_that_computes_something_else_is_a_fault_and_not_timed(
    train_step, measure, entries, monkeypatch, fault
):
    changed = entries(beta=0.102) if fault == "beta" else entries()
    if fault == "mask":
        right = changed["fastdpo padded"].run

        def blind(setup):
            trainer = right(setup)
            collate = trainer.data_collator

            def without_a_prompt(examples):
                batch = collate(examples)
                batch["attention_mask"][:, :2] = 0
                return batch

            trainer.data_collator = without_a_prompt
            return trainer

        changed["fastdpo padded"] = replace(changed["fastdpo padded"], run=blind)
    timed = []
    monkeypatch.setattr(train_step.step.Trained, "epoch", lambda self: timed.append(self.entry.name))
    rows, missing = measure(changed)
    assert set(rows) == set(timed) == {"trl"}
    assert missing["fastdpo padded"].startswith("FAULT: (fastdpo ")
    assert "failed the oracle, not timed: loss " in missing["fastdpo padded"]


def test_a_fault_of_ours_fails_the_run_and_is_refused_by_name(
    bench, train_step, tmp_path, monkeypatch, entries, capsys
):
    wrong = entries(beta=0.2)
    factories = [bench.measure.entries.Factory(name, lambda name: wrong[name]) for name in wrong]
    monkeypatch.setattr(train_step.peers, "FACTORIES", factories)
    status, record = bench.measured(tmp_path, "--rounds", "1", case="train_step")
    assert status == 1
    assert [row["entry"] for row in record["rows"]] == ["trl"]
    (refused,) = record["refused"]
    assert "fastdpo padded: FAULT: " in refused
    assert "  fastdpo padded: FAULT: " in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert "Not everything was measured" in bench.show.readme.table(path)


def test_nothing_is_timed_without_something_to_check_against(train_step, measure, entries, monkeypatch):
    def broken(setup):
        raise RuntimeError("no such trainer")

    both = entries()
    rows, missing = measure({**both, "fastdpo padded": replace(both["fastdpo padded"], run=broken)})
    assert set(rows) == {"trl"}
    assert missing == {"fastdpo padded": "RuntimeError: no such trainer"}
    rows, missing = measure({**both, "trl": replace(both["trl"], run=broken)})
    assert rows == {}
    assert missing == {"": "nothing to check against: trl: RuntimeError: no such trainer"}
    # rewards that hardly move say nothing about beta
    monkeypatch.setitem(train_step.peers.LEARNING_RATES, "full", 1e-6)
    rows, missing = measure(both)
    assert rows == {}
    assert re.match(r"nothing to check against: trl: its rewards moved by \S+ only", missing[""])


def test_every_round_has_one_turn_of_each_on_the_same_pairs(train_step, measure, entries, monkeypatch):
    seen = []
    step = train_step.turns.StepByStep.on_step_begin

    def watched(self, *args, **kwargs):
        step(self, *args, **kwargs)
        seen.append(type(self.trainer).__module__.partition(".")[0])

    monkeypatch.setattr(train_step.turns.StepByStep, "on_step_begin", watched)
    rows, missing = measure(entries(), rounds=2)
    assert missing == {}
    assert [row.times for row in rows.values()] == [row.times for row in rows.values() if len(row.times) == 2]
    # three steps each: the check, TRL first, and then two rounds
    assert seen == [*["trl"] * 3, *["fastdpo"] * 3, *(["fastdpo"] * 3 + ["trl"] * 3) * 2]
    assert not [thread for thread in threading.enumerate() if "_train" in thread.name]


def test_trl_is_the_yardstick_where_it_is_not_asked_for(measure, entries):
    rows, missing = measure({"fastdpo padded": entries()["fastdpo padded"]})
    assert set(rows) == {"fastdpo padded"}
    assert missing == {}


def test_time_that_is_over_and_room_that_is_not_there_are_named(bench, toy, measure, entries):
    rows, missing = measure(entries(), budget=bench.measure.timing.Budget(0))
    assert (rows, missing) == ({}, {"": "no time left"})
    rows, missing = measure(entries(), replace(toy, entries=("trl",)))
    assert set(rows) == {"trl"}
    assert missing == {"fastdpo padded": bench.measure.missing.NO_ROOM}
    assert missing["fastdpo padded"].endswith(bench.measure.missing.BENIGN)


def test_a_model_in_a_folder_is_trained_with_lora(bench, train_step, tmp_path, monkeypatch, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "small-model"
    train_step.data.word_tokenizer().save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, initializer_range=0.3, **sizes)).save_pretrained(folder)
    monkeypatch.setitem(train_step.cases.FOLDER_SIZES, ("cpu", False), (2, 64, 3))
    arguments = ("--entries", "fastdpo,trl", "--rounds", "1", "--model", str(folder))
    status, record = bench.measured(tmp_path, *arguments, case="train_step")
    assert status == 0
    row = record["rows"][-2]
    assert (row["entry"], row["head"], row["mode"], row["h"], row["v"]) == ("fastdpo", "small-model", "lora", 16, 128)
    assert max(map(abs, row["margins"])) > 4e-3
    assert bench.run.main(["train_step", "--device", "cpu", "--model", str(tmp_path)]) == 2
    assert f"error: --model {tmp_path} holds no causal language model: FileNotFoundError" in capsys.readouterr().err


def test_models_stand_beside_each_other_in_one_models_memory(train_step, toy):
    def storages(*models):
        return {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}

    full = train_step.peers.Models(toy, "cpu")
    first, second, reference, other = full.policy(), full.policy(), full.reference(), full.reference()
    assert not storages(first) & storages(second)
    assert not storages(first, second) & storages(reference)
    assert storages(reference) == storages(other)
    assert all(p.requires_grad for p in first.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    lora = train_step.peers.Models(replace(toy, mode="lora"), "cpu")
    first, second = lora.policy(), lora.policy()
    assert storages(first) == storages(second)
    assert first.model.layers[0] is not second.model.layers[0]
    assert lora.reference() is None


def test_models_of_a_gpu_are_those_of_the_issue_and_fit(bench, train_step):
    cases = train_step.cases.train_cases("cuda", False)
    assert {case.head for case in cases} == {"Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.1-8B"}
    assert {case.head for case in cases if case.mode == "lora"} == {case.head for case in cases}
    assert len({case.name for case in cases}) == len(cases)
    known = {factory.name for factory in train_step.peers.FACTORIES}
    assert all(set(case.entries) <= known for case in cases)
    heads = {head.model: (head.h, head.v) for head in bench.linear_logprob.cases.HEADS.values()}
    assert all((case.h, case.v) == heads[case.head] for case in cases)


def test_synthetic_pairs_have_the_lengths_in_the_table(train_step, monkeypatch):
    from fastdpo.data.tokenize_dataset import tokenize_dataset

    pairs = train_step.data.synthetic_pairs(8, 1024)
    tokens, _ = tokenize_dataset(pairs.rows, pairs.tokenizer, max_length=1024)
    sizes = [(len(r["prompt_ids"]), len(r["chosen_ids"]) - 1, len(r["rejected_ids"]) - 1) for r in tokens]  # EOS
    assert sorted(sizes) == sorted(train_step.data.evenly(train_step.data.LENGTHS, 8))
    assert sizes != sorted(sizes, key=sum)


def test_the_table_of_lengths_is_that_of_the_real_pairs(train_step, shared_data, monkeypatch):
    from fastdpo.data.tokenize_dataset import tokenize_dataset

    monkeypatch.setattr(train_step.data, "PAIRS", shared_data / "dpo_en_demo.json")
    assert train_step.data.kind() == "real"
    pairs = train_step.data.make_pairs("real", 32, 1024)
    tokens, _ = tokenize_dataset(pairs.rows, pairs.tokenizer, max_length=1024)
    sizes = [tuple(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in tokens]
    # a token more or less in a few rows is a tokenizer's or a template's business
    totals, expected = (
        [sum(column) for column in zip(*table, strict=True)] for table in (sizes, train_step.data.LENGTHS)
    )
    assert totals == pytest.approx(expected, rel=0.02)


def test_reads_of_single_numbers_are_counted_but_for_guarded_ones(train_step):
    x, offsets = torch.arange(3.0, requires_grad=True), torch.tensor([0, 1, 3])
    with train_step.counts.waits("cpu") as counter:
        x.sum().item()
        bool((x > 1).any())
        (x * x).sum().backward()
        segment_sum(x, offsets)  # checks its offsets on a CPU only
    assert counter.count == 2


def test_a_trainer_that_fails_in_its_turn_says_so_and_one_that_waits_is_ended(train_step, toy, tmp_path):
    from fastdpo import DPOConfig, DPOTrainer

    arguments = train_step.peers.arguments(toy, "cpu", 20, str(tmp_path))
    models, pairs = train_step.step._inputs(toy, "cpu")
    setup = train_step.peers.Setup(models.policy(), models.reference(), None, pairs.rows, pairs.tokenizer, arguments)
    with ExitStack() as cleanup:
        turns = train_step.turns.StepByStep(train_step.peers.trainer_of(DPOTrainer, DPOConfig, setup))
        cleanup.callback(turns.end)
        turns.start()
        turns.take(2)
        assert [round(log["loss"], 4) for log in turns.logs][:1] == [0.6931]
        assert len(turns.logs) == turns.trainer.state.global_step == 2

        def fails():
            raise ValueError("a step that cannot be made")

        with pytest.raises(ValueError, match="a step that cannot be made"):
            turns.take(1, fails)
    assert not turns._thread.is_alive()
    json.dumps(turns.logs)
