"""README and docs: Python blocks run, tables are what bench/results says, commands are the ones that are tested."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_blocks_run():
    code = {name: blocks(text, "python") for name, text in PAGES.items() if blocks(text, "python")}
    assert {name: len(some) for name, some in code.items()} == {"README.md": 1, "docs/losses.md": 2}
    assert run(code["README.md"][0]) == ""
    printed = [run(block) for block in code["docs/losses.md"]]
    assert printed[0].startswith("tensor([")
    assert printed[1] == "tensor([0.5544])\n"


def test_blocks_that_are_not_run_compile():
    code = {name: blocks(text, "python no-run") for name, text in PAGES.items()}
    assert code["README.md"] == code["docs/trainer.md"]
    for name, some in code.items():
        for block in some:
            compile(block, name, "exec")


def test_yaml_blocks_are_read():
    some = [block for text in PAGES.values() for block in blocks(text, "yaml")]
    assert [yaml.safe_load(block).keys() for block in some] == [{"datasets", "test_split_size"}]


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 150


def test_the_two_commands_are_exact():
    start = "python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e "
    assert f"{start}. && fastdpo train --demo\n" in README
    assert f'{start}".[test]" && pytest\n' in README


@pytest.mark.parametrize(
    ("page", "number", "other"),
    [
        ("README.md", "| Llama 4x256, 4 pairs", "| Llama 4x256, 5 pairs"),
        ("docs/benchmarks.md", "| Llama 4x256, 4 pairs", "| Llama 4x256, 5 pairs"),
        ("docs/benchmarks.md", "| 512x512x32000", "| 513x512x32000"),
    ],
)
def test_the_tables_are_rendered_from_results(page: str, number: str, other: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.show import readme as tables

    text = PAGES[page]
    assert tables.newest("cpu") is not None
    assert tables.rendered(text, page) == text, "run `python -m bench.show.readme`"
    with_other_number = text.replace(number, other)
    assert with_other_number != text
    assert tables.rendered(with_other_number, page) == text
