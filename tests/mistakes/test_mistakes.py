"""A table of mistakes: each gets its one sentence, its exit code, and leaves nothing half done behind.

The rows are in the YAML files beside this one; `conftest.answer` says what they mean.
"""

import re
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

KINDS = ("arguments", "yaml", "data", "models", "disks", "hostile")
TABLES: dict[str, list[dict[str, Any]]] = {
    kind: yaml.safe_load(Path(__file__).with_name(f"{kind}.yaml").read_text(encoding="utf-8")) for kind in KINDS
}
for row in TABLES["hostile"]:
    row.setdefault("seconds", 5)
ROWS = [pytest.param(row, id=f"{kind}: {row['name']}") for kind, table in TABLES.items() for row in table]


@pytest.mark.parametrize("mistake", ROWS)
def test_a_mistake_is_answered_in_one_sentence(mistake: dict[str, Any], answer: Callable[..., None]) -> None:
    package = mistake.get("needs_no")
    if package and find_spec(package):
        pytest.skip(f"{package} is installed")
    if "/proc/" in str(mistake) and not Path("/proc/self/mem").exists():
        pytest.skip("there is no /proc here")
    answer(mistake)


def kernel(sentence: str) -> str:
    """A sentence without its names, numbers and places: what it says, of whatever it says it."""
    return re.sub(r"'[^'\n]*'|`[^`]*`|\{\w+\}|--\w+|\b[\w./]*\.(?:ya?ml|jsonl?|csv)\b|[\d.]*\d", "_", sentence)


def test_the_tables_are_large_and_no_two_rows_say_the_same() -> None:
    assert sum(map(len, TABLES.values())) >= 60
    assert all(len(table) >= 12 for table in TABLES.values())
    rows = [row for table in TABLES.values() for row in table]
    sentences = Counter(kernel(row["says"]) for row in rows)
    assert [sentence for sentence, count in sentences.items() if count > 1] == []
    # every command is there, and both kinds of failure
    commands = {row["run"].split()[0].strip("{}") for row in rows}
    assert commands >= {"train", "inspect", "merge", "report", "compare", "doctor", "bench"}
    assert {row.get("code", 2) for row in rows} == {1, 2}
