"""Command line and config file -> checked values, from the table of fields alone: no torch, no transformers."""

import argparse
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdpo.cli.command import SentenceParser
from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.arguments import Field
from fastdpo.cli.train.config_files import OWN_FLAGS, read_config
from fastdpo.cli.train.fields import FIELDS
from fastdpo.cli.train.translations.llama_factory import LLAMA_FACTORY
from fastdpo.cli.train.translations.tool import translate
from fastdpo.cli.train.translations.tools import KEYS, SEVERAL, recognize, tools_with
from fastdpo.cli.train.values import Argument, as_yaml, convert
from fastdpo.config.old_names import OLD_NAMES, todays_names
from fastdpo.config.other_names import ADVICE, OTHER_NAMES, meant_by

logger = logging.getLogger(__name__)

BY_NAME = {field.name: field for field in FIELDS}
DEFAULTS = {field.name: field.default for field in FIELDS}
SHORT = {"-m": "--model_name_or_path", "-d": "--dataset_name", "-h": "--help"}

# what TRL's ModelConfig called what it and this command call otherwise today; DPOConfig's own are in OLD_NAMES
OLD_COMMAND_NAMES = {"streaming": "dataset_streaming", "torch_dtype": "dtype"}
# names that are read besides those of the table
UNLISTED_NAMES = (OLD_NAMES.keys() | OLD_COMMAND_NAMES.keys() | KEYS) - BY_NAME.keys()


class Request(NamedTuple):
    """What the user asked for: values by field name (only those given), and where each came from."""

    values: dict[str, Any]
    sources: dict[str, str]
    demo: bool
    config: str | None


def parse(argv: Sequence[str]) -> Request:
    """Command line over config file, old names and other tools' as today's; one log line says each translation.

    Raises UsageError with one sentence that names the argument.
    """
    namespace, alone = _build_parser(show_all=False).parse_known_args(_canonical(argv))
    if alone:
        raise UsageError(f"'{alone[0]}' stands alone: arguments are --name value; a config file is the first word")
    on_command_line = vars(namespace)
    config = namespace.config
    arguments = read_config(Path(config)) if config is not None else []
    arguments += [Argument(name, value) for name, value in on_command_line.items() if name not in OWN_FLAGS]
    tool = recognize(arguments)
    if tool:
        arguments = translate(tool, arguments, str(config or "the command line"))
    for argument in arguments:
        if argument.name not in BY_NAME and argument.name not in OLD_NAMES and argument.name not in OLD_COMMAND_NAMES:
            raise UsageError(_unknown(argument.name, argument.place))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for argument in _todays(arguments):
        values[argument.name] = convert(argument.value, BY_NAME[argument.name], argument.where)
        sources[argument.name] = argument.where
    if tool:
        tool.add_defaults(values)
    return Request(values, sources, demo=namespace.demo, config=config)


def _todays(arguments: list[Argument]) -> Iterator[Argument]:
    """The file's, then the command line's, under today's names."""
    for in_file in (True, False):
        source = [argument for argument in arguments if bool(argument.place) == in_file]
        named = {argument.name: argument for argument in source if argument.name in BY_NAME}
        yield from named.values()
        for argument in source:
            if argument.name in named:
                continue
            if argument.name in OLD_COMMAND_NAMES:
                today = OLD_COMMAND_NAMES[argument.name]
                says = "which is given too and goes first" if today in named else "taken as that"
                logger.warning(f"{argument.name} is {today} today; {says}.")
                if today not in named:
                    yield argument._replace(name=today, given_as=argument.name)
                continue
            values = {name: convert(other.value, BY_NAME[name], other.where) for name, other in named.items()}
            old = {argument.name: as_yaml(argument.value)}
            try:
                renamed = todays_names({**values, **old}, BY_NAME, "fastdpo train")
            except ValueError as error:
                raise UsageError(f"{argument.place}: {error}" if argument.place else str(error)) from error
            for name, value in renamed.items():
                if name not in values or value is not values[name]:
                    yield Argument(name, value, argument.place, argument.name)


def help_text(show_all: bool) -> str:
    return _build_parser(show_all).format_help()


