"""DPOConfig: TRL's names and defaults, one clear sentence for each wrong value, nothing raised on a CPU machine."""

import dataclasses
import inspect
import logging
import warnings
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from fastdpo.config import checks
from fastdpo.config import trackers as trackers_module
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.config.trackers import TRACKERS

OWN = set(inspect.get_annotations(DPOConfig)) - {"_VALID_DICT_FIELDS"}


def test_every_own_field_explains_itself() -> None:
    for field in dataclasses.fields(DPOConfig):
        if field.name in OWN:
            text = field.metadata.get("help", "")
            assert text.endswith("."), field.name
            assert 15 < len(text) < 120, field.name


def test_defaults_are_trl_s(tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    theirs = {field.name: field for field in dataclasses.fields(trl.DPOConfig)}
    ours = {field.name: field for field in dataclasses.fields(DPOConfig)}
    added = {"skip_bad_rows", "aggregate", "reference_free", "simpo_gamma", "cpo_alpha", "rpo_alpha", "pref_ftx"}
    added |= {"model_adapter_name", "ref_adapter_name", "precompute_ref_dir", "ref_model_init_kwargs"}
    added |= {"on_overlong", "scored_turns", "batch_layout", "max_tokens_per_batch", "metric_files"}
    added |= {"on_nan", "resume_with_other_data", "desirable_weight", "undesirable_weight"}
    # TRL's up to 0.28
    added |= {"max_prompt_length", "max_completion_length", "tools", "generate_during_eval"}
    assert theirs.keys() <= ours.keys()
    # chosen otherwise: see the fields' help
    changed = {"output_dir", "logging_nan_inf_filter", "report_to", "train_sampling_strategy"}
    assert OWN - added <= theirs.keys()
    for name in OWN - added - changed:
        for default in ("default", "default_factory"):
            mine, other = getattr(ours[name], default), getattr(theirs[name], default)
            assert (mine() if callable(mine) else mine) == (other() if callable(other) else other), name


def test_own_defaults() -> None:
    args = DPOConfig(use_cpu=True)
    assert args.output_dir == "output"
    assert args.report_to == []
    assert args.loss_type == ["sigmoid"]
    assert args.pad_to_multiple_of is None
    # a NaN loss is logged as NaN, and no step waits for the device to look
    assert args.logging_nan_inf_filter is False
    assert args.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta must be a number > 0, got 0.0"),
        ({"beta": float("nan")}, "beta must be a number > 0, got nan"),
        ({"loss_type": "sigmoi"}, "Did you mean 'sigmoid'?"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5), got 0.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' has no label smoothing"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "1 numbers for 2 losses"),
        ({"max_length": 1}, "max_length is 1"),
        ({"truncation_mode": "middle"}, "keep_start, keep_end"),
        ({"pad_to_multiple_of": "eight"}, "pad_to_multiple_of must be 'auto' or a number >= 1, got 'eight'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"learning_rate": -1e-6}, "learning_rate must be a number >= 0, got -1e-06"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number >= 0, got nan"),
        ({"logging_steps": float("nan")}, "logging_steps must be a number of steps"),
        ({"eval_steps": float("inf")}, "eval_steps must be a number of steps"),
        ({"num_train_epochs": 0}, "num_train_epochs must be > 0 where max_steps is not set, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
        ({"precompute_ref_batch_size": 0}, "precompute_ref_batch_size must be at least 1, got 0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1, got 0"),
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha must be in (0, 1], got 0.0"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "use one of them"),
        ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'?"),
    ],
)
def test_wrong_value_is_answered_in_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is compared below
        DPOConfig(use_cpu=True, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_output_dir_is_the_default_one() -> None:
    assert DPOConfig(use_cpu=True, output_dir=None).output_dir == "output"
    assert DPOConfig(use_cpu=True, num_train_epochs=0, max_steps=1).max_steps == 1


def test_tracker_that_is_not_installed_is_answered_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "find_spec", lambda module: None)
    for name in TRACKERS.keys() - {"kubeflow"}:
        with pytest.raises(ValueError, match=r"not installed; run `pip install [\w -]+`"):
            DPOConfig(use_cpu=True, report_to=[name])
    DPOConfig(use_cpu=True, report_to="none")


def test_known_trackers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) <= set(TRACKERS)
    # kubeflow is younger than the oldest transformers that is supported
    assert set(TRACKERS) - set(INTEGRATION_TO_CALLBACK) <= {"kubeflow"}


def test_bf16_follows_the_device_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(checks, "is_torch_bf16_gpu_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        assert DPOConfig().bf16 is False
    assert sum("bf16 is off" in line for line in caplog.messages) == 1
    monkeypatch.setattr(checks, "is_torch_bf16_gpu_available", lambda: True)
    assert DPOConfig(use_cpu=True).bf16 is False
    caplog.clear()
    assert DPOConfig(use_cpu=True, fp16=True).bf16 is False
    assert caplog.messages == ["fp16 needs a GPU, and none is in use: training is in fp32."]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without accelerator is meant")
def test_bf16_asked_for_on_a_cpu_machine_runs_on_the_cpu() -> None:
    args = DPOConfig(bf16=True)
    assert args.bf16
    assert args.use_cpu
    # what transformers does with the same arguments
    with pytest.raises(ValueError, match="bf16"):
        TrainingArguments(bf16=True)


def test_construction_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DPOConfig(use_cpu=True)


def test_checkpointing_can_be_switched_off_by_either_name() -> None:
    assert not DPOConfig(use_cpu=True, gradient_checkpointing=False).gradient_checkpointing
    if hasattr(TrainingArguments, "activation_checkpointing"):
        assert not DPOConfig(use_cpu=True, activation_checkpointing=False).gradient_checkpointing


def test_command_line_values_arrive() -> None:
    line = (
        "--use_cpu --beta 0.3 --loss_type sigmoid ipo --loss_weights 1 0.5 --pad_to_multiple_of 8 --bf16 false "
        '--max_length 64 --model_init_kwargs {"dtype":"bfloat16"} --gradient_checkpointing false'
    )
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(line.split())
    assert args.beta == 0.3
    assert args.loss_type == ["sigmoid", "ipo"]
    assert args.loss_weights == [1.0, 0.5]
    assert args.pad_to_multiple_of == 8
    assert args.bf16 is False
    assert args.max_length == 64
    assert args.model_init_kwargs == {"dtype": "bfloat16"}
    assert not args.gradient_checkpointing


def test_config_survives_a_round_trip() -> None:
    args = DPOConfig(use_cpu=True, beta=0.2, loss_type="ipo")
    again = dataclasses.replace(args, beta=0.5)
    assert (again.beta, again.loss_type) == (0.5, ["ipo"])
    assert args.to_dict()["beta"] == 0.2
