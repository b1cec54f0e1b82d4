"""`fastdpo train` and `fastdpo inspect` on single answers with a label."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """24 answers, two thirds of them desirable."""
    path = tmp_path / "rows.jsonl"
    answers = [(f"w{i % 7 + 1}", f" w{i % 5 + 2}", i % 3 > 0) for i in range(24)]
    lines = [{"prompt": prompt, "completion": answer, "label": label} for prompt, answer, label in answers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def usual(train_command: list[str], tmp_path: Path) -> list[str]:
    model = train_command[train_command.index("-m") + 1]
    usual = ["-m", model, "--use_cpu", "--bf16", "false", "--max_steps", "4", "--logging_steps", "2"]
    return [*usual, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "run")]


@pytest.mark.parametrize("loss", ["kto", "bco", "apo_zero_unpaired"])
def test_a_run(run: Run, usual: list[str], rows: str, tmp_path: Path, loss: str) -> None:
    evaluation = ["--eval_dataset_name", rows, "--eval_strategy", "steps", "--eval_steps", "2"]
    code, out, err = run(*usual, "-d", rows, "--loss_type", loss, "--undesirable_weight", "2", *evaluation)
    assert code == 0, err
    assert "first row as it is trained on:" in err
    assert "  undesirable " in err
    assert ("  KL " in err) == (loss == "kto")
    assert "trained to step 4 on 24 rows in" in out
    assert "accuracy" not in out + err
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"trained on answers with a label with {loss.upper()} ([arXiv:" in card
    assert f"\n- {loss}\n- fastdpo\n" in card
    assert "| undesirable_weight | 2.0 |" in card
    assert "| rows | 24 |" in card
    summary = json.loads((tmp_path / "run" / "dpo_metrics" / "summary.json").read_text())
    assert summary["settings"]["undesirable_weight"] == 2
    assert summary["data"]["tokenized"]["train"]["truncated_completions"] == 0


def test_a_stream_and_pairs(run: Run, usual: list[str], rows: str, tmp_path: Path) -> None:
    code, out, err = run(*usual, "-d", rows, "--loss_type", "kto", "--streaming")
    assert code == 0, err
    assert "on 16 rows" in out
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": "w1", "chosen": f"w{i}", "rejected": "w2"}) + "\n" for i in range(3, 9))
    )
    code, out, err = run(*usual, "-d", str(pairs), "--loss_type", "kto", "--output_dir", str(tmp_path / "pairs"))
    assert code == 0, err
    assert "on 12 rows" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the rows are single answers with a label, and the loss sigmoid compares pairs; take loss_type kto, bco"),
        (["--loss_type", "kto", "--per_device_train_batch_size", "1"], "kto estimates its KL from answers under the"),
        (["--loss_type", "kto", "sft"], "kto in DPOConfig, alone, for single answers"),
        (["--loss_type", "kto", "--label_smoothing", "0.1"], "label_smoothing is for losses of pairs"),
    ],
)
def test_mistakes(run: Run, usual: list[str], rows: str, arguments: list[str], said: str) -> None:
    code, _, err = run(*usual, "-d", rows, *arguments)
    assert code == 2
    assert said in err


def test_inspect(fastdpo: Any, usual: list[str], rows: str, tmp_path: Path) -> None:
    model, picture = usual[1], str(tmp_path / "h.png")
    code, out, _ = fastdpo("inspect", rows, "-m", model, "--out", picture, "--row", "1", "--max_length", "2", "64")
    assert code == 0
    assert ": 24 unpaired rows of text" in out
    assert "  desirable               16  answers\n  undesirable              8  answers" in out
    assert "16 desirable and 8 undesirable answers weigh 2.00 to 1, and the KTO paper takes 1 to 4/3" in out
    assert "row 1 as it is trained on" in out
    assert "  desirable   1 token scored: >>>" in out
    code, out, _ = fastdpo("inspect", rows, "-m", model, "--out", picture, "--json")
    report = json.loads(out)
    assert (report["desirable"], report["undesirable"]) == (16, 8)
    assert set(report["lengths"]) == {"prompt", "completion", "sequence"}
    assert report["truncation"][0]["truncated_completions"] == 0
    assert "identical" not in report
