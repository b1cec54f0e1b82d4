"""`fastdpo train --help`: fast, grouped, and complete; the table of fields that it is made of."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import transformers

from fastdpo.cli.train import fields, generate_fields

ROOT = Path(__file__).resolve().parents[3]


def test_help_is_fast_and_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from fastdpo.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    for arguments, shown, hidden in (
        (["--help"], "train", "--beta"),
        (["train", "--help"], "--beta", "--adam_epsilon"),
        (["train", "--help-all"], "--adam_epsilon", "fastdpo train --help-all"),
        (["train", "-m", "x", "-d", "y", "--bta", "1"], "did you mean '--beta'?", "usage"),
    ):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
            times.append(time.perf_counter() - start)
        assert done.returncode == (2 if "--bta" in arguments else 0), done.stderr
        assert shown in done.stdout + done.stderr
        assert hidden not in done.stdout + done.stderr
        assert min(times) < 0.5, f"{arguments}: {times}"


def test_main_help_has_groups_and_every_argument_is_in_help_all(run: Callable[..., tuple[int, str, str]]):
    code, main_help, _ = run("--help")
    assert code == 0
    for group in ("model:", "data:", "DPO:", "training:", "LoRA:", "evaluation:", "output:"):
        assert f"\n{group}\n" in main_help
    code, all_help, _ = run("--help-all")
    assert code == 0
    missing = [field.name for field in fields.FIELDS if f"--{field.name} " not in all_help]
    assert not missing
    assert all(f"--{field.name} " in main_help for field in fields.FIELDS if field.main)


def test_the_table_of_fields_equals_the_dataclasses():
    expected = {field.name: field for field in generate_fields.fields_of_dataclasses()}
    table = {field.name: field for field in fields.FIELDS}
    if transformers.__version__ != fields.TRANSFORMERS:
        # TrainingArguments changes with each release; what fastdpo defines must agree with any of them
        inherited = set(transformers.TrainingArguments.__dataclass_fields__) - set(
            generate_fields.DPOConfig.__annotations__
        )
        expected = {name: field for name, field in expected.items() if name not in inherited}
        table = {name: field for name, field in table.items() if name not in inherited}
    assert table == expected, "run python -m fastdpo.cli.train.generate_fields"
    assert all(field.help for field in table.values())
