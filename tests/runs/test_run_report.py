"""`fastdpo report`: one picture and one page of several runs, from what the runs wrote."""

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from transformers import TrainerState, TrainingArguments

from fastdpo.cli.report import main
from fastdpo.runs.pages import differing_arguments, final_metrics, read_runs
from fastdpo.training.report.metric_files import MetricsReport, metrics_csv

Report = Callable[..., tuple[int, str, str]]


def make_run(folder: Path, beta: float, steps: int = 4, finished: bool = True, quantiles: bool = False) -> str:
    """A run's metric files, written by the callback that training has."""
    history: list[dict[str, Any]] = [
        {
            "step": step,
            "epoch": step / 10,
            "loss": 0.7 - beta * step / 10,
            "rewards/chosen": beta * step,
            "rewards/rejected": -beta * step,
            "rewards/margins": 2 * beta * step,
            "grad_norm": 1.0,
            **({"rewards/margins_p10": -beta * step, "rewards/margins_p90": 4 * beta * step} if quantiles else {}),
        }
        for step in range(1, steps + 1)
    ]
    if not finished:
        (folder / "dpo_metrics").mkdir(parents=True)
        (folder / "dpo_metrics" / "training_metrics.csv").write_text(metrics_csv(history))
        return str(folder)
    history.append({"step": steps, "epoch": steps / 10, "eval_loss": 0.5, "eval_rewards/margins": beta})
    history.append({"step": steps, "epoch": steps / 10, "train_runtime": 7.5})
    details: dict[str, Any] = {
        "model": {"name_or_path": "a <b> model", "trained_as": "lora", "lora_r": 8},
        "reference": {"kind": "base"},
    }
    details["advice"] = (
        [{"step": 2, "rule": "stuck", "text": f"the loss stays <at> ln 2, beta {beta}"}] if quantiles else []
    )
    report = MetricsReport(details)
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", learning_rate=beta / 1000)
    args.beta = beta  # of DPOConfig, which the callback reads by name
    report.write(args, TrainerState(log_history=history, global_step=steps))
    return str(folder)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


