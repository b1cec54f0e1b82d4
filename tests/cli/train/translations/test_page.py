"""docs/coming-from.md has the tables of the tools as they are."""

import pytest

from fastdpo.cli.train.translations.page import NOTES, PAGE, render, with_tables
from fastdpo.cli.train.translations.tool import Tool
from fastdpo.cli.train.translations.tools import TOOLS

SHOWN = [tool for tool in TOOLS if tool.name != "LLaMA-Factory"]


def test_the_page_has_todays_tables():
    """Write it again with `python -m fastdpo.cli.train.translations.page`."""
    text = PAGE.read_text()
    assert with_tables(text) == text
    assert all(render(tool) in text for tool in SHOWN)
    assert with_tables(text.replace("| `base_model` |", "| `base_modl` |")) == text


@pytest.mark.parametrize("tool", SHOWN, ids=[tool.name for tool in SHOWN])
def test_each_key_is_on_it_once(tool: Tool):
    assert NOTES.get(tool.name, {}).keys() == tool.by_code.keys() - tool.renamed.keys()
    text = render(tool)
    assert all(text.count(f"`{key}`") >= 1 for key in tool.keys)
