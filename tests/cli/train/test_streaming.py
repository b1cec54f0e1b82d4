"""`fastdpo train --streaming`: pairs are read as they come, and train as they do when they are read at once."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset

from fastdpo.cli import main
from fastdpo.data.errors import DataError
from fastdpo.data.formats import load_preferences, stream_preferences
from fastdpo.data.mixtures import DatasetSpec, stream_mixture


def row(index: int) -> dict[str, Any]:
    return {"prompt": f"w{index % 7 + 1}", "chosen": f" w{index % 5 + 1}", "rejected": f" w{index % 3 + 9}"}


def write(path: Path, rows: list[Any]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "dpo_metrics" / "log_history.json").read_text())
    return [line["loss"] for line in log if "loss" in line]


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "*.jsonl"])
def test_a_stream_trains_as_the_pairs_in_their_order_do(train_command: list[str], tmp_path: Path, name: str) -> None:
    rows = [row(index) for index in range(30)]
    if name == "*.jsonl":
        write(tmp_path / "a.jsonl", rows[:20]), write(tmp_path / "b.jsonl", rows[20:])
    else:
        write(tmp_path / name, rows)
    start = train_command[: train_command.index("-d")]
    model = train_command[train_command.index("-m") + 1]
    usual = ["-m", model, "-d", str(tmp_path / name), "--use_cpu", "--max_steps", "4", "--logging_steps", "1"]
    usual += [
        "--per_device_train_batch_size",
        "2",
        "--learning_rate",
        "1e-2",
        "--bf16",
        "false",
        "--save_strategy",
        "no",
    ]
    assert start
    assert main(["train", *usual, "--output_dir", str(tmp_path / "s"), "--streaming"]) == 0
    sequential = ["--train_sampling_strategy", "sequential"]
    assert main(["train", *usual, "--output_dir", str(tmp_path / "w"), *sequential]) == 0
    assert losses(tmp_path / "s") == pytest.approx(losses(tmp_path / "w"), rel=1e-6)


def test_rows_are_those_that_are_read_at_once(tmp_path: Path) -> None:
    chat = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b", "x": {"y": None}}],
    }
    path = write(tmp_path / "a.jsonl", [{**chat, "rejected": chat["chosen"], "tools": []}] * 3)
    stream = stream_preferences(path)
    for _ in range(2):  # every epoch
        whole = load_preferences(path).to_list()
        assert [{name: one[name] for name in whole[0]} for one in stream] == whole


def test_bad_rows_are_named_when_they_are_reached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", [row(0), row(1), {"prompt": "x"}, row(3), 5])
    stream = iter(stream_preferences(path))
    assert next(stream)["prompt"] == "w1"
    assert next(stream)["prompt"] == "w2"
    with pytest.raises(DataError, match=r"a\.jsonl:3: missing column `chosen`"):
        next(stream)
    assert len(list(stream_preferences(path, skip_bad_rows=True))) == 3
    assert any(r"a.jsonl:3: skipped: missing column `chosen`" in line for line in caplog.messages)
    assert any(line.endswith("(2 bad rows so far)") for line in caplog.messages)
    with pytest.raises(DataError, match="is empty; wanted preference rows"):
        stream_preferences(write(tmp_path / "none.jsonl", []))


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    """What is after the rows that are taken is not read: it may be on its way still."""
    path = tmp_path / "a.jsonl"
    write(path, [row(index) for index in range(5000)])
    path.write_bytes(path.read_bytes() + b"\xff not read \n")
    stream = stream_preferences(str(path))
    assert isinstance(stream, IterableDataset)
    assert len(list(stream.take(100))) == 100


def test_a_mixture_is_drawn_in_its_shares(tmp_path: Path) -> None:
    specs = [
        DatasetSpec(write(tmp_path / f"{name}.jsonl", [{**row(0), "prompt": name}] * 400), fraction=share)
        for name, share in (("a", 0.8), ("b", 0.2))
    ]
    taken = [one["prompt"] for one in stream_mixture(specs).take(300)]
    assert taken.count("a") / 300 == pytest.approx(0.8, abs=0.08)
    whole = [one["prompt"] for one in stream_mixture([DatasetSpec(spec.path) for spec in specs], max_samples=3)]
    assert whole == ["a"] * 3 + ["b"] * 3
    with pytest.raises(DataError, match="has no fraction, and other datasets have"):
        stream_mixture([specs[0], DatasetSpec(specs[1].path)])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "dataset_streaming needs max_steps"),
        (["--max_steps", "2", "--test_split_size", "2"], "test_split_size needs all of the pairs"),
        (["--max_steps", "2", "--data_scale_rate", "0.5"], "data_scale_rate needs all of the pairs"),
        (["--max_steps", "2", "--precompute_ref_log_probs"], "precompute_ref_log_probs needs all of the pairs"),
        (["--max_steps", "2", "--max_tokens_per_batch", "64"], "max_tokens_per_batch needs all of the pairs"),
    ],
)
def test_what_needs_all_pairs_is_refused(
    train_command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    model = train_command[train_command.index("-m") + 1]
    data = write(tmp_path / "a.jsonl", [row(0)])
    out = str(tmp_path / "out")
    assert main(["train", "-m", model, "-d", data, "--use_cpu", "--streaming", "--output_dir", out, *more]) == 2
    assert says in capsys.readouterr().err
