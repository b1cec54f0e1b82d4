"""The tree: the links and the mappings of kernels/ and bench/, cheap imports, and imports that run one way."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdpo

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
LINKED = ("kernels", "bench")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", LINKED)
def test_a_plain_folder_is_behind_each_link(name: str):
    assert os.readlink(ROOT / "fastdpo" / name) == f"../{name}"
    # with an __init__.py, a bare `kernels` would shadow Hugging Face's package from the project's root
    assert not (ROOT / name / "__init__.py").exists()
    assert f'"fastdpo.{name}" = "{name}"' in PROJECT


def test_tests_are_no_packages():
    assert not list(ROOT.glob("tests/**/__init__.py"))
    assert not (ROOT / "tests" / "kernels").exists()


def test_transformers_imports_from_the_projects_root():
    assert (
        run_python("from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)") == "LlamaForCausalLM"
    )


def test_every_package_is_named_in_pyproject():
    named = set(re.findall(r'^    "(fastdpo[\w.]*)",$', PROJECT, re.M))
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "fastdpo").glob("**/__init__.py")
        if not set(LINKED) & set(path.relative_to(ROOT).parts)
    }
    for folder in LINKED:
        there |= {
            ".".join(("fastdpo", *path.parent.relative_to(ROOT).parts)) for path in ROOT.glob(f"{folder}/**/*.py")
        }
    assert named == there - {"fastdpo.bench.pytest_cases"}


def test_public_names_exist_and_are_listed_once():
    assert sorted(set(fastdpo.__all__)) == sorted(fastdpo.__all__)
    for name in fastdpo.__all__:
        assert getattr(fastdpo, name) is not None
    assert set(fastdpo.__all__) <= set(dir(fastdpo))
    with pytest.raises(AttributeError, match="no attribute 'linear_logits'"):
        fastdpo.linear_logits  # noqa: B018
    assert f'version = "{fastdpo.__version__}"' in PROJECT


def test_import_is_cheap():
    heavy = run_python(
        "import sys, fastdpo; print([m for m in ('torch', 'transformers', 'peft', 'triton') if m in sys.modules])"
    )
    assert heavy == "[]"
    op = run_python(
        "import sys, fastdpo; fastdpo.linear_logprob; fastdpo.FusedLinearDPOLoss; "
        "print([m for m in ('transformers', 'peft', 'datasets', 'trl') if m in sys.modules])"
    )
    assert op == "[]"
    seconds = run_python(
        "import time, torch; from torch.utils import weak; a = time.perf_counter(); "
        "import fastdpo; fastdpo.linear_logprob; fastdpo.DPOLoss; print(time.perf_counter() - a)"
    )
    assert float(seconds) < 0.5  # about 0.02 on an idle machine


# who may import whom, from the ground up: a folder imports from those above it in this list and from itself
ORDER = (
    {"files", "json_text", "wording", "escaping", "versions"},
    {"kernels"},
    {"ops"},
    {"losses", "data"},
    {"config"},
    {"models"},
    {"integrations", "training"},
    {"runs", "demo"},
    {"bench"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fastdpo", *parts) if parts[0] in LINKED else parts).removesuffix(".__init__")


SOURCES = sorted((ROOT / "fastdpo").glob("**/*.py"))
SOURCES = [path for path in SOURCES if not set(LINKED) & set(path.relative_to(ROOT).parts[:-1])]
SOURCES += [p for folder in LINKED for p in sorted((ROOT / folder).glob("**/*.py")) if "pytest_cases" not in p.parts]
MODULES = {module_name(path): path for path in SOURCES}


def imports_of(path: Path, name: str = "") -> set[str]:
    """The modules of ours that a file imports anywhere in it, below `if TYPE_CHECKING` and in functions too.

    name: the file's own module, to which relative imports are relative.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name.startswith("fastdpo")}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            if module.split(".")[0] == "fastdpo":
                inner = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
                imported |= inner | ({module} if len(inner) < len(node.names) else set())
    return imported


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, over others or not: what is left without those that import nothing left, and
    those that nothing left imports."""
    left = {name: targets & graph.keys() for name, targets in graph.items()}
    while True:
        imported = set().union(*left.values())
        inner = {name for name, targets in left.items() if targets and name in imported}
        if len(inner) == len(left):
            return sorted(left)
        left = {name: left[name] & inner for name in inner}


GRAPH = {name: imports_of(path, name) for name, path in MODULES.items()}


def test_nothing_imports_in_a_circle():
    # the package's own names are imported when they are first used
    assert circles({name: targets for name, targets in GRAPH.items() if name != "fastdpo"}) == []


def test_imports_run_one_way():
    upward = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if (here := name.split(".")[1:2]) and (there := target.split(".")[1:2])
        if here != there and LEVEL.get(there[0], 0) >= LEVEL.get(here[0], len(ORDER))
    ]
    assert upward == []


def test_every_folder_has_its_place_in_the_order():
    assert {name.split(".")[1] for name in MODULES if "." in name} == LEVEL.keys() | {"__main__"}


def test_the_import_checks_see_a_wrong_import(tmp_path: Path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fastdpo.cli import main, errors\n"
        "def late():\n    import fastdpo.config.dpo_config\n    from . import metrics\nfrom ..batches import plan\n"
    )
    assert imports_of(wrong, "fastdpo.training.report.wrong") == {
        *("fastdpo.cli", "fastdpo.cli.errors", "fastdpo.config.dpo_config"),
        *("fastdpo.training.report.metrics", "fastdpo.training.batches.plan"),
    }
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": {"elsewhere"}}) == []


def test_source_files_and_folders_stay_small():
    files = [*SOURCES, *sorted(ROOT.glob("tests/**/*.py"))]
    long = {str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > 400}
    assert long == set()
    folders = [path.parent for path in SOURCES]
    assert {folder.name for folder in folders if folders.count(folder) > 21} == set()  # 20 and an __init__.py


def test_the_suite_is_imported_under_one_name():
    # as `bench` by python -m bench.run, as `fastdpo.bench` by everybody else: never as both
    absolute = re.compile(r"^\s*(from|import) (fastdpo\.)?bench\b", re.M)
    assert not [str(path) for path in (ROOT / "bench").glob("**/*.py") if absolute.search(path.read_text())]
    code = "import sys, {0}.benchmark; print(sorted({{m.split('.')[0] for m in sys.modules if '{1}' in m.split('.')}}))"
    assert run_python(code.format("bench", "bench")) == "['bench']"
    assert run_python(code.format("fastdpo.bench", "bench")) == "['fastdpo']"


def test_the_definition_imports_nothing_of_ours():
    assert GRAPH["fastdpo.ops.reference"] == set()


def test_every_module_imports():
    for name in MODULES:
        if name != "fastdpo.__main__":
            importlib.import_module(name)