def _build_parser(show_all: bool) -> SentenceParser:
    parser = SentenceParser(
        prog="fastdpo train",
        usage="fastdpo train -m MODEL -d DATA [arguments]\n       fastdpo train --config FILE [arguments]\n"
        "       fastdpo train --demo",
        description="Train a model on preference pairs with DPO.\n"
        "Arguments are --name value, --name=value or name=value.",
        epilog=None if show_all else "Every argument, with all that TrainingArguments has: fastdpo train --help-all",
    )
    command = parser.add_argument_group("command")
    command.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file of arguments, or another tool's configuration; the command line goes first",
    )
    command.add_argument("--demo", action="store_true", help="train the embedded tiny model: no data, network or GPU")
    command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    command.add_argument("-h", "--help", action="store_true", help="the main arguments")
    command.add_argument("--help_all", action="store_true", help="every argument")
    # understood, and not shown
    for name in sorted(UNLISTED_NAMES):
        words: dict[str, Any] = {"nargs": "+"} if name in SEVERAL else {"nargs": "?", "const": "true"}
        command.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **words)
    groups: dict[str, Any] = {}
    short = {name: flag for flag, name in SHORT.items()}
    for field in FIELDS:
        if field.group not in groups:
            groups[field.group] = parser.add_argument_group(field.group)
        flags = [short[f"--{field.name}"]] if f"--{field.name}" in short else []
        kinds = field.type.split(" | ")
        nargs = "+" if any(kind.startswith("list") for kind in kinds) else "?" if "bool" in kinds else None
        groups[field.group].add_argument(
            *flags,
            f"--{field.name}",
            default=argparse.SUPPRESS,
            nargs=nargs,
            const="true" if nargs == "?" else None,
            metavar=_metavar(field),
            help=_help(field) if field.main or show_all else argparse.SUPPRESS,
        )
    return parser


def _metavar(field: Field) -> str:
    if field.choices and len(field.choices) <= 5:
        return "{" + ",".join(field.choices) + "}"
    if field.type.startswith("bool | str"):
        return "VALUE"
    return field.type.split(" | ")[0].upper().replace("LIST[STR]", "NAME").replace("LIST[FLOAT]", "FLOAT")


def _help(field: Field) -> str:
    default = ", ".join(map(str, field.default)) if isinstance(field.default, list) else field.default
    note = "" if field.default is None or field.default == [] else f" (default: {str(default).replace('%', '%%')})"
    return field.help.replace("%", "%%") + note


def _canonical(argv: Sequence[str]) -> list[str]:
    """`--a-b`, `--a_b=v`, `a_b=v`, `--no_a_b`, a leading config file, all in argparse's form; refuses unknown names."""
    tokens: list[str] = []
    takes_value = False
    for index, token in enumerate(argv):
        if index == 0 and re.fullmatch(r"[^-=][^=]*\.(ya?ml|json)", token):
            tokens += ["--config", token]
            continue
        bare = re.match(r"[A-Za-z_][\w-]*=", token) if not takes_value else None
        if not token.startswith("--") and not bare:
            if token.startswith("-") and token not in SHORT and not re.match(r"-[\d.]", token):
                raise UsageError(f"there is no argument '{token}'{_suggestion(token.lstrip('-'), '--')}")
            if not tokens and token not in SHORT:
                raise UsageError(f"'{token}' stands alone: arguments are --name value, --name=value or name=value")
            tokens.append(token)
            takes_value = token in SHORT and token != "-h"
            continue
        name, equals, value = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        field = BY_NAME.get(name)
        positive = BY_NAME.get(name.removeprefix("no_"))
        if field is None and name.startswith("no_") and positive and "bool" in positive.type and not equals:
            name, equals, value, field = positive.name, "=", "false", positive
        if field is None and name not in OWN_FLAGS and name not in UNLISTED_NAMES:
            raise UsageError(_unknown(name, ""))
        tokens += [f"--{name}={value}" if equals else f"--{name}"]
        takes_value = not equals and (name == "config" or (field is not None and "bool" not in field.type.split(" | ")))
    return tokens


def _unknown(name: str, place: str) -> str:
    tools = sorted(tools_with(name), key=lambda tool: tool is not LLAMA_FACTORY)
    if not tools or name in OTHER_NAMES or (name in ADVICE and tools[0] is not LLAMA_FACTORY):
        hint = _suggestion(name, "" if place else "--")
    else:
        mark = tools[0].mark if place else tools[0].mark.replace(": ", "=")
        hint = f" outside {tools[0].label} configuration, which has {mark}"
    return f"{place}: there is no key '{name}'{hint}" if place else f"there is no argument '--{name}'{hint}"


def _suggestion(name: str, prefix: str = "") -> str:
    hint = meant_by(name, [*BY_NAME, *OWN_FLAGS], prefix)
    return f": {hint}" if hint else " (see fastdpo train --help-all)"
