"""Which tool's configuration the arguments are, and the names that are known from any of them."""

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.translations.axolotl import AXOLOTL
from fastdpo.cli.train.translations.handbook import HANDBOOK
from fastdpo.cli.train.translations.llama_factory import LLAMA_FACTORY
from fastdpo.cli.train.translations.ms_swift import MS_SWIFT
from fastdpo.cli.train.translations.tool import OURS, Tool
from fastdpo.cli.train.translations.trl import TRL
from fastdpo.cli.train.translations.unsloth import UNSLOTH
from fastdpo.cli.train.values import Argument

# those that are told by their marks; LLaMA-Factory's looser rule and TRL's come after them
MARKED = (AXOLOTL, HANDBOOK, MS_SWIFT, UNSLOTH)
TOOLS = (*MARKED, LLAMA_FACTORY, TRL)
KEYS = frozenset[str]().union(*(tool.keys for tool in TOOLS))
SEVERAL = frozenset[str]().union(*(tool.several for tool in TOOLS)) - OURS


def recognize(arguments: list[Argument]) -> Tool | None:
    """The tool whose configuration this is; None for ours. Raises UsageError for two tools' names in one."""
    named = {argument.name: argument for argument in arguments}
    told = [tool for tool in MARKED if tool.is_one(named)]
    if {"stage", "finetuning_type"} & named.keys() and LLAMA_FACTORY.is_one(named):
        told.append(LLAMA_FACTORY)
    if len(told) > 1:
        marks = " and ".join(f"{tool.mark} ({tool.name})" for tool in told)
        raise UsageError(f"the arguments are of two tools, {marks}: keep the names of one of them")
    if told:
        return told[0]
    return next((tool for tool in (LLAMA_FACTORY, TRL) if tool.is_one(named)), None)


def tools_with(name: str) -> list[Tool]:
    """Those whose configurations may have this name."""
    return [tool for tool in TOOLS if name in tool.keys]
