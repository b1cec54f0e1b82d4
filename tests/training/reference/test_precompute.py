"""Precomputed reference log-probs: equal to those computed in training, never used where they do not belong."""

import gc
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
from datasets import IterableDataset
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback

from fastdpo.data.collate import REFERENCE_COLUMNS, DataCollatorForPreference
from fastdpo.training.reference import logp_store
from fastdpo.training.reference.inside_policy import AdapterOff, OtherAdapter, StartingPolicy
from fastdpo.training.reference.logp_store import StaleLogpsError
from fastdpo.training.reference.precomputed import PrecomputedReference, columns_of_rows
from precomputed_runs import columns, make, pairs, shards, two_adapters
from tiny_runs import ENVIRONMENT, ROOT, lora, losses, model


@pytest.fixture(autouse=True)
def few_rows_in_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logp_store, "SHARD_ROWS", 4)


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
    reference = stored._reference
    assert isinstance(reference, PrecomputedReference)
    assert type(reference.source) is (source or type(None))
    online = make(tmp_path / "online", make_policy(), **{**options, "precompute_ref_log_probs": False})
    rows = [cast(dict, row) for row in pairs()]
    # another batch size, so another padding
    computed = columns_of_rows(online, online._reference, rows)
    for name in REFERENCE_COLUMNS:
        torch.testing.assert_close(columns(stored)[name], computed[name], rtol=1e-6, atol=1e-6)
        assert (computed[name] != 0).any()
    files = [load_file(path) for path in shards(tmp_path / "stored")]
    assert [len(file["chosen_tokens"]) for file in files] == [4, 4, 4, 2]
    for name in ("chosen_tokens", "rejected_tokens"):
        assert torch.equal(torch.cat([file[name] for file in files]), computed[name])
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
    command = [sys.executable, "-c", KILLED, __file__, str(tmp_path / "killed")]
    assert subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert len(shards(tmp_path / "killed")) == 2
    whole, continued = columns(make(tmp_path / "whole")), columns(make(tmp_path / "killed"))
    for name, values in whole.items():
        torch.testing.assert_close(continued[name], values, rtol=1e-6, atol=0)


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


def test_once_training_begins_the_policy_is_not_asked_for_the_start(tmp_path: Path) -> None:
    """Also where it ends before the first step: a checkpoint's weights may be in it by then."""

    class Stop(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("before the first step")

    trainer = make(tmp_path)
    trainer.callback_handler.callbacks.insert(0, Stop())
    with pytest.raises(RuntimeError, match="before the first step"):
        trainer.train()
    with pytest.raises(ValueError, match="a batch has no precomputed reference log-probs"):
        trainer.evaluate(cast(Any, pairs(3)))


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
    subprocess.run([*launcher, __file__, str(tmp_path / "two")], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    one = make(tmp_path / "one")
    one.train()
    assert len(shards(tmp_path / "two")) == 4
    for mine, other in zip(shards(tmp_path / "one"), shards(tmp_path / "two"), strict=True):
        for name, values in load_file(mine).items():
            torch.testing.assert_close(load_file(other)[name], values, rtol=1e-6, atol=0)
    assert torch.load(tmp_path / "two" / "losses.pt") == pytest.approx(losses(one), rel=1e-4)
