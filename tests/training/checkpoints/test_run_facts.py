"""A resumed run says what differs from the run of its checkpoint, and refuses other data unless asked by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo.training.checkpoints.content_hashes import MANIFEST
from fastdpo.training.checkpoints.folders import STATE_NAME, CheckpointError
from fastdpo.training.checkpoints.run_facts import differences, facts_at_start


@pytest.fixture
def started(make_trainer: Any, tmp_path: Path) -> Any:
    """A run that has a checkpoint of step 2, and what makes its trainer again, with other options."""

    def again(**options: Any) -> Any:
        return make_trainer(tmp_path, **{"save_steps": 2, "max_steps": 3, **options})

    again(max_steps=2).train()
    return again


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "this run differs from the checkpoint's" in line]


def test_every_argument_that_differs_is_named(started: Any, caplog: pytest.LogCaptureFixture) -> None:
    started(
        max_steps=4,
        beta=0.3,
        loss_type="ipo",
        learning_rate=1e-3,
        seed=7,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        label_smoothing=0.0,
    ).train(resume_from_checkpoint=True)
    (line,) = said(caplog)
    for part in (
        "beta was 0.1 and is 0.3",
        'loss_type was ["sigmoid"] and is ["ipo"]',
        "learning_rate was 0.01 and is 0.001",
        "max_steps was 2 and is 4",
        "seed was 42 and is 7",
        "weight_decay was 0.0 and is 0.1",
        'lr_scheduler_type was "linear" and is "cosine"',
    ):
        assert part in line
    assert line.count(" was ") == 7


def test_the_batch_and_the_reference_are_named(
    started: Any, tiny_config: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    started(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2).train(
        resume_from_checkpoint=True
    )
    (line,) = said(caplog)
    assert "per_device_train_batch_size was 2 and is 1" in line
    assert "gradient_accumulation_steps was 1 and is 2" in line


def test_an_adapter_s_settings_are_named(make_trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(**options: Any) -> Any:
        lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        return make_trainer(tmp_path, peft_config=lora, save_steps=2, max_steps=2)

    run().train()
    run(lora_alpha=32, lora_dropout=0.1).train(resume_from_checkpoint=True)
    (line,) = said(caplog)
    assert "adapter lora_alpha was 8 and is 32; adapter lora_dropout was 0.0 and is 0.1." in line


def test_the_same_run_says_nothing(started: Any, caplog: pytest.LogCaptureFixture) -> None:
    started(max_steps=2, dataloader_num_workers=1, run_name="again").train(resume_from_checkpoint=True)
    assert not said(caplog)


def test_other_rows_are_refused_unless_asked_by_name(
    started: Any, id_pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = id_pairs()
    for other in (id_pairs(18, seed=3), rows.select(range(17)), rows.select([1, 0, *range(2, 18)])):
        with pytest.raises(CheckpointError, match=r"trained on other rows .* set resume_with_other_data"):
            started(data=other).train(resume_from_checkpoint=True)
    trainer = started(data=id_pairs(18, seed=3), max_steps=2, resume_with_other_data=True)
    trainer.train(resume_from_checkpoint=True)
    assert said(caplog)[-1].endswith("differs from the checkpoint's: the rows are others.")
    # the same rows from elsewhere are the same
    started(data=id_pairs(), max_steps=2).train(resume_from_checkpoint=True)


def test_data_and_arguments_that_were_replaced_before_training_are_those_that_count(
    started: Any, id_pairs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = started(max_steps=2)
    trainer.train_dataset = id_pairs(18, seed=3)
    with pytest.raises(CheckpointError, match="trained on other rows"):
        trainer.train(resume_from_checkpoint=True)
    trainer = started(data=id_pairs(18, seed=3), max_steps=2)
    trainer.train_dataset = id_pairs()
    trainer.args = copy.copy(trainer.args)
    trainer.args.beta = 0.3
    trainer.train(resume_from_checkpoint=True)
    (line,) = said(caplog)
    assert line.endswith("differs from the checkpoint's: beta was 0.1 and is 0.3.")


def test_a_stream_has_no_fingerprint(started: Any, id_pairs: Any) -> None:
    stream = IterableDataset.from_generator(lambda: iter(id_pairs(18, seed=3)))
    started(data=stream).train(resume_from_checkpoint=True)


def test_an_older_checkpoint_is_taken_as_it_is(started: Any, id_pairs: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-2" / STATE_NAME
    state = json.loads(path.read_text())
    facts = state.pop("run")
    assert facts["beta"] == 0.1
    assert facts["processes"] == 1
    assert "hub_token" not in facts
    path.write_text(json.dumps(state))
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    started(data=id_pairs(18, seed=3)).train(resume_from_checkpoint=True)


def test_differences_are_of_what_both_have() -> None:
    old = {"a": 1, "b": [1, 2], "data": "x", "gone": 3}
    assert differences(old, {"a": 1.0, "b": [2], "data": "y", "new": 4}) == ["b was [1, 2] and is [2]"]
    (line,) = differences({"a": "x" * 200}, {"a": None})
    assert len(line) < 120


def test_what_engines_wrap_has_the_same_name(tiny_config: Any) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_config()))
    before = facts_at_start({}, model)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert facts_at_start({}, model) == before
    model.lm_head.requires_grad_(False)
    assert facts_at_start({}, model)["trained weights"] != before["trained weights"]


def test_another_model_is_named(started: Any, tiny_config: Any) -> None:
    other = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_config(intermediate_size=40)))
    with pytest.raises(CheckpointError, match=r"has shape \(.*48.*\) there and \(.*40.*\) in this run"):
        started(model=other).train(resume_from_checkpoint=True)


def test_another_base_model_and_dtype_are_named(
    make_trainer: Any, tiny_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, folder: str) -> Any:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_config()))
        model.save_pretrained(tmp_path / name)
        return make_trainer(tmp_path / folder, model=str(tmp_path / name), save_steps=2, max_steps=2)

    run("a", "out").train()
    run("b", "out").train(resume_from_checkpoint=True)
    (line,) = said(caplog)
    assert f'model was "{tmp_path / "a"}" and is "{tmp_path / "b"}"' in line


def test_other_trained_weights_are_refused(started: Any, tiny_config: Any) -> None:
    """As many, of the same shapes, in the place of others."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_config()))
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"trained other weights \(21 tensors .* this run has 12 tensors"):
        started(model=model).train(resume_from_checkpoint=True)


def test_another_optimizer_is_refused_but_for_the_same_in_another_form(started: Any) -> None:
    with pytest.raises(CheckpointError, match=r"has the state of optim adamw_torch.*, and this run has sgd"):
        started(optim="sgd").train(resume_from_checkpoint=True)
    started(optim="adamw_torch", max_steps=2).train(resume_from_checkpoint=True)


def test_other_evaluation_data_are_named(
    make_trainer: Any, id_pairs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, eval_data=id_pairs(4, seed=2), save_steps=2, max_steps=2).train()
    make_trainer(tmp_path, eval_data=id_pairs(4, seed=3), max_steps=2).train(resume_from_checkpoint=True)
    (line,) = said(caplog)
    assert "evaluation data was" in line
