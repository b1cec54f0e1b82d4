"""What a translation is: a tool's names as a table, and how arguments under these names become ours."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.arguments import Field
from fastdpo.cli.train.fields import FIELDS
from fastdpo.cli.train.values import Argument, as_yaml, convert
from fastdpo.config.old_names import OLD_NAMES
from fastdpo.wording import did_you_mean

logger = logging.getLogger(__name__)

OURS = {field.name for field in FIELDS}
ADAPTER_OPTIONS = ("use_rslora", "use_dora", "init_lora_weights")  # and what begins with lora_
Arguments = dict[str, Argument]


@dataclass(frozen=True)
class Tool:
    """Another tool's configuration. A name that is in no table, and that we have too, means the same there.

    mark: what tells such a file, for messages. is_one: whether these arguments are of this tool.
    renamed: its name -> ours. refused: what would change training and is not built -> what to do. no_effect: a reason
    -> the names that it is about, separated by spaces. by_code: a name -> a function of its argument that gives our
    arguments. settle(theirs, ours, unused): what several arguments say together.
    defaults(ours): what holds where the file is silent, since it changes what is trained, under its names or ours.
    add_defaults(values): what follows from other values once they are read. remarks(ours): lines for the log.
    several: names that take several words on the command line.
    """

    name: str
    mark: str
    is_one: Callable[[Arguments], bool]
    renamed: Mapping[str, str]
    refused: Mapping[str, str]
    no_effect: Mapping[str, str]
    by_code: Mapping[str, Callable[[Argument], dict[str, Any]]]
    settle: Callable[[Arguments, Arguments, dict[str, str]], None] = lambda theirs, ours, unused: None
    defaults: Callable[[Arguments], dict[str, Any]] = lambda ours: {}
    add_defaults: Callable[[dict[str, Any]], None] = lambda values: None
    remarks: Callable[[Arguments], Iterable[str]] = lambda ours: ()
    several: frozenset[str] = frozenset()
    why_not: dict[str, str] = field(init=False)
    keys: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        why_not = {name: why for why, names in self.no_effect.items() for name in names.split()}
        object.__setattr__(self, "why_not", why_not)
        object.__setattr__(self, "keys", frozenset((*self.renamed, *self.refused, *why_not, *self.by_code)))

    @property
    def label(self) -> str:
        """Its name with an article."""
        return f"{'an' if self.name[:2] in ('ax', 'al', 'ms', 'un') else 'a'} {self.name}"


def translate(tool: Tool, arguments: list[Argument], source: str) -> list[Argument]:
    """The arguments under our names. What changes nothing is said in one log line, and so are the defaults that hold.

    Raises:
        UsageError: one sentence: an unknown name, or what would change training and is not built.
    """
    theirs = {argument.name: argument for argument in arguments}  # the command line comes after the file
    # null is a tool's way to leave an argument out
    theirs = {name: argument for name, argument in theirs.items() if not _is_left_out(tool, argument)}
    unused: dict[str, str] = {}
    ours: Arguments = {}
    by_code = tool.by_code.keys()
    for argument in theirs.values():
        for renamed in _translated(tool, argument, unused):
            other = ours.get(renamed.name)
            # a name that says several things may say again what another one does
            clash = other is not None and bool(other.place) == bool(renamed.place)
            if other and clash and not (_is_equal(other, renamed) and {other.given_as, renamed.given_as} & by_code):
                raise UsageError(f"{renamed.where} and {other.given_as or other.name} are the same argument: give one")
            if other is None or other.place:
                ours[renamed.name] = renamed
    tool.settle(theirs, ours, unused)
    silent = {name: value for name, value in tool.defaults(ours).items() if tool.renamed.get(name, name) not in ours}
    for name, value in silent.items():
        ours[tool.renamed.get(name, name)] = Argument(tool.renamed.get(name, name), value, "", name)
    said = ", ".join(f"{name} {value}" for name, value in silent.items())
    logger.info(f"{source} is {tool.label} configuration{said and f'; its defaults hold for {said}'}.")
    for remark in tool.remarks(ours):
        logger.info(remark)
    if unused:
        logger.warning(f"no effect here: {', '.join(f'{name} ({why})' for name, why in unused.items())}.")
    return list(ours.values())


def _is_equal(one: Argument, other: Argument) -> bool:
    return as_yaml(one.value) == as_yaml(other.value)


def _is_left_out(tool: Tool, argument: Argument) -> bool:
    value = as_yaml(argument.value) if argument.name in tool.keys and not argument.place else argument.value
    return value is None


def _translated(tool: Tool, argument: Argument, unused: dict[str, str]) -> list[Argument]:
    """One argument under our names: none where it has no effect."""
    name = argument.name
    if name in tool.by_code:
        return [Argument(new, value, argument.place, name) for new, value in tool.by_code[name](argument).items()]
    if name in tool.renamed:
        return [argument._replace(name=tool.renamed[name], given_as=name)]
    if name in OURS or name in OLD_NAMES:
        return [argument]
    asked = as_yaml(argument.value)
    if name in tool.refused and asked:
        raise UsageError(f"{argument.where} is not supported: {tool.refused[name]}")
    if name in tool.why_not and asked:
        unused[name] = tool.why_not[name]
    if name in tool.refused or name in tool.why_not:
        return []
    hint = did_you_mean(name, tool.keys | OURS | OLD_NAMES.keys())
    kind = f"{argument.place}: there is no key" if argument.place else "there is no argument"
    raise UsageError(f"{kind} '{name}'" + (f": {hint}" if hint else f", neither {tool.name}'s nor fastdpo's"))


# what the tables are written with


def typed(argument: Argument, kind: str, choices: tuple[str, ...] | None = None) -> Any:
    """The argument's value as that kind; raises UsageError."""
    return convert(argument.value, Field(argument.name, kind, None, choices, "", "", "", False), argument.where)


def flag(when_true: dict[str, Any]) -> Callable[[Argument], dict[str, Any]]:
    """A switch that says `when_true`, and nothing where it is off."""
    return lambda argument: when_true if typed(argument, "bool") else {}


def as_it_is(argument: Argument) -> dict[str, Any]:
    """One of our names that the table should have, since it is read before the tables are asked."""
    return {argument.name: argument.value}


def nothing(argument: Argument) -> dict[str, Any]:
    """What `settle` reads."""
    return {}


def only(*values: Any, fix: str) -> Callable[[Argument], dict[str, Any]]:
    """An argument with these values alone, which are what is done here; raises UsageError with `fix` for others."""

    def check(argument: Argument) -> dict[str, Any]:
        if argument.value not in values and as_yaml(argument.value) not in values:
            raise UsageError(f"{argument.where} is {argument.value}, which is not supported: {fix}")
        return {}

    return check


def held_out(argument: Argument) -> dict[str, Any]:
    """The share or number of rows that are split off for evaluation; 0 for none."""
    size = typed(argument, "float")
    if size == 0:
        return {}
    return {"test_split_size": size if size < 1 else int(size)}


def value_of(arguments: Arguments, name: str, default: Any = None) -> Any:
    """An argument's value with true, false and null read; `default` where it is not given."""
    return as_yaml(arguments[name].value) if name in arguments else default


def drop_idle_lora(ours: Arguments, unused: dict[str, str], why: str) -> None:
    """Move what is about a fresh LoRA from `ours` to what has no effect."""
    for name in sorted(name for name in ours if name.startswith("lora_") or name in ADAPTER_OPTIONS):
        unused[ours[name].given_as or name] = why
        del ours[name]
