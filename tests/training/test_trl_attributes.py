"""What scripts read from TRL's trainer and call at their end is there, with TRL's meaning."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.training.report.model_card import card_of
from fastdpo.training.trainer import DPOTrainer
from fastdpo.training.trl_attributes import ATTRIBUTES
from tiny_runs import lora, make, model


def test_values_are_those_of_the_config_and_the_reference(tmp_path: Path) -> None:
    trainer: Any = make(tmp_path, beta=0.3, loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.5], label_smoothing=0.0)
    assert (trainer.beta, trainer.loss_type, trainer.loss_types) == (0.3, ["sigmoid", "ipo"], ["sigmoid", "ipo"])
    assert trainer.loss_weights == [1.0, 0.5]
    assert trainer.is_peft_model is trainer.precompute_ref_logps is trainer.aux_loss_enabled is False
    assert trainer.pad_token_id == 0
    assert torch.equal(trainer.ref_model.lm_head.weight, trainer.model.lm_head.weight)
    assert trainer.ref_model is not trainer.model
    adapter: Any = make(tmp_path / "lora", peft_config=lora())
    assert adapter.ref_model is None
    assert adapter.is_peft_model is True
    with pytest.raises(AttributeError, match="beta is read when the trainer is made: give it to DPOConfig"):
        trainer.beta = 0.1


def test_the_names_are_trl_s(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    trainer: Any = make(tmp_path)
    source = inspect.getsource(trl.DPOTrainer.__init__)
    read = [name for name in ATTRIBUTES if f"self.{name} =" in source]
    assert len(read) >= 10
    for name in ATTRIBUTES:
        getattr(trainer, name)
    for name in ("push_to_hub", "create_model_card"):
        theirs, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (trl.DPOTrainer, DPOTrainer))
        assert list(ours)[: len(theirs)] == list(theirs) or name == "push_to_hub"


def test_a_card_takes_trl_s_arguments_and_transformers_own(tmp_path: Path) -> None:
    trainer = make(tmp_path, policy=model())
    trainer.create_model_card("x", "me/pairs", ["a"])
    card = (tmp_path / "README.md").read_text()
    assert "me/pairs" in card
    assert "model_name: x" in card
    assert "- a" in card
    trainer.create_model_card(model_name="x", dataset="me/others", language="en", finetuned_from="me/base")
    card = (tmp_path / "README.md").read_text()
    assert "me/others" in card
    assert "base_model: me/base" in card
    with pytest.raises(TypeError, match="unexpected keyword argument 'data_set'"):
        trainer.create_model_card(data_set="x")
    assert "dataset_args" in inspect.signature(card_of).parameters
