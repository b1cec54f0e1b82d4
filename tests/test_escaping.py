"""Names and texts from outside are shown and do nothing: in a model card, in answers.md, on a terminal, in a figure."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdpo.cli import main
from fastdpo.cli.compare import markdown
from fastdpo.escaping import figure_text, markdown_code, markdown_fence, markdown_text, visible
from fastdpo.runs.pages import read_runs, runs_png

HOSTILE = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](https://example.com/track.png)",
    "<javascript:alert(1)>",
    "javascript:alert(1)",
    "`code` ``more``",
    "a | b",
    "two\nlines\r\nthree\u2028four",
    "# not a heading",
    "\x1b]0;title\x07\x1b[2J",
    "a\u202eb",
    "quote \" and \\ and '",
    "&lt;script&gt;",
]


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(tag)


def is_plain(line: str) -> bool:
    """No element of HTML but <br>, and none of Markdown that is not escaped."""
    parser = Elements()
    parser.feed(line)
    unescaped = re.search(r"(?<!\\)(?:\\\\)*[`*\[\]|~]", line)
    return set(parser.found) <= {"br"} and unescaped is None and "javascript:" not in line and line.isprintable()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_a_line_of_markdown(text: str) -> None:
    shown = markdown_text(text, "<br>")
    assert is_plain(shown)
    assert not re.match(r"\s*(#+|[-+])\s", shown)
    # it reads the same, but for what is made visible
    letters = re.sub(r"\W|u202[0-9a-e]|x1b|x07", "", shown.replace("&#58;", ":").replace("<br>", "").replace("amp", ""))
    assert set("".join(re.findall(r"[a-z]+", text))) <= set(letters) | set("lgt")
    assert not is_plain("[x](y)")  # the check can fail


def test_plain_text_stays_as_it_is() -> None:
    for text in ("rewards/margins", "max_length 1,024 (cut)", "-0.5", "+1.25", "Wie groß? 東京!", "a.b-c_d"):
        assert markdown_text(text) == text
    assert visible("two\nlines\tand é") == "two\nlines\tand é"


@pytest.mark.parametrize("text", HOSTILE)
def test_code_and_fences_cannot_be_closed(text: str) -> None:
    code = markdown_code(text)
    ticks = re.match("`+", code)[0]
    assert code.endswith(ticks)
    assert ticks not in re.findall("`+", code[len(ticks) : -len(ticks)])
    assert "\n" not in code
    lines = markdown_fence(f"{text}\n```\n````\n", "python").split("\n")
    assert lines[0] == "`````python"
    assert [line for line in lines[1:] if line.startswith("`````")] == ["`````"]


def test_a_terminal_is_not_steered() -> None:
    assert visible("\x1b[2J\x07\x9b31m\u202eabc\r") == r"\x1b[2J\x07\x9b31m\u202eabc\r"


def test_answers_in_markdown() -> None:
    def answer(text: str) -> dict[str, Any]:
        return {"text": text, "reward": 0.5, "tokens": 3, "finished": True}

    summary = {"prompts": 1, "same_answer": 0, "policy_reward_higher": 1}
    summary |= {"mean_reward": {"reference": 0.0, "policy": 1.0}, "mean_tokens": {"reference": 3, "policy": 3}}
    rows = [{"prompt": text, "reference": answer(text), "policy": answer(text)} for text in HOSTILE]
    text = markdown({"answers": rows, "summary": summary, "policy": "[p](x)", "reference": "<b>", "beta": 0.1})
    lines = text.split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(HOSTILE)
    for line in table[2:]:
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        assert len(cells) == 5
        assert all(is_plain(cell) for cell in cells)
    assert all(is_plain(line[2:]) for line in lines if line.startswith("- "))


def test_a_model_card_of_hostile_names(make_trainer: Any, tmp_path: Path) -> None:
    folder = tmp_path / 'out"`<script>\nx: [a](javascript:b) ```'
    trainer = make_trainer(folder, max_steps=1, save_strategy="no")
    trainer.card_details = {"data": HOSTILE, "command": "fastdpo train -d 'a\n```\n<script>'", "base": "b`<i>`"}
    trainer.train()
    trainer.save_model()
    _, matter, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(matter)["model_name"] == folder.name
    # blocks of code hold what they hold; the rest has no element
    blocks = re.findall(r"^(`{3,})\w*\n.*?\n\1$", text, re.M | re.S)
    assert len(blocks) == 2
    rest = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", text, flags=re.M | re.S).replace("<!-- written by fastdpo -->", "")
    rest = re.sub(r"(`+) ?[^\n]*? ?\1(?!`)", "", rest)
    parser = Elements()
    parser.feed(rest)
    assert parser.found == []
    assert "javascript:" not in rest
    assert "\x1b" not in text
    assert len([line for line in text.split("\n") if line.startswith("# ")]) == 1


def test_the_command_shows_a_row_that_would_steer_the_terminal(
    train_command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the picture is written
    rows = [{"prompt": "w1 \x1b[2J", "chosen": " w2", "rejected": " \u202ew3"} for _ in range(4)]
    pairs = tmp_path / "a\x1b]0;owned\x07.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = train_command[train_command.index("-m") + 1]
    assert main(["inspect", str(pairs), "-m", model]) == 0
    shown = capfd.readouterr()
    assert main(["train", "-m", model, "-d", f"{pairs}.gone", "--output_dir", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert r"\x1b]0;owned\x07.jsonl.gone" in error
    for text in (*shown, error):
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_a_run_s_name_is_no_formula(make_trainer: Any, tmp_path: Path) -> None:
    assert figure_text("a$b$_{") == r"a\$b\$_{"
    folder = tmp_path / r"lr$\frac{$1"
    make_trainer(folder, max_steps=1, save_strategy="no").train()
    assert runs_png(read_runs([str(folder)])).startswith(b"\x89PNG")