class Page(HTMLParser):
    """Every tag with its attributes, the cells of each row, and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_two_runs_in_one_picture_and_one_page(report: Report, tmp_path: Path):
    runs = [make_run(tmp_path / name, beta) for name, beta in (("weak", 0.1), ("strong <1>", 0.3))]
    code, text, err = report(*runs, "--out", "pages/both.html", "--title", "a & b")
    assert code == 0, err
    assert "page: pages/both.html\ncurves: pages/both.png\n" in text
    png = (tmp_path / "pages" / "both.png").read_bytes()
    picture = matplotlib.image.imread(tmp_path / "pages" / "both.png")
    assert picture.shape[1] == 1200
    assert picture[..., :3].std() > 0.1
    html = (tmp_path / "pages" / "both.html").read_text()
    page = Page(html)
    # no file and no address beside the page
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "a"} == set()
    sources = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert [source.partition(",")[0] for source in sources] == ["data:image/png;base64"]
    assert base64.b64decode(sources[0].partition(",")[2]) == png
    assert not re.search(r"https?://|url\(|@import", html)
    assert "<title>a &amp; b</title>" in html
    assert page.rows[0] == ["", "weak", "strong <1>"]
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["loss"] == ["0.66", "0.58"]
    assert rows["rewards/margins"] == ["0.8", "2.4"]
    assert rows["eval_loss"] == ["0.5", "0.5"]
    assert rows["train_runtime (s)"] == ["7.5", "7.5"]
    assert rows["beta"] == ["0.1", "0.3"]
    assert rows["learning_rate"] == ["0.0001", "0.0003"]
    assert not {"model.name_or_path", "model.lora_r", "seed", "reference.kind"} & rows.keys()
    for row in ("loss", "beta"):
        assert re.search(rf"^{row} .*{rows[row][0]} .*{rows[row][1]}$", text, re.M)


def test_one_run_shows_all_its_arguments(report: Report, tmp_path: Path):
    # the folder of the metrics is as good as the run's
    run = make_run(tmp_path / "run", 0.1)
    code, text, err = report(run + "/dpo_metrics", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["runs"] == ["run"]
    assert found["arguments"]["model.name_or_path"] == ["a <b> model"]
    assert found["arguments"]["beta"] == [0.1]
    rows = {row[0]: row[1:] for row in Page((tmp_path / "fastdpo_report.html").read_text()).rows}
    assert rows["model.name_or_path"] == ["a <b> model"]
    assert (tmp_path / "fastdpo_report.png").is_file()


def test_a_run_that_still_trains_has_curves_and_says_what_it_lacks(report: Report, tmp_path: Path):
    runs = [make_run(tmp_path / "done", 0.1), make_run(tmp_path / "going", 0.2, steps=1, finished=False)]
    code, _, err = report(*runs)
    assert code == 0, err
    assert "No summary.json yet, so no arguments: going." in (tmp_path / "fastdpo_report.html").read_text()
    found = read_runs(runs)
    assert final_metrics(found)["step"] == [4, 1]
    assert differing_arguments(found)["beta"] == [0.1, None]


def test_quantiles_are_a_band_and_advice_is_told_again(report: Report, tmp_path: Path):
    pictures = []
    for quantiles in (False, True):
        run = make_run(tmp_path / "run", 0.1, quantiles=quantiles)
        code, _, err = report(run, "--out", "one.html")
        assert code == 0, err
        pictures.append(matplotlib.image.imread(tmp_path / "one.png")[..., :3])
    # the shade is a light colour that no line and no grid has; the panel's scale grows with it
    light = [((image.min(-1) > 0.8) & (image.max(-1) - image.min(-1) > 0.03)).sum() for image in pictures]
    assert light[1] > light[0] + 5000, light
    html = (tmp_path / "one.html").read_text()
    Page(html)
    assert "<li>run, step 2: the loss stays &lt;at&gt; ln 2, beta 0.1</li>" in html


def test_names_are_as_long_as_it_takes(tmp_path: Path):
    runs = [make_run(tmp_path / name / "output", 0.1) for name in ("a", "b")]
    assert [run.name for run in read_runs(runs)] == ["a/output", "b/output"]
    assert [run.name for run in read_runs(runs[:1])] == ["output"]


def test_a_dozen_runs_have_colours_of_their_own(report: Report, tmp_path: Path):
    runs = [make_run(tmp_path / f"run{index}", 0.1 + index / 100, finished=False) for index in range(12)]
    code, _, err = report(*runs, "--out", "many.html")
    assert code == 0, err


def test_wrong_input_is_one_sentence(report: Report, tmp_path: Path):
    run = make_run(tmp_path / "run", 0.1)
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, text in (("blank", "step,loss\n"), ("broken", "step,loss\n1,abc\n"), ("stepless", "loss\n0.5\n")):
        (tmp_path / name / "dpo_metrics").mkdir(parents=True)
        (tmp_path / name / "dpo_metrics" / "training_metrics.csv").write_text(text)
    bad = Path(make_run(tmp_path / "bad", 0.1))
    (bad / "dpo_metrics" / "summary.json").write_text("{")
    before = set(tmp_path.iterdir())
    for arguments, sentence in (
        ([], "RUN is missing"),
        ([tmp_path / "none"], "none does not exist"),
        ([empty], "empty is no run: it has no dpo_metrics/training_metrics.csv"),
        ([run, run], "run is given twice"),
        ([tmp_path / "blank"], "has not logged a step yet"),
        ([tmp_path / "broken"], "training_metrics.csv:2: wanted numbers, got ['1', 'abc']"),
        ([tmp_path / "stepless"], "training_metrics.csv:2: there is no step in this row"),
        ([bad], "summary.json is not JSON"),
        ([run, "--out", "page.pdf"], "--out should be a file that ends in .html, got page.pdf"),
        ([run, "--ouput", "x.html"], "there is no argument '--ouput': did you mean '--out'?"),
    ):
        code, text, err = report(*arguments)
        assert (code, text) == (2, ""), err
        assert sentence in err, err
        assert len(err.strip().splitlines()) == 1, err
    assert set(tmp_path.iterdir()) == before
