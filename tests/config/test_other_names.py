"""A name that another tool has is answered with what it is here, whatever is spelled alike."""

from pathlib import Path

import pytest

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.fields import FIELDS
from fastdpo.cli.train.parsing import parse
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.config.other_names import ADVICE, OTHER_NAMES
from fastdpo.losses.options import LossOptions
from fastdpo.wording import LOSSES_ELSEWHERE

FLAGS = {field.name for field in FIELDS}


def test_every_name_is_one_that_the_command_has() -> None:
    assert set(OTHER_NAMES.values()) <= FLAGS
    assert not (OTHER_NAMES.keys() | ADVICE.keys()) & FLAGS - {"dataset"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("base_model", "here it is '--model_name_or_path'"),
        ("dataset_mixer", "list them in `datasets:`, each with `path` and its share as `fraction`"),
        ("dataset_mixture", "with `path` and its share as `fraction`"),
        ("rlhf_type", "leave it out"),
        ("micro_batch_size", "here it is '--per_device_train_batch_size'"),
        ("sequence_len", "here it is '--max_length'"),
        ("num_epochs", "here it is '--num_train_epochs'"),
        ("lora_rank", "here it is '--lora_r'"),
        ("train_type", "use_peft trains a LoRA"),
        ("learnig_rate", "did you mean '--learning_rate'?"),
    ],
)
def test_flags_and_keys_of_other_tools(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(UsageError, match="there is no argument") as raised:
        parse(["-m", "model", f"--{name}", "x"])
    assert says in str(raised.value)
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: model\n{name}: x\n")
    with pytest.raises(UsageError, match=r"run\.yaml:2") as raised:
        parse(["--config", str(tmp_path / "run.yaml")])
    assert says.replace("--", "") in str(raised.value)


def test_arguments_in_python(tmp_path: Path) -> None:
    for name, says in (("micro_batch_size", "here it is 'per_device_train_batch_size'"), ("rlhf_type", "leave it out")):
        with pytest.raises(TypeError, match=f"DPOConfig has no argument '{name}'; {says}"):
            DPOConfig(output_dir=str(tmp_path), **{name: 1})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dpo", "sigmoid"),
        ("cdpo", "sigmoid with label_smoothing"),
        ("rdpo", "robust with label_smoothing"),
        ("dpop", "not built"),
        ("DPO", "sigmoid"),
    ],
)
def test_losses_of_other_names(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown loss '{name}'; .* Here it is {says}"):
        LossOptions(loss_type=name)
    with pytest.raises(UsageError, match=f"got '{name}'; here it is {says}"):
        parse(["-m", "model", "-d", "a", "--loss_type", name])
    assert LOSSES_ELSEWHERE[name.lower()].startswith(says)
