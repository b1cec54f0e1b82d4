"""`patch_llama_factory` on and off, and what it refuses; no LLaMA-Factory is needed."""

import logging
import re
import sys
import types
from typing import Any

import pytest
from torch import Tensor

from fastdpo.integrations import llama_factory
from fastdpo.integrations.llama_factory import LlamaFactoryPatch, patch_llama_factory


def fake_llama_factory(monkeypatch: pytest.MonkeyPatch, version: str, **methods: Any) -> type:
    trainer = type("CustomDPOTrainer", (Base,), methods)
    module = types.SimpleNamespace(CustomDPOTrainer=trainer, get_batch_logps=None)
    monkeypatch.setitem(sys.modules, "llamafactory", types.SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "llamafactory.train.dpo.trainer", module)
    return trainer


class Base:
    """What CustomDPOTrainer inherits."""

    def __init__(self, model: Any, ref_model: Any) -> None: ...

    def train(self) -> str:
        return "trained"

    evaluate = predict = train

    def concatenated_forward(self, model: Any, batch: Any, is_ref_model: bool = False) -> dict[str, Tensor]: ...

    dpo_loss = simpo_loss = odds_ratio_loss = train


def test_without_llama_factory_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(
        ImportError, match=r"^patch_llama_factory needs LLaMA-Factory 0\.9\.3 to 0\.9\.5, and no .* imported .*\.$"
    ):
        patch_llama_factory()
    assert LlamaFactoryPatch._in_force == []


@pytest.mark.parametrize("version", ["0.8.3", "0.9.2", "0.9.6.dev0", "0.9.30", "1.0.0", "of long ago"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str):
    fake_llama_factory(monkeypatch, version)
    said = f"works with LLaMA-Factory 0.9.3 to 0.9.5, {version} is installed."
    with pytest.raises(ImportError, match=re.escape(said)):
        patch_llama_factory()


def test_a_trainer_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch):
    fake_llama_factory(monkeypatch, "0.9.5")
    monkeypatch.delattr(Base, "simpo_loss")
    with pytest.raises(ImportError, match=r"0\.9\.5 is installed, whose DPO trainer has no simpo_loss\.$"):
        patch_llama_factory()


def test_patches_nest_and_leave_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    trainer = fake_llama_factory(monkeypatch, "0.9.4", odds_ratio_loss=lambda self: 1)
    before = dict(vars(trainer))
    with caplog.at_level(logging.INFO, "fastdpo"):
        outer = patch_llama_factory()
        with pytest.raises(RuntimeError, match="inside"), patch_llama_factory():
            raise RuntimeError("inside")
    assert len(caplog.records) == 1
    assert trainer.dpo_loss is llama_factory.dpo_loss
    assert trainer(None, None).train() == "trained"
    outer.undo()
    outer.undo()
    assert dict(vars(trainer)) == before
    assert trainer.dpo_loss is Base.dpo_loss


def test_the_command_without_a_file_says_how(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["llama_factory", "train"])
    with pytest.raises(SystemExit, match=r"CONFIG\.yaml"):
        llama_factory.main()
