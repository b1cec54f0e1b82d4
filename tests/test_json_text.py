"""JSON that is nested too deeply is refused where it is read, by every reader of what runs and people leave."""

from pathlib import Path

import pytest

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.json_text import MAX_DEPTH, is_deeper, parse_json
from fastdpo.models.load_errors import unreadable_weights
from fastdpo.models.saved import read_adapter_config
from fastdpo.runs.answers import read_prompts
from fastdpo.training.report.metric_files import read_summary


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_the_depth_is_that_of_lists_and_mappings() -> None:
    assert not is_deeper(1, 0)
    assert not is_deeper([1, {"a": 2}], 2)
    assert is_deeper([1, {"a": 2}], 1)
    assert parse_json(nested(MAX_DEPTH)) is not None
    assert parse_json('["' + "[" * 300 + '"]') == ["[" * 300]  # brackets in a text nest nothing


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 100_000])
def test_deeper_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"JSON nested more than {MAX_DEPTH} deep"):
        parse_json(nested(depth))
    with pytest.raises(ValueError, match="nested"):
        parse_json('{"a":' * depth + "1" + "}" * depth)


@pytest.mark.parametrize("depth", [900, 100_000])
def test_readers_answer_in_a_sentence(tmp_path: Path, depth: int) -> None:
    summary = tmp_path / "summary.json"
    summary.write_text('{"model": ' + nested(depth) + "}")
    with pytest.raises(ValueError, match=r"summary\.json is not JSON: JSON nested"):
        read_summary(summary)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": ' + nested(depth) + "}")
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1 is not JSON \(JSON nested"):
        read_prompts(str(prompts))
    with pytest.raises(ValueError, match="tools cannot be read: JSON nested"):
        DPOConfig(output_dir=str(tmp_path), tools=nested(depth), bf16=False, report_to="none")


def test_model_files_that_are_nested_too_deeply_are_not_readable(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ' + nested(100_000) + "}")
    assert unreadable_weights(tmp_path) == "model.safetensors.index.json is not readable"


def test_an_adapter_whose_config_is_nested_too_deeply(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"a": zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": ' + nested(100_000) + "}")
    with pytest.raises(ValueError, match="cannot be read: "):
        read_adapter_config(str(tmp_path))
