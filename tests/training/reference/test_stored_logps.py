"""Reference log-probs on disk: what they depend on, two runs in one folder, damaged files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.data.collate import REFERENCE_COLUMNS, DataCollatorForPreference
from fastdpo.files import write_atomic
from fastdpo.training.reference import logp_store
from fastdpo.training.reference.logp_store import StaleLogpsError
from precomputed_runs import adapted, columns, make, pairs, rows, shards, two_adapters
from tiny_runs import lora, model


@pytest.fixture(autouse=True)
def few_rows_in_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logp_store, "SHARD_ROWS", 4)


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

    def logps(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if seen is not None:
            seen.append("compute")
        return {name: torch.full((len(rows),), value) for name in (*REFERENCE_COLUMNS, "chosen_tokens")}

    return logp_store.Pass(logps, REFERENCE_COLUMNS, ("chosen_tokens",), {"max_length": value}, {}, 2, 0, 1, wait, True)


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
