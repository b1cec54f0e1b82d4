"""TRL's trainers with and without the patch: the same losses and metrics, and none of TRL's own tiles."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig

from fastdpo.integrations import trl_head
from fastdpo.integrations.trl import patch_trl

chunked_logprob: Any = pytest.importorskip("trl.kernels.chunked_logprob")


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("TRL's own tile function ran")


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of TRL's tile functions has run from here on."""
    counts = {"_forward_tile": 0, "_backward_tile": 0}

    def count(name: str, run: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        counts[name] += 1
        run(*args, **kwargs)

    for name in counts:
        monkeypatch.setattr(chunked_logprob, name, functools.partial(count, name, getattr(chunked_logprob, name)))
    return counts


CASES = {
    "dpo": ("dpo", {}),
    "dpo, frozen head, wpo weights": ("dpo", {"use_weighting": True, "peft_config": True}),
    "kto": ("kto", {}),
    "sft": ("sft", {}),
    "grpo, entropy bonus": ("grpo", {"max_steps": 4, "entropy_coef": 0.01}),
    "rloo": ("rloo", {"max_steps": 4}),
}


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES.keys())
def test_trl_s_trainers_give_the_same_and_run_none_of_trl_s_tiles(kind, options, tmp_path, monkeypatch, train, compare):
    if "peft_config" in options:
        options = {**options, "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    with monkeypatch.context() as no_tiles, patch_trl():
        no_tiles.setattr(chunked_logprob, "_forward_tile", refuse)
        no_tiles.setattr(chunked_logprob, "_backward_tile", refuse)
        ours = train(kind, tmp_path / "ours", **options)
        assert trl_head.EntropyOnDemand.asked_for == (kind == "grpo")
    counts = counted(monkeypatch)
    theirs = train(kind, tmp_path / "trl", **options)
    steps = options.get("max_steps", 20)
    assert counts["_forward_tile"] >= counts["_backward_tile"] >= steps
    compare(ours, theirs, steps)
    # the comparison means something: the runs move
    assert max(line["grad_norm"] for line in theirs) > 1e-2
    assert kind == "rloo" or abs(theirs[-1]["loss"] - theirs[0]["loss"]) > 1e-2
