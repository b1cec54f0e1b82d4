"""A file of arguments in YAML or JSON, their names unchecked; small, flat, and never trusted to be either."""

import json
from pathlib import Path
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.values import Argument
from fastdpo.json_text import MAX_DEPTH, parse_json
from fastdpo.wording import first_line

OWN_FLAGS = ("help", "help_all", "debug", "demo", "config")  # of the command line alone
MOST_BYTES = 2**20  # PyYAML reads a megabyte in seconds
MOST_VALUES = 100_000  # with every alias written out


def read_config(path: Path) -> list[Argument]:
    """Its arguments, each with its place. Raises UsageError for a file that is not a mapping, in one sentence."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UsageError(
                f"--config {path} has {size / 1e6:.3g} MB, which no file of arguments has (at most 1 MB): give a YAML "
                "or JSON file of 'name: value' lines"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not UTF-8 text") from error
    entries = _json_entries(path, text) if path.suffix == ".json" else _yaml_entries(path, text)
    arguments: dict[str, Argument] = {}
    for key, value, place in entries:
        name = key.replace("-", "_")
        if name in OWN_FLAGS:
            raise UsageError(f"{place}: '{key}' belongs on the command line, not in a file")
        if name in arguments:
            raise UsageError(f"{place}: '{key}' stands twice in this file")
        arguments[name] = Argument(name, value, place)
    return list(arguments.values())


def _json_entries(path: Path, text: str) -> list[tuple[str, Any, str]]:
    try:
        # pairs, so that a key that stands twice is seen
        entries = parse_json(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
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
        _refuse_expansion(path, node)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        if problem.startswith("but "):  # it goes on from what stands in the context
            problem = f"{getattr(error, 'context', '')} {problem}"
        raise UsageError(f"{path}{line}: not YAML: {problem}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested more than {MAX_DEPTH} deep; arguments are 'name: value' lines") from error
    except UsageError:
        raise
    except ValueError as error:  # a date that is none, an integer of thousands of digits
        raise UsageError(f"{path} has a value that cannot be read: {str(error).split(';')[0]}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path} should be 'name: value' lines, got {type(values).__name__}")
    return [(str(key.value), values.get(key.value), f"{path}:{key.start_mark.line + 1}") for key, _ in node.value]


def _refuse_expansion(path: Path, node: Any) -> None:
    """Refuse a document whose aliases (*name) stand for more than a file can hold, or for themselves, or too deep.

    Merges (<<) and messages write aliases out, so that ten lines can stand for billions of values.
    """
    sizes: dict[int, tuple[int, int]] = {}  # of nodes that were looked at, by identity: an alias is the same node again

    def measure(node: Any) -> tuple[int, int]:
        """Values, and how deep they are nested."""
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES, MAX_DEPTH  # what a node that holds itself finds
            inner = node.value if isinstance(node.value, list) else []
            parts = [measure(part) for item in inner for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
        return sizes[id(node)]

    size, depth = measure(node)
    if depth > MAX_DEPTH and size <= MOST_VALUES:
        raise RecursionError
    if size > MOST_VALUES:
        raise UsageError(
            f"{path}: its aliases (*name) stand for more than {MOST_VALUES} values, or for themselves; write out the "
            "values that are meant"
        )
