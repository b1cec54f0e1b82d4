"""Adapters as the policy: which one is trained, what it is called, and the best one at the end."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import TrainerCallback

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.adapters import choose_adapters
from fastdpo.training.reference.inside_policy import StartWeights
from fastdpo.training.trainer import DPOTrainer
from tiny_runs import (
    batch_of,
    by_definition,
    lora,
    losses,
    make,
    model,
    pairs,
    reference_logps,
    tokenizer,
    trained,
    two_adapters,
)

SIDES = ("prompt", "chosen", "rejected")


def test_adapters_that_cannot_be_trained_are_named(tmp_path: Path) -> None:
    for name in ("a/b", "a\\b", "a.b", "modules", "train", "keys", ""):
        with pytest.raises(ValueError, match=r"model_adapter_name is .*, which cannot name an adapter") as caught:
            choose_adapters(trained(), DPOConfig(output_dir=str(tmp_path), use_cpu=True, model_adapter_name=name))
        assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match="trained adapter's name is 'a/b', which cannot"):
        make(tmp_path, get_peft_model(model(), lora(), adapter_name="a/b"))
    merged = trained()
    cast(Any, merged).merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into the weights .* call unmerge_adapter\(\)"):
        make(tmp_path, merged)
    cast(Any, merged).unmerge_adapter()
    make(tmp_path, merged)


def test_best_named_adapter_is_loaded(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.after = getattr(self, "after", {})
            self.after[state.global_step] = policy.get_parameter(name).detach().clone()

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_wanted"] = {2: 2.0, 4: 1.0}[state.global_step]

    policy, watch = two_adapters(), Watch()
    name = next(n for n, p in policy.named_parameters() if "lora_B" in n and "dpo_train" in n)
    trainer = DPOTrainer(
        policy,
        args=DPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            disable_tqdm=True,
            max_steps=4,
            save_steps=2,
            eval_steps=2,
            eval_strategy="steps",
            load_best_model_at_end=True,
            metric_for_best_model="eval_wanted",
            learning_rate=1e-2,
            gradient_checkpointing=False,
            model_adapter_name="dpo_train",
            ref_adapter_name="reference",
        ),
        train_dataset=pairs(),
        eval_dataset=pairs(2),
        processing_class=tokenizer(),
        callbacks=[watch],
    )
    trainer.train()
    assert torch.equal(policy.get_parameter(name), watch.after[2])
    assert not torch.equal(policy.get_parameter(name), watch.after[4])
    assert policy.get_parameter(name).requires_grad


def test_trained_adapter_starts_as_trl_s(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    shared = {
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
    }
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    rows = [
        {name: " " + " ".join(f"w{1 + (7 * i + 11 * j * k) % 60}" for j in range(3, 9)) for k, name in enumerate(SIDES)}
        for i in range(8)
    ]
    logged = []
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)):
        args = config_class(output_dir=str(tmp_path / str(len(logged))), **shared)
        data = Dataset.from_list(rows)
        trainer = trainer_class(trained(), args=args, train_dataset=data, processing_class=words)
        trainer.train()
        logged.append(losses(trainer))
    ours, theirs = logged
    assert ours[0] == pytest.approx(math.log(2), abs=1e-7)
    assert len(set(ours)) == 3
    assert ours == pytest.approx(theirs, rel=5e-4)


def test_adapter_folder_as_model(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    adapter = str(_saved_adapter(tmp_path))
    args = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "disable_tqdm": True}
    config = DPOConfig(**args, model_adapter_name="again", max_steps=1, save_strategy="no")
    trainer = DPOTrainer(adapter, args=config, train_dataset=pairs())
    assert isinstance(trainer._reference, StartWeights)
    assert cast(PeftModel, trainer.model).active_adapters == ["again"]
    assert "the adapter 'again' as it was at the start" in trainer.reference_description
    assert trainer.reference_origin == {"kind": "start"}
    batch = batch_of(trainer)
    truth = by_definition(trained(), batch)
    torch.testing.assert_close(reference_logps(trainer, batch), truth, rtol=1e-5, atol=1e-5)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match="cannot load model"):
        DPOTrainer(adapter, args=config, train_dataset=pairs(), processing_class=tokenizer())


def _saved_adapter(folder: Path) -> Path:
    policy = trained()
    policy.peft_config["default"].base_model_name_or_path = str(folder / "base")
    policy.save_pretrained(folder / "adapter")
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    return folder / "adapter"


def test_an_adapter_that_is_not_named_is_not_the_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path, two_adapters())
    assert isinstance(trainer._reference, StartWeights)
    assert any("other adapters, which are not used: reference; ref_adapter_name makes" in m for m in caplog.messages)


def test_wrong_names_are_answered_in_one_sentence(tmp_path: Path) -> None:
    both = {"model_adapter_name": "dpo_train", "ref_adapter_name": "reference"}
    for options, words in (
        ({**both, "ref_adapter_name": "sft"}, "ref_adapter_name is 'sft'.* it has 'dpo_train', 'reference'"),
        ({**both, "model_adapter_name": "dpo"}, "model_adapter_name is 'dpo'.* no adapter of this name"),
        ({"ref_adapter_name": "dpo_train"}, "which is the adapter that is trained"),
        ({**both, "ref_model": model()}, "both name a reference; give one"),
    ):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, two_adapters(), **options)
    with pytest.raises(ValueError, match="and the model has no adapter; pass a PeftModel"):
        make(tmp_path, model(), ref_adapter_name="reference")
    policy = two_adapters()
    cast(Any, policy.base_model).set_adapter(["dpo_train", "reference"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        make(tmp_path, policy)
    policy = two_adapters()
    policy.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.weight is trained beside the adapter, so the reference 'reference'"):
        make(tmp_path, policy, **both)


def test_new_adapter_gets_the_name_asked_for(tmp_path: Path) -> None:
    trainer = make(tmp_path, model(), peft_config=lora(), model_adapter_name="mine", max_steps=1)
    assert cast(PeftModel, trainer.model).active_adapters == ["mine"]
    trainer.train()


def test_adapter_that_is_loaded_frozen_is_named(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="no weight of the adapter 'default' is trainable; load an adapter with"):
        make(tmp_path, frozen).train()
    # by its name it is made trainable
    frozen = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    trainer = make(tmp_path, frozen, model_adapter_name="default", max_steps=2)
    trainer.train()
    assert losses(trainer)[1] != losses(trainer)[0]
