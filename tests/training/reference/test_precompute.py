"""Precomputed reference log-probs: equal to those computed in training, never used where they do not belong."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import REFERENCE_COLUMNS, DataCollatorForPreference
from fastdpo.files import write_atomic
from fastdpo.losses.from_tokens import SequenceLogps
from fastdpo.training.reference import logp_store
from fastdpo.training.reference.inside_policy import AdapterOff, OtherAdapter, StartingPolicy
from fastdpo.training.reference.logp_store import StaleLogpsError
from fastdpo.training.reference.precomputed import PrecomputedReference, sums_of_rows
from fastdpo.training.trainer import DPOTrainer

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY = 61


@pytest.fixture(autouse=True)
def few_rows_in_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logp_store, "SHARD_ROWS", 4)


def model(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


def two_adapters() -> PeftModel:
    policy = cast(PeftModel, get_peft_model(model(), lora(init_lora_weights=False), adapter_name="dpo_train"))
    policy.add_adapter("reference", lora(init_lora_weights=False))
    return policy


def pairs(count: int = 14, seed: int = 1) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(2, 12, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    rows = [{"prompt_ids": ids(), "chosen_ids": [*ids(), 0], "rejected_ids": [*ids(), 0]} for _ in range(count)]
    return Dataset.from_list(rows)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )


def make(folder: Path, policy: Any = None, **options: Any) -> DPOTrainer:
    names = ("ref_model", "peft_config", "eval_dataset", "train_dataset", "data_collator")
    given = {name: options.pop(name) for name in names if name in options}
    args = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 4,
        "save_strategy": "no",
        "precompute_ref_log_probs": True,
        **options,
    }
    given.setdefault("train_dataset", pairs())
    policy = model() if policy is None else policy
    return DPOTrainer(policy, args=DPOConfig(**args), processing_class=tokenizer(), **given)


def columns(trainer: DPOTrainer) -> dict[str, Tensor]:
    data = cast(Dataset, trainer.train_dataset)
    return {name: torch.tensor(data[name][:]) for name in REFERENCE_COLUMNS}


def losses(trainer: DPOTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def shards(folder: Path, name: str = "train") -> list[Path]:
    return sorted((folder / "ref_logps" / name).glob("shard-*"))


KINDS: dict[str, tuple[Any, dict[str, Any], type | None]] = {
    "starting policy": (model, {}, StartingPolicy),
    "ref_model": (model, {"ref_model": model(initializer_range=0.3)}, None),
    "adapter off": (model, {"peft_config": lora()}, AdapterOff),
    "second adapter": (
        two_adapters,
        {"model_adapter_name": "dpo_train", "ref_adapter_name": "reference"},
        OtherAdapter,
    ),
    "start of an adapter": (lambda: get_peft_model(model(), lora(init_lora_weights=False)), {}, StartingPolicy),
}


@pytest.mark.parametrize("kind", KINDS)
def test_precomputed_equals_online(tmp_path: Path, kind: str) -> None:
    make_policy, options, source = KINDS[kind]
    options = {**options, "precompute_ref_batch_size": 3, "ld_alpha": 0.4}
    stored = make(tmp_path / "stored", make_policy(), **options)
    reference = stored.reference
    assert isinstance(reference, PrecomputedReference)
    assert type(reference.source) is (source or type(None))
    online = make(tmp_path / "online", make_policy(), **{**options, "precompute_ref_log_probs": False})
    rows = [cast(dict, row) for row in pairs()]
    # another batch size, so another padding
    sums, lengths = sums_of_rows(online, online.reference, rows)
    for name, wanted in zip(REFERENCE_COLUMNS, (*sums.total.chunk(2), *sums.tail.chunk(2)), strict=True):
        torch.testing.assert_close(columns(stored)[name], wanted, rtol=1e-6, atol=1e-6)
        assert (wanted != 0).any()
    files = [load_file(path) for path in shards(tmp_path / "stored")]
    assert [len(file["chosen_tokens"]) for file in files] == [4, 4, 4, 2]
    counted = torch.cat([torch.cat([file[f"{side}_tokens"] for file in files]) for side in ("chosen", "rejected")])
    assert torch.equal(counted, lengths)
    stored.train()
    online.train()
    assert losses(stored) == pytest.approx(losses(online), rel=1e-6)
    # the comparison sees another reference
    assert reference.description.startswith("log-probs precomputed in ")
    assert reference.origin["precomputed"] in reference.description
    other = make(tmp_path / "other", make_policy(), ref_model=model(seed=5), ld_alpha=0.4)
    assert (columns(other)[REFERENCE_COLUMNS[0]] - columns(stored)[REFERENCE_COLUMNS[0]]).abs().max() > 1e-2


def test_killed_half_way_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = columns(make(tmp_path / "whole"))
    write, computed = logp_store.write_atomic, []

    def die_later(path: Any, data: Any) -> None:
        if Path(path).name.startswith("shard") and len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(Path(path).name)
        write(path, data)

    monkeypatch.setattr(logp_store, "write_atomic", die_later)
    computed.append("manifest is first")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed")
    assert len(shards(tmp_path / "killed")) < 4
    done = [path.name for path in shards(tmp_path / "killed")]
    computed.clear()
    monkeypatch.setattr(logp_store, "write_atomic", lambda path, data: (computed.append(path.name), write(path, data)))
    continued = columns(make(tmp_path / "killed"))
    assert sorted({name for name in computed if name.startswith("shard")} | set(done)) == [
        f"shard-{index:05d}.safetensors" for index in range(4)
    ]
    assert not set(computed) & set(done)
    for name, values in whole.items():
        assert torch.equal(continued[name], values)
    # a third time nothing is computed
    computed.clear()
    assert torch.equal(columns(make(tmp_path / "killed"))[REFERENCE_COLUMNS[0]], whole[REFERENCE_COLUMNS[0]])
    assert not [name for name in computed if name.startswith("shard")]


KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("precompute_tests", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
torch.set_num_threads(1)
module.logp_store.SHARD_ROWS = 4
compute, calls = module.logp_store._compute, []

def killing(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*args)

module.logp_store._compute = killing
module.make(Path(sys.argv[2]))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a Unix signal")
def test_sigkill_and_continue(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, __file__, str(tmp_path / "killed")]
    assert subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert len(shards(tmp_path / "killed")) == 2
    whole, continued = columns(make(tmp_path / "whole")), columns(make(tmp_path / "killed"))
    for name, values in whole.items():
        torch.testing.assert_close(continued[name], values, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 12}, "max_length was 1024 and is 12"),
        ({"truncation_mode": "keep_end"}, "truncation_mode was keep_start and is keep_end"),
        ({"bf16": True}, "autocast was no and is bf16"),
        ({"policy": lambda: model(seed=1)}, "not the same weights"),
        ({"policy": lambda: model().bfloat16()}, "not the same weights"),
        ({"policy": lambda: model(rope_theta=5e3, rope_parameters=None)}, "not the same configuration"),
        ({"policy": lambda: model(attn_implementation="eager")}, "attention was sdpa and is eager"),
        ({"policy": two_adapters}, "not the same weights"),
        ({"train_dataset": pairs(seed=2)}, "not the same data"),
        ({"train_dataset": pairs(13)}, "rows was 14 and is 13"),
    ],
)
def test_stale_log_probs_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    make(tmp_path)
    manifest = tmp_path / "ref_logps" / "train" / "manifest.json"
    before = manifest.read_text()
    options = dict(options)
    policy = options.pop("policy", model)()
    with pytest.raises(StaleLogpsError) as caught:
        make(tmp_path, policy, **options)
    assert words in str(caught.value)
    assert str(tmp_path / "ref_logps" / "train") in str(caught.value)
    assert "remove the folder to compute them again, or give another precompute_ref_dir" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert manifest.read_text() == before


def adapted(name: str = "default", seed: int = 5, **options: Any) -> PeftModel:
    policy = cast(PeftModel, get_peft_model(model(), lora(**options), adapter_name=name))
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def rows(prompts: list[list[int]], chosen: list[list[int]]) -> Dataset:
    columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": [[7, 0]] * len(prompts)}
    return Dataset.from_dict(columns)


class OtherCollator(DataCollatorForPreference):
    """The same numbers from another class."""


START = rows([[1, 2], [3, 4]], [[5, 6, 0], [8, 0]])


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"policy": adapted}, {"policy": lambda: adapted(lora_alpha=16)}, "not the same configuration"),
        ({"policy": adapted}, {"policy": lambda: adapted("other", seed=6)}, "not the same weights"),
        # the boundary between prompt and completion, and between two rows of one column
        ({"train_dataset": START}, {"train_dataset": rows([[1, 2, 5], [3, 4]], [[6, 0], [8, 0]])}, "not the same data"),
        ({"train_dataset": START}, {"train_dataset": rows([[1], [2, 3, 4]], [[5, 6, 0], [8, 0]])}, "not the same data"),
        ({}, {"data_collator": OtherCollator(pad_token_id=0, max_length=1024)}, "OtherCollator"),
    ],
)
def test_the_key_covers(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], words: str) -> None:
    options, other = dict(first), dict(second)
    make(tmp_path, options.pop("policy", model)(), **options)
    with pytest.raises(StaleLogpsError, match=words) as caught:
        make(tmp_path, other.pop("policy", model)(), **other)
    # nothing else keeps the two apart
    assert str(caught.value).split("settings: ")[1].count(";") == 1


def test_what_peft_calls_a_weight_makes_nothing_stale(tmp_path: Path) -> None:
    kept = {name: str(tmp_path / name) for name in ("base", "adapter")}
    whole = {"modules_to_save": ["lm_head"], "target_modules": ["o_proj"]}
    first = columns(make(tmp_path, peft_config=lora(), precompute_ref_dir=kept["base"]))
    for options in (
        {"peft_config": lora(r=2, target_modules=["q_proj", "k_proj"])},
        {"peft_config": lora(), "model_adapter_name": "mine"},
        {"peft_config": lora(**whole)},
        {},
        {"ref_model": model()},
    ):
        again = columns(make(tmp_path, precompute_ref_dir=kept["base"], **options))
        assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("default", "weight", "lora_A", "0"):
        policy = adapted(name, modules_to_save=["lm_head"])
        make(tmp_path, policy, precompute_ref_dir=kept["adapter"])
    make(tmp_path, ref_model=adapted(modules_to_save=["lm_head"]), precompute_ref_dir=kept["adapter"])
    with pytest.raises(StaleLogpsError, match="not the same weights"):
        make(tmp_path, model(seed=1), peft_config=lora(), precompute_ref_dir=kept["base"])


def test_what_changes_no_log_prob_makes_nothing_stale(tmp_path: Path) -> None:
    kept = str(tmp_path / "kept")
    first = columns(make(tmp_path / "a", precompute_ref_dir=kept))
    assert not (tmp_path / "a" / "ref_logps").exists()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "train").glob("shard-*")}
    for options in (
        {"beta": 0.5, "loss_type": "hinge", "learning_rate": 1e-3, "ld_alpha": 0.2},
        {"precompute_ref_batch_size": 5, "per_device_train_batch_size": 1, "pad_to_multiple_of": 8},
    ):
        again = columns(make(tmp_path / "b", precompute_ref_dir=kept, **options))
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_the_chat_template_is_named_where_the_data_differ(tmp_path: Path) -> None:
    settings = {"format": 1, "rows": 2, "data": "a" * 64, "notes": {"tokenizer": "x", "chat_template": "b" * 64}}
    (tmp_path / "manifest.json").write_text(json.dumps(settings))
    logp_store.check_manifest(tmp_path, settings)
    moved = {**settings, "data": "c" * 64, "notes": {"tokenizer": "x", "chat_template": "d" * 64}}
    with pytest.raises(StaleLogpsError, match="not the same data; not the same chat template"):
        logp_store.check_manifest(tmp_path, moved)
    # a template alone that leads to the same ids changes nothing
    logp_store.check_manifest(tmp_path, {**moved, "data": settings["data"]})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StaleLogpsError, match="is not readable"):
        logp_store.check_manifest(tmp_path, settings)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(StaleLogpsError, match=r"has reference log-probs and no manifest.json"):
        logp_store.check_manifest(tmp_path, settings)


def one_pass(value: float, wait: Any = lambda: None, seen: list[str] | None = None) -> logp_store.Pass:
    """A pass whose reference gives `value` for every pair."""

    def logps(rows: list[dict[str, Any]]) -> tuple[SequenceLogps, Tensor]:
        if seen is not None:
            seen.append("compute")
        sums = torch.full((2 * len(rows),), value)
        return SequenceLogps(sums, torch.zeros_like(sums)), torch.ones(len(sums), dtype=torch.long)

    return logp_store.Pass(logps, {"max_length": value}, {}, 2, 0, 1, wait, True)


def test_two_runs_that_begin_in_one_folder_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "train"
    waits: list[int] = []

    def other_run_begins() -> None:
        waits.append(1)
        if len(waits) == 1:  # this one has looked, and written nothing
            logp_store.with_reference_logps(pairs(), folder, one_pass(2.0))

    with pytest.raises(StaleLogpsError, match=r"max_length was 2.0 and is 1.0"):
        logp_store.with_reference_logps(pairs(), folder, one_pass(1.0, other_run_begins))
    read = logp_store.with_reference_logps(pairs(), folder, one_pass(2.0, seen=(seen := [])))
    assert set(read["ref_chosen_logps"][:]) == {2.0}
    assert not seen
    # both have looked before either has written: the parts tell them apart
    logp_store.with_reference_logps(pairs(), tmp_path / "other", one_pass(1.0))
    (tmp_path / "other" / "shard-00001.safetensors").replace(folder / "shard-00001.safetensors")
    with pytest.raises(StaleLogpsError, match=r"shard-00001.safetensors holds reference log-probs of other settings"):
        logp_store.with_reference_logps(pairs(), folder, one_pass(2.0))
    # nor do the temporary files of two machines that count processes alike
    temporary = []
    monkeypatch.setattr(os, "replace", lambda old, new: (temporary.append(old), Path(old).unlink()))
    write_atomic(tmp_path / "file", "")
    write_atomic(tmp_path / "file", "")
    assert len(set(temporary)) == 2


def test_all_processes_see_what_is_missing_before_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read = logp_store._read_shard
    monkeypatch.setattr(logp_store, "_read_shard", lambda *given: (seen.append("read"), read(*given))[1])
    work = one_pass(1.0, lambda: seen.append("wait"), seen)
    logp_store.with_reference_logps(pairs(), tmp_path / "train", work)
    before = seen[: seen.index("compute")]
    assert before[-5:] == ["read", "read", "read", "read", "wait"]


def test_a_complete_folder_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = str(tmp_path / "kept")
    first = columns(make(tmp_path / "a", precompute_ref_dir=kept))

    def read_only(path: Any, data: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(logp_store, "write_atomic", read_only)
    again = columns(make(tmp_path / "b", precompute_ref_dir=kept))
    assert all(torch.equal(first[name], again[name]) for name in first)
    (tmp_path / "kept" / "train" / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot write .*shard-00002.*; give another precompute_ref_dir"):
        make(tmp_path / "b", precompute_ref_dir=kept)


@pytest.mark.parametrize("content", ["null", "[]", "5", '"x"', "{}", '{"notes": "x"}', None])
def test_a_manifest_that_is_none_is_answered(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "manifest.json"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    words = "holds reference log-probs of other settings: format" if content and content[0] == "{" else "; remove "
    with pytest.raises(StaleLogpsError, match=words) as caught:
        logp_store.check_manifest(tmp_path, {"format": 2, "notes": {"tokenizer": "x"}})
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_the_folder_is_answered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StaleLogpsError, match=r"manifest.json is not readable \(.*; remove"):
        make(tmp_path / "out", precompute_ref_dir=str(tmp_path / "file"))


def test_a_damaged_part_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = columns(make(tmp_path))
    path = shards(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:40])
    again = columns(make(tmp_path))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any("shard-00001.safetensors is not readable and is computed again" in line for line in caplog.messages)


def test_the_reference_model_leaves_memory(tmp_path: Path) -> None:
    model(initializer_range=0.3).save_pretrained(tmp_path / "ref")
    seen: list[Any] = []
    load = LlamaForCausalLM.from_pretrained.__func__  # pyright: ignore[reportAttributeAccessIssue] a class method

    def watched(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        seen.append(weakref.ref(loaded[0] if isinstance(loaded, tuple) else loaded))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(watched))
        trainer = make(tmp_path / "out", ref_model=str(tmp_path / "ref"))
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None
    # nor is there a copy of the policy
    before = sum(isinstance(item, LlamaForCausalLM) for item in gc.get_objects())
    other = make(tmp_path / "none")
    assert sum(isinstance(item, LlamaForCausalLM) for item in gc.get_objects()) == before + 1
    trainer.train()
    other.train()
    assert losses(trainer)[0] != losses(other)[0]


def test_evaluation_sets_of_any_shape(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sets = {"a": pairs(3, seed=6), "b/c": pairs(5, seed=7)}
    trainer = make(tmp_path, eval_dataset=sets, max_steps=2)
    folders = sorted(path.name for path in (tmp_path / "ref_logps").iterdir())
    assert folders[0] == "eval-a"
    assert folders[1].startswith("eval-b_c-")
    assert folders[2] == "train"
    online = make(tmp_path, eval_dataset=sets, precompute_ref_log_probs=False, max_steps=2)
    trainer.train()
    online.train()
    mine, other = trainer.evaluate(), online.evaluate()
    assert mine["eval_b/c_rewards/margins"] == pytest.approx(other["eval_b/c_rewards/margins"], rel=1e-4)
    assert mine["eval_a_loss"] == pytest.approx(other["eval_a_loss"], rel=1e-6)
    # a set that comes later: the starting policy is gone
    with pytest.raises(ValueError, match="the reference that they come from is not in memory any more"):
        trainer.evaluate(cast(Any, pairs(3)))
    # the base model of an adapter is not
    adapted = make(tmp_path / "lora", peft_config=lora(), max_steps=2)
    adapted.train()
    assert adapted.evaluate(cast(Any, pairs(3)))["eval_loss"] > 0
    assert sum("batches without precomputed log-probs" in line for line in caplog.messages) == 1


def test_before_training_the_starting_policy_still_answers(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert trainer.evaluate(cast(Any, pairs(3)))["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_resumed_run_logs_the_same(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    make(tmp_path / "killed", **options, max_steps=2).train()
    resumed = make(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    # the trained weights are not a start that the stored log-probs belong to
    with pytest.raises(StaleLogpsError, match="not the same weights"):
        make(tmp_path / "killed", LlamaForCausalLM.from_pretrained(tmp_path / "killed" / "checkpoint-4"))


def test_given_columns_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = pairs()
    numbers = {name: [-10.0 - row for row in range(len(data))] for name in REFERENCE_COLUMNS[:2]}
    for name, values in numbers.items():
        data = data.add_column(name, cast(Any, values))
    trainer = make(tmp_path, train_dataset=data)
    assert trainer.reference_description.startswith("log-probs given with the dataset")
    assert trainer.reference_origin == {"kind": "columns"}
    assert not (tmp_path / "ref_logps").exists()
    batch = trainer.data_collator([cast(dict, cast(Any, trainer.train_dataset)[row]) for row in (3, 5)])
    assert batch["ref_chosen_logps"].tolist() == [-13.0, -15.0]
    trainer.train()
    # without the flag a line says that they are not read
    caplog.clear()
    make(tmp_path / "ignored", train_dataset=data, precompute_ref_log_probs=False)
    assert any("ref_chosen_logps and ref_rejected_logps are ignored" in line for line in caplog.messages)
    with pytest.raises(ValueError, match="weighs tokens of the reference too, and train has sums only"):
        make(tmp_path, train_dataset=data, ld_alpha=0.5)
    with pytest.raises(ValueError, match="train has reference log-probs in its columns and eval has none"):
        make(tmp_path, train_dataset=data, eval_dataset=pairs(3))
    data = data.remove_columns("ref_chosen_logps")
    data = data.add_column("ref_chosen_logps", cast(Any, [None, *[-1.0] * (len(data) - 1)]))
    with pytest.raises(ValueError, match=r"train\[0\].ref_chosen_logps is (nan|None); wanted a finite log-prob"):
        make(tmp_path, train_dataset=data)


def test_given_tails_are_checked_where_they_are_read(tmp_path: Path) -> None:
    data = pairs()
    for name in REFERENCE_COLUMNS:
        data = data.add_column(name, cast(Any, [None if "tail" in name else -1.0, *[-1.0] * (len(data) - 1)]))
    with pytest.raises(ValueError, match=r"train\[0\].ref_chosen_tail_logps is (nan|None); wanted a finite log-prob"):
        make(tmp_path, train_dataset=data, ld_alpha=0.5)
    make(tmp_path, train_dataset=data)


def test_what_cannot_be_precomputed_is_answered(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(pairs()))
    with pytest.raises(ValueError, match=r"needs the train dataset as a datasets.Dataset, got IterableDataset"):
        make(tmp_path, train_dataset=stream)
    broken = model()
    with torch.no_grad():
        cast(Tensor, broken.get_input_embeddings().weight)[9] = float("nan")
    with pytest.raises(ValueError, match=r"train\[\d+\]: the reference's log-prob is not a finite number"):
        make(tmp_path, broken)
    assert not shards(tmp_path)

    class Dropping(DataCollatorForPreference):
        def __call__(self, examples: Any) -> dict[str, Tensor]:
            return {k: v for k, v in super().__call__(examples).items() if k not in REFERENCE_COLUMNS}

    trainer = make(tmp_path / "collator", data_collator=Dropping(pad_token_id=0))
    with pytest.raises(ValueError, match="keep the columns ref_chosen_logps and ref_rejected_logps in a data collator"):
        trainer.train()


def test_nothing_is_computed_for_a_loss_without_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(tmp_path, loss_type="simpo")
    assert not (tmp_path / "ref_logps").exists()
    assert any("precompute_ref_log_probs is not used" in line for line in caplog.messages)


TWO = """
import importlib.util, os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("precompute_tests", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.logp_store.SHARD_ROWS = 4
trainer = module.make(Path(sys.argv[2]), ddp_find_unused_parameters=False, per_device_train_batch_size=1)
trainer.train()
if trainer.args.process_index == 0:
    torch.save(module.losses(trainer), sys.argv[2] + "/losses.pt")
torch.distributed.barrier()
os._exit(0)  # all is written; threads of gloo sometimes abort a process that ends by the book
"""


@pytest.mark.slow
def test_two_processes_compute_half_each(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, __file__, str(tmp_path / "two")], cwd=ROOT, env=environment, check=True, timeout=300)
    one = make(tmp_path / "one")
    one.train()
    assert len(shards(tmp_path / "two")) == 4
    for mine, other in zip(shards(tmp_path / "one"), shards(tmp_path / "two"), strict=True):
        for name, values in load_file(mine).items():
            torch.testing.assert_close(load_file(other)[name], values, rtol=1e-6, atol=0)
    assert torch.load(tmp_path / "two" / "losses.pt") == pytest.approx(losses(one), rel=1e-4)
