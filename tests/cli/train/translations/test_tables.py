"""The tables of other tools' names: each name has one place, and leads to what the command has."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from published_keys import KEYS, MARKS

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.config_files import OWN_FLAGS
from fastdpo.cli.train.parsing import parse
from fastdpo.cli.train.translations.tool import OURS, Tool, translate
from fastdpo.cli.train.translations.tools import TOOLS
from fastdpo.cli.train.values import Argument

NAMES = [tool.name for tool in TOOLS]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., dict[str, object]]:
    """read(text, *arguments): the values of a configuration file."""

    def values(text: str, *arguments: str) -> dict[str, object]:
        (tmp_path / "run.yaml").write_text(text)
        return parse([str(tmp_path / "run.yaml"), *arguments]).values

    return values


def said(read: Callable[..., dict[str, object]], text: str) -> str:
    """The sentence that refuses a configuration; "" where it is taken."""
    try:
        read(text)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("tool", TOOLS, ids=NAMES)
def test_every_key_of_the_tables_has_one_place(tool: Tool):
    written = [name for names in tool.no_effect.values() for name in names.split()]
    by_code = [name for name in tool.by_code if name not in tool.renamed]
    tables = [list(tool.renamed), list(tool.refused), written, by_code]
    assert sum(map(len, tables)) == len(tool.keys)
    assert set(tool.renamed.values()) <= OURS
    assert not tool.keys & {*OWN_FLAGS}
    # a key of our own would be taken as it is before these tables are asked
    assert not OURS & (tool.refused.keys() | tool.why_not.keys() | tool.renamed.keys())


@pytest.mark.parametrize(("tool", "key"), [(tool, key) for tool, keys in KEYS.items() for key in keys.split()])
def test_no_published_key_is_unknown(
    read: Callable[..., dict[str, object]], caplog: pytest.LogCaptureFixture, tool: str, key: str
):
    """Translated, said to have no effect, or refused with what to do (or for the value 1, which not all can have)."""
    mark = MARKS[tool]
    text = mark if re.search(rf"^{key}:", mark, re.M) else f"{mark}\n{key}: 1"
    assert not re.search("there is no (key|argument)", said(read, text))


VALUES = ("text", "", [1], {"a": 1}, -1, True, 0.5, [{"path": "a"}], ["x", {}], {"a": [{"b": None}]}, {"datasets": [1]})


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool.name in MARKS], ids=[*MARKS])
def test_a_value_of_any_kind_is_read_or_answered_in_one_sentence(tool: Tool):
    marks = {name: Argument(name, value, "run.yaml:1") for name, value in yaml.safe_load(MARKS[tool.name]).items()}
    for key in sorted(tool.keys):
        for value in VALUES:
            try:
                translate(tool, [*{**marks, key: Argument(key, value, "run.yaml:2")}.values()], "run.yaml")
            except UsageError as error:
                assert "\n" not in str(error)  # noqa: PT017 both ways are right, a traceback is not


@pytest.mark.parametrize("tool", TOOLS, ids=NAMES)
def test_the_table_of_refused_keys(read: Callable[..., dict[str, object]], tool: Tool):
    marks = {**MARKS, "LLaMA-Factory": "stage: dpo", "TRL": "ignore_bias_buffers: false"}
    for name, fix in tool.refused.items():
        with pytest.raises(UsageError, match=rf"run\.yaml:\d: {name} is not supported: {re.escape(fix)}"):
            read(f"{marks[tool.name]}\n{name}: 3")
        read(f"{marks[tool.name]}\n{name}: null")


def test_two_tools_in_one_file(read: Callable[..., dict[str, object]]):
    with pytest.raises(UsageError, match=r"base_model and rl: dpo \(axolotl\) and rlhf_type: dpo \(ms-swift\)"):
        read("base_model: m\nrl: dpo\nrlhf_type: dpo\nmodel: m")
    with pytest.raises(UsageError, match=r"two tools, dataset_mixture \(alignment-handbook\) and stage: dpo"):
        read("dataset_mixture:\n  datasets: []\nstage: dpo")


def test_a_name_alone_is_a_mistake_and_no_configuration(read: Callable[..., dict[str, object]]):
    for text, says in {
        "model_name_or_path: m\nrlhf_type: dpo": "'rlhf_type': leave it out",
        "model_name_or_path: m\nmax_seq_length: 64": "'max_seq_length': here it is 'max_length'",
        "model_name_or_path: m\nkto_desirable_weight: 2": "outside an axolotl configuration, which has base",
        "base_model: m\nbeta: 1": "'base_model': here it is 'model_name_or_path'",
    }.items():
        with pytest.raises(UsageError, match=says):
            read(text)
    with pytest.raises(UsageError, match="'--target_modules': here it is '--lora_target_modules'"):
        parse(["-m", "m", "-d", "a", "--target_modules", "q_proj", "v_proj"])
