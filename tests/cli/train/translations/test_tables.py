"""The tables of other tools' names: each name has one place, and leads to what the command has."""

import pytest

from fastdpo.cli.train.config_files import OWN_FLAGS
from fastdpo.cli.train.translations.tool import OURS, Tool
from fastdpo.cli.train.translations.tools import TOOLS

NAMES = [tool.name for tool in TOOLS]


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
