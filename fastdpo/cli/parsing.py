"""Command line and config file -> checked values, from the table of fields alone: no torch, no transformers."""

import argparse
import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from fastdpo.cli.arguments import Field
from fastdpo.cli.fields import FIELDS

BY_NAME = {field.name: field for field in FIELDS}
SHORT = {"-m": "--model_name_or_path", "-d": "--dataset_name", "-h": "--help"}
OWN_FLAGS = ("help", "help_all", "debug", "demo", "config")

# names that other trainers or older releases use for what a field does here: closer than spelling tells
ELSEWHERE = {
    "batch_size": "per_device_train_batch_size",
    "cutoff_len": "max_length",
    "dataset": "dataset_name",
    "dpo_label_smoothing": "label_smoothing",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "finetuning_type": "use_peft",
    "lora_dim": "lora_r",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lr": "learning_rate",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps",
}

TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
WANTED = {
    "bool": "true or false",
    "int": "a whole number (int)",
    "float": "a number (float)",
    "str": "text",
    "dict": "a mapping (JSON on the command line)",
    "None": "none",
}


class UsageError(ValueError):
    """The command line or the config file is wrong; the message is one sentence for the user."""


class Request(NamedTuple):
    """What the user asked for: values by field name (only those given), and where each came from."""

    values: dict[str, Any]
    sources: dict[str, str]
    demo: bool
    config: str | None


def parse(argv: Sequence[str]) -> Request:
    """Command line over config file. Raises UsageError with one sentence that names the argument."""
    given = _build_parser(show_all=False).parse_args(_canonical(argv))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if given.config is not None:
        for name, (value, where) in _read_config(Path(given.config)).items():
            values[name] = convert(value, BY_NAME[name], where)
            sources[name] = where
    for name, value in vars(given).items():
        if name in BY_NAME:
            values[name] = convert(value, BY_NAME[name], f"--{name}")
            sources[name] = f"--{name}"
    return Request(values, sources, demo=given.demo, config=given.config)


def help_text(show_all: bool) -> str:
    return _build_parser(show_all).format_help()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message.removeprefix("argument "))


def _build_parser(show_all: bool) -> _Parser:
    parser = _Parser(
        prog="fastdpo train",
        usage="fastdpo train -m MODEL -d DATA [arguments]\n       fastdpo train --config FILE [arguments]\n"
        "       fastdpo train --demo",
        description="Train a model on preference pairs with DPO.\n"
        "Arguments are --name value, --name=value or name=value.",
        epilog=None if show_all else "Every argument, with all that TrainingArguments has: fastdpo train --help-all",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        add_help=False,
        allow_abbrev=False,
    )
    command = parser.add_argument_group("command")
    command.add_argument("--config", metavar="FILE", help="YAML or JSON file of arguments; the command line goes first")
    command.add_argument("--demo", action="store_true", help="train the embedded tiny model: no data, network or GPU")
    command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    command.add_argument("-h", "--help", action="store_true", help="the main arguments")
    command.add_argument("--help_all", action="store_true", help="every argument")
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
        if field is None and name not in OWN_FLAGS:
            raise UsageError(f"there is no argument '--{name}'{_suggestion(name, '--')}")
        tokens += [f"--{name}={value}" if equals else f"--{name}"]
        takes_value = not equals and (name == "config" or (field is not None and "bool" not in field.type.split(" | ")))
    return tokens


def _suggestion(name: str, prefix: str = "") -> str:
    if name in ELSEWHERE:
        return f": here it is '{prefix}{ELSEWHERE[name]}'"
    close = get_close_matches(name, [*BY_NAME, *OWN_FLAGS], n=1, cutoff=0.6)
    return f": did you mean '{prefix}{close[0]}'?" if close else " (see fastdpo train --help-all)"


def _read_config(path: Path) -> dict[str, tuple[Any, str]]:
    """name -> (value, "file:line: name"). Raises UsageError for a file that is not a mapping of known names."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not UTF-8 text") from error
    entries = _json_entries(path, text) if path.suffix == ".json" else _yaml_entries(path, text)
    found: dict[str, tuple[Any, str]] = {}
    for key, value, place in entries:
        name = key.replace("-", "_")
        if name in OWN_FLAGS:
            raise UsageError(f"{place}: '{key}' belongs on the command line, not in a file")
        if name not in BY_NAME:
            raise UsageError(f"{place}: there is no key '{key}'{_suggestion(name)}")
        if name in found:
            raise UsageError(f"{place}: '{key}' stands twice in this file")
        found[name] = value, f"{place}: {name}"
    return found


def _json_entries(path: Path, text: str) -> list[tuple[str, Any, str]]:
    try:
        # pairs, so that a key that stands twice is seen
        entries = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(entries, _Pairs):
        raise UsageError(f"{path} should be a JSON object of arguments, got {type(entries).__name__}")
    return [(key, dict(value) if isinstance(value, _Pairs) else value, str(path)) for key, value in entries]


class _Pairs(list[tuple[str, Any]]):
    pass


def _yaml_entries(path: Path, text: str) -> list[tuple[str, Any, str]]:
    import yaml  # only where a config file is read

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return []
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path} should be 'name: value' lines, got {type(values).__name__}")
    return [(str(key.value), values.get(key.value), f"{path}:{key.start_mark.line + 1}") for key, _ in node.value]


def convert(value: Any, field: Field, where: str) -> Any:
    """`value`, from the command line (text) or a file (anything), as the field's type. Raises UsageError."""
    kinds = field.type.split(" | ")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and where.startswith("--"):
        value = value[0]
    if field.choices and value is False and "no" in field.choices:
        value = "no"  # YAML reads a bare `no` as false
    for kind in kinds:
        try:
            result = _as_kind(value, kind, field)
        except (TypeError, ValueError, OverflowError):
            continue
        for name in result if isinstance(result, list) else [result]:
            if field.choices and isinstance(name, str) and name not in field.choices:
                close = get_close_matches(name, field.choices, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise UsageError(f"{where} should be one of {', '.join(field.choices)}, got '{name}'{hint}")
        return result
    wanted = " or ".join(_wanted(kind) for kind in kinds if kind != "None" or len(kinds) == 1)
    raise UsageError(f"{where} should be {wanted}, got {value!r}")


def _wanted(kind: str) -> str:
    return f"a list ({kind})" if kind.startswith("list") else WANTED[kind]


def _as_kind(value: Any, kind: str, field: Field) -> Any:
    """`value` as one kind of the field's type. Raises TypeError or ValueError where it is not one."""
    word = value.strip().lower() if isinstance(value, str) else None
    nothing = value is None or (word in ("none", "null") and word != field.default)
    if nothing and "None" in field.type.split(" | "):
        return None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "bool" and word in TRUTH:
        return TRUTH[word]
    if kind in ("int", "float") and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = float(value)
        if kind == "float":
            return number
        return int(number) if number == int(number) else _refuse()
    if kind.startswith("list"):
        # one word is a list only where the field takes no plain text
        if isinstance(value, str) and ("," in value or "str" not in field.type.split(" | ")):
            value = value.split(",")
        return [_as_kind(item, kind[5:-1], field) for item in value] if isinstance(value, list) else _refuse()
    if kind == "dict":
        mapping = json.loads(value) if isinstance(value, str) else value
        return mapping if isinstance(mapping, dict) else _refuse()
    if kind == "str" and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    return _refuse()


def _refuse() -> Any:
    raise TypeError
