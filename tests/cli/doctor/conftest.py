"""`fastdpo doctor` in this process, on a machine whose switches are as a test sets them."""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FASTDPO_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(fastdpo: Run) -> Run:
    """run(*arguments): exit code, stdout and stderr of `fastdpo doctor`."""
    return partial(fastdpo, "doctor")


@pytest.fixture
def plan(run: Run) -> Callable[..., dict[str, Any]]:
    """plan(*arguments): the report as JSON, with one plan and no self-test."""

    def call(*arguments: str) -> dict[str, Any]:
        _, out, _ = run("--json", "--skip_self_test", "--train", "lora", *arguments)
        return json.loads(out)

    return call


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
