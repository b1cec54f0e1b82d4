"""Rows are normalized once, and whatever a caller makes of them is looked at again."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk

from fastdpo.cli import main
from fastdpo.data import formats
from fastdpo.data.formats import DataError, is_normalized, load_preferences, normalize_dataset
from fastdpo.data.mixtures import DatasetSpec, load_mixture, mix, split_off

CHAT = {
    "prompt": [{"role": "user", "content": "Hi."}],
    "chosen": [{"role": "assistant", "content": "Hello."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def write(path: Path, count: int, **more: Any) -> str:
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}", **more} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def normalized_rows(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every row that is normalized from now on."""
    rows: list[Any] = []
    stored = formats._stored
    monkeypatch.setattr(formats, "_stored", lambda row, *more: rows.append(row) or stored(row, *more))
    return rows


def test_the_command_normalizes_each_row_once(train_command: list[str], normalized_rows: list[Any], tmp_path: Path):
    evaluation = ["--eval_dataset_name", write(tmp_path / "eval.jsonl", 2), "--eval_strategy", "epoch"]
    assert main([*train_command, *evaluation]) == 0
    assert len(normalized_rows) == 18 + 2


def test_what_is_loaded_mixed_and_split_is_not_normalized_again(tmp_path: Path, normalized_rows: list[Any]):
    a, b = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 6, tools='[{"name": "f"}]')
    specs = [DatasetSpec(a, fraction=1.0), DatasetSpec(b, fraction=1.0)]
    options: dict[str, Any] = {"data_scale_rate": 0.5, "max_samples": 3}
    for dataset in (load_mixture(specs), load_mixture(specs, **options), load_mixture([DatasetSpec(a)] * 2)):
        train, test = split_off(dataset, 2)
        normalized_rows.clear()
        for part in (dataset, train, test):
            assert normalize_dataset(part) is part
        assert normalized_rows == []


def test_a_mixture_of_rows_that_nobody_looked_at_is_not_marked(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", 3)
    raw = Dataset.from_list([{"prompt": "q", "chosen": "good", "rejected": ""}])
    mixture = mix([load_preferences(a), raw], [DatasetSpec(a), DatasetSpec("raw")])
    assert not is_normalized(mixture)
    with pytest.raises(DataError, match=r"train_dataset\[3\]: `rejected` is empty"):
        normalize_dataset(mixture)
    assert not any(is_normalized(part) for part in split_off(raw.select([0, 0, 0]), 1))


@pytest.mark.parametrize("same", [copy.copy, copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_a_copy_keeps_the_mark(tmp_path: Path, same: Callable[[Dataset], Dataset]):
    copied = same(load_preferences(write(tmp_path / "a.jsonl", 3)))
    assert normalize_dataset(copied) is copied


def with_transform_in_place(dataset: Dataset) -> Dataset:
    dataset.set_transform(lambda batch: {**batch, "rejected": [""] * len(batch["rejected"])})
    return dataset


@pytest.mark.parametrize(
    "spoil",
    [
        lambda dataset: dataset.map(lambda row: {"rejected": ""}),
        lambda dataset: dataset.map(lambda batch: {"rejected": [""] * len(batch["rejected"])}, batched=True),
        lambda dataset: dataset.remove_columns("rejected").add_column("rejected", [""] * len(dataset)),
        lambda dataset: dataset.with_transform(lambda batch: {**batch, "rejected": [""] * len(batch["rejected"])}),
        with_transform_in_place,
        lambda dataset: concatenate_datasets([dataset, dataset.map(lambda row: {"rejected": ""})]),
        lambda dataset: dataset.add_item({"prompt": "q", "chosen": "good", "rejected": ""}),
    ],
    ids=["map", "batches", "column", "transform", "transform in place", "concatenated", "item"],
)
def test_changed_rows_are_looked_at_again(tmp_path: Path, spoil: Callable[[Dataset], Dataset]):
    dataset = spoil(load_preferences(write(tmp_path / "a.jsonl", 3)))
    with pytest.raises(DataError, match="`rejected` is empty"):
        normalize_dataset(dataset)


def test_columns_of_other_names_are_looked_at_again(tmp_path: Path):
    dataset = load_preferences(write(tmp_path / "a.jsonl", 3))
    with pytest.raises(DataError, match="missing column `rejected`"):
        normalize_dataset(dataset.rename_column("rejected", "worse"))


@pytest.mark.parametrize(
    "taken",
    [
        lambda dataset, folder: dataset.select([2, 0]),
        lambda dataset, folder: dataset.shuffle(seed=0),
        lambda dataset, folder: dataset.filter(lambda row: True),
        lambda dataset, folder: dataset.save_to_disk(folder) or load_from_disk(folder),
    ],
    ids=["select", "shuffle", "filter", "saved"],
)
def test_normalizing_again_what_a_caller_took_changes_nothing(tmp_path: Path, taken: Callable[..., Dataset]):
    for name, rows in (
        ("text", load_preferences(write(tmp_path / "a.jsonl", 3))),
        ("chat", Dataset.from_list([CHAT] * 3)),
    ):
        dataset = taken(normalize_dataset(rows), str(tmp_path / name))
        assert not is_normalized(dataset)
        again = normalize_dataset(dataset)
        assert is_normalized(again)
        assert again.to_list() == dataset.to_list()
