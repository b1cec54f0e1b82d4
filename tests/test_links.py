"""Pages for readers: every link leads somewhere, and every file and module that they name is there."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")]
PAGES += sorted(ROOT.glob("docs/*.md"))
FORMS = [*sorted((ROOT / ".github").glob("**/*.yml")), ROOT / ".pre-commit-config.yaml"]
FOLDERS = "fastdpo|kernels|bench|tests|docs|examples"
# names of what an older release had, which CHANGELOG says
MOVED = {
    *("bench.tables", "fastdpo.cli.generate_fields"),
    *("fastdpo.training.config", "fastdpo.modules", "bench.plot", "bench.real"),
}


def without_code(text: str) -> str:
    """The text without fenced blocks and without what stands between backticks."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^()\s]+)\)", without_code(text))


def anchors(text: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    names: set[str] = set()
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        same = [name, *(f"{name}-{number}" for number in range(1, 100))]
        names.add(next(one for one in same if one not in names))
    return names


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """Links of a page that lead nowhere, or out of the project."""
    return [link for link in links(page.read_text()) if not _leads_somewhere(link, page, root)]


def _leads_somewhere(link: str, page: Path, root: Path) -> bool:
    if re.match(r"https?://", link):
        return True
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(root) or not target.exists():
        return False
    return not anchor or (target.suffix == ".md" and anchor in anchors(target.read_text()))


def names(text: str) -> Iterator[str]:
    """Paths of the project and modules that a text names: `fastdpo/files.py`, `python -m bench.run`, `fastdpo.ops`."""
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(rf"({FOLDERS})/[\w./-]*", code) or re.fullmatch(r"[\w/-]+\.(py|toml|yaml)", code):
            yield code
        if re.fullmatch(r"(fastdpo|bench)(\.\w+)+", code):
            yield code
    yield from re.findall(r"python -m ((?:fastdpo|bench)[\w.]*)", text)


def missing_names(page: Path, root: Path = ROOT) -> list[str]:
    return sorted({name for name in names(page.read_text()) if not _is_there(name, page, root)} - MOVED)


def _is_there(name: str, page: Path, root: Path) -> bool:
    if "/" in name or name.endswith((".py", ".toml", ".yaml")):
        # a bare file name is that of a file in a folder that the page speaks of
        return (root / name).exists() or (page.parent / name).exists() or ("/" not in name and _a_source(name, root))
    if name.startswith("bench"):
        path = root / name.replace(".", "/")
        return path.is_dir() or path.with_suffix(".py").is_file()
    return _module_or_attribute(name)


def _a_source(name: str, root: Path) -> bool:
    return any(next(root.glob(f"{folder}/**/{name}"), None) for folder in FOLDERS.split("|"))


def _module_or_attribute(name: str) -> bool:
    try:
        if find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    import fastdpo

    return name.removeprefix("fastdpo.") in fastdpo.__all__


def missing_parts(page: Path, root: Path = ROOT) -> list[str]:
    """Of steps as "1. `file.py`: ... `NAME`": functions and constants that the file does not have."""
    missing = []
    for path, rest in re.findall(r"^\d+\. `([\w/]+\.py)`(.*(?:\n   .*)*)", page.read_text(), re.M):
        code = (root / path).read_text()
        parts = re.findall(r"`(test_\w+|[A-Z][A-Z_]{2,}|[A-Z]\w+)`", rest)
        missing += [f"{path}: {part}" for part in parts if not re.search(rf"\b{part}\b", code)]
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [*PAGES, *FORMS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_is_named_is_there(page: Path):
    assert missing_names(page) == []


def test_steps_name_what_their_files_have():
    assert missing_parts(ROOT / "docs/architecture.md") == []


def test_every_page_can_be_reached_from_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        texts = [(page, page.read_text()) for page in new]
        targets = {(page.parent / link.partition("#")[0]).resolve() for page, text in texts for link in links(text)}
        new = {target for target in targets if target.suffix == ".md" and target.is_file()} - reached
    assert reached >= set(PAGES)


def test_links_and_names_that_are_wrong_are_seen(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/other.md").write_text("# A loss\n\n## `code` and, words\n\n## A loss\n```\n# no heading\n```\n")
    page = tmp_path / "docs/page.md"
    good = ["other.md#a-loss", "other.md#code-and-words", "other.md#a-loss-1", "https://example.org/x", "../docs"]
    wrong = ["absent.md", "other.md#no-heading", "#here", "../../outside.md", "other.md#a-loss-2"]
    page.write_text("".join(f"[x\ny]({link}) ![z]({link})\n" for link in good + wrong) + "`[x](in-code.md)`\n")
    assert sorted(set(broken_links(page, tmp_path))) == sorted(wrong)
    page.write_text(
        "`fastdpo/absent.py` `other.md` `absent.py` `kernels/` python -m bench.absent `fastdpo.absent.module` "
        "`fastdpo.ops` `fastdpo.linear_logprob` `bench.real`\n"
    )
    assert missing_names(page, tmp_path) == [
        *("absent.py", "bench.absent", "fastdpo.absent.module", "fastdpo/absent.py", "kernels/")
    ]


def test_a_step_that_names_what_is_elsewhere_is_seen(tmp_path: Path):
    (tmp_path / "a.py").write_text("CASES = [1]\n\n\ndef test_it(): ...\n")
    page = tmp_path / "page.md"
    page.write_text("1. `a.py`: a row of `CASES`, as `test_it`\n   and `test_that`, has.\n2. `a.py`: `NAMES`.\n")
    assert missing_parts(page, tmp_path) == ["a.py: test_that", "a.py: NAMES"]


def test_hooks_fetch_nothing():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in hooks} == {"local"}
    assert {hook["language"] for repo in hooks for hook in repo["hooks"]} == {"system"}


def test_a_bug_report_asks_for_what_doctor_says():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text())
    fields = {field["id"]: field for field in form["body"]}
    assert "fastdpo doctor --json" in fields["doctor"]["attributes"]["label"]
    assert all(field["validations"]["required"] for field in fields.values())
    assert len(fields) == len(form["body"]) == 4
