"""Configurations of other tools, as published, train a tiny model from the first key to the saved weights."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published_configs import PUBLISHED, RESULTS

WORDS = {
    "axolotl": "an axolotl",
    "handbook": "an alignment-handbook",
    "ms-swift": "an ms-swift",
    "unsloth": "an unsloth",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_trains(
    run: Callable[..., tuple[int, str, str]], write: Callable[..., str], model_dir: str, tmp_path: Path, name: str
):
    text, rows = PUBLISHED[name]
    out = tmp_path / "out"
    paths = {"MODEL": model_dir, "DATA": write("pairs.jsonl", *rows), "OUT": str(out)}
    for word, path in paths.items():
        text = text.replace(word, path)
    if text.startswith("--"):
        words: list[Any] = shlex.split(text)
    else:
        (tmp_path / "run.yaml").write_text(text)
        words = [tmp_path / "run.yaml"]
    code, stdout, stderr = run(*words, "--use_cpu")
    assert code == 0, stderr
    assert f"is {WORDS[name.split()[0]]} configuration" in stderr
    step, pairs, loss = RESULTS[name]
    assert f"trained to step {step} on {pairs} {'rows' if 'kto' in name else 'pairs'}" in stdout
    assert loss is None or f": loss {loss}" in stdout
    lora = any(word in text for word in ("lora_r", "lora_rank", "--r 4", "\nr: 4"))
    saved = out / ("adapter_model.safetensors" if lora else "model.safetensors")
    assert saved.is_file()
    if lora:
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
