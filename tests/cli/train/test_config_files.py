"""Files of arguments that are too deep, too large, or stand for more than they hold: a sentence, at once."""

import time
from pathlib import Path

import pytest

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.config_files import read_config

MERGES = "lora: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("run.yaml", "beta: " + "[" * 5000 + "]" * 5000, "run.yaml is nested more than 100 deep"),
        ("run.yaml", "".join(" " * depth + "a:\n" for depth in range(1200)), "run.yaml is nested more than 100 deep"),
        ("run.yaml", "beta: " + "[" * 101 + "]" * 101, "run.yaml is nested more than 100 deep"),
        ("run.yaml", MERGES, "aliases"),
        ("run.yaml", "beta: &a [*a]", "aliases"),
        ("run.yaml", "beta: " + "9" * 5000, "run.yaml has a value that cannot be read: Exceeds the limit"),
        ("run.yaml", "# " + "x" * 2**20, "has 1.05 MB, which no file of arguments has"),
        ("run.json", '{"beta": ' + "[" * 100_000 + "]" * 100_000 + "}", "run.json cannot be read: JSON nested more"),
        (
            "run.json",
            '{"beta": ' + "9" * 5000 + "}",
            "JSON with an integer of too many digits",
        ),
    ],
    ids=["list", "block", "a little", "merges", "itself", "digits", "large", "json", "json digits"],
)
def test_a_hostile_file_gets_its_sentence_at_once(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    begin = time.monotonic()
    with pytest.raises(UsageError, match=says) as caught:
        read_config(path)
    assert time.monotonic() - begin < 5
    assert len(str(caught.value)) < 400 + len(str(path))


def test_aliases_and_merges_of_a_usual_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr_scheduler_kwargs: &a {x: 1, y: [1, 2]}\nmodel_init_kwargs: {<<: *a, z: *a}\n")
    values = {entry.name: entry.value for entry in read_config(path)}
    assert values["model_init_kwargs"] == {"x": 1, "y": [1, 2], "z": {"x": 1, "y": [1, 2]}}
