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
        if not set(LINKED) & set(path.parts)
    }
    assert named == there | {"fastdpo.bench", "fastdpo.kernels"}


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


# who may import whom: cli -> bench -> training -> data, modules -> losses, ops -> kernels
ALLOWED = {
    "kernels": set(),
    "ops": {"kernels"},
    "losses": set(),
    "modules": {"losses", "ops"},
    "integrations": {"modules", "losses", "ops", "training"},
    "data": set(),
    "demo": {"ops", "losses", "data", "training"},
    "training": {"data", "modules", "losses", "ops"},
    "bench": {"training", "data", "modules", "losses", "ops", "kernels"},
    "cli": {"bench", "training", "data", "modules", "losses", "ops", "demo"},
}


def layer_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    layer = parts[0] if parts[0] in LINKED else parts[1]
    return layer if layer in ALLOWED else None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "fastdpo" else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("fastdpo.")}
    return found


SOURCES = sorted((ROOT / "fastdpo").glob("**/*.py"))
SOURCES += [p for folder in LINKED for p in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", [p for p in SOURCES if layer_of(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path):
    layer = layer_of(path)
    assert layer
    allowed = ALLOWED[layer] | {layer}
    names = {n for n in imports_of(path) if n in ALLOWED}
    assert names <= allowed, f"{path.name} ({layer}) imports {sorted(names - allowed)}"


def test_the_suite_is_imported_under_one_name():
    # as `bench` by python -m bench.run, as `fastdpo.bench` by everybody else: never as both
    assert not [p.name for p in (ROOT / "bench").glob("*.py") if "bench" in imports_of(p)]
    code = "import sys, {0}.benchmark; print(sorted({{m.split('.')[0] for m in sys.modules if '{1}' in m.split('.')}}))"
    assert run_python(code.format("bench", "bench")) == "['bench']"
    assert run_python(code.format("fastdpo.bench", "bench")) == "['fastdpo']"


def test_the_definition_imports_nothing_of_ours():
    assert imports_of(ROOT / "fastdpo" / "ops" / "reference.py") == set()


def test_the_import_check_sees_a_wrong_import(tmp_path: Path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from fastdpo.cli import main\nimport fastdpo.training.config\nfrom fastdpo import modules\n")
    assert imports_of(wrong) == {"cli", "training", "modules"}


def test_every_module_imports():
    for path in SOURCES:
        if path.name == "__main__.py":
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("fastdpo", *parts) if parts[0] in LINKED else parts)
        importlib.import_module(name.removesuffix(".__init__"))
