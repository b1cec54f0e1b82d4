"""One value, from the command line or a file, as the type that its argument has."""

import json
from typing import Any, NamedTuple

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.arguments import Field
from fastdpo.json_text import parse_json
from fastdpo.wording import LOSSES_ELSEWHERE, did_you_mean

TRUTH_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS = {
    "bool": "true or false",
    "int": "a whole number (int)",
    "float": "a number (float)",
    "str": "text",
    "dict": "a mapping (JSON on the command line)",
    "None": "none",
}


class Argument(NamedTuple):
    """One argument as it was given: `place` is "FILE:LINE", or "" on the command line."""

    name: str
    value: Any
    place: str = ""
    given_as: str = ""  # the name that the user wrote, where it is not `name`

    @property
    def where(self) -> str:
        """How a message calls it."""
        name = self.given_as or self.name
        return f"{self.place}: {name}" if self.place else f"--{name}"


def as_yaml(value: Any) -> Any:
    """What a word on the command line is in YAML: true, false or nothing."""
    word = value.lower() if isinstance(value, str) else None
    if word in ("none", "null"):
        return None
    return TRUTH_WORDS[word] if word in ("true", "yes", "on", "false", "no", "off") else value


def convert(value: Any, field: Field, where: str) -> Any:
    """`value`, from the command line (text) or a file (anything), as the field's type. Raises UsageError."""
    kinds = field.type.split(" | ")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and where.startswith("--"):
        value = value[0]
    if field.choices and value is False and "no" in field.choices:
        value = "no"  # YAML reads a bare `no` as false
    if "dict" in kinds and isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            parse_json(value)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{where} is not JSON: {error.msg} at character {error.pos}, in {_shown(value)}"
            ) from error
        except ValueError as error:
            raise UsageError(f"{where} cannot be read: {error}") from error
    for kind in kinds:
        try:
            result = _as_kind(value, kind, field)
        except (TypeError, ValueError, OverflowError):
            continue
        for name in result if isinstance(result, list) else [result]:
            if field.choices and isinstance(name, str) and name not in field.choices:
                hint = did_you_mean(name, field.choices)
                if field.name == "loss_type" and name.lower() in LOSSES_ELSEWHERE:
                    hint = f"here it is {LOSSES_ELSEWHERE[name.lower()]}"
                says = f"{where} should be one of {', '.join(field.choices)}, got '{name}'"
                raise UsageError(f"{says}; {hint}" if hint else says)
        return result
    expected = " or ".join(_kind_name(kind) for kind in kinds if kind != "None" or len(kinds) == 1)
    raise UsageError(f"{where} should be {expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _kind_name(kind: str) -> str:
    return f"a list ({kind})" if kind.startswith("list") else KINDS[kind]


def _as_kind(value: Any, kind: str, field: Field) -> Any:
    """`value` as one kind of the field's type. Raises TypeError or ValueError where it is not one."""
    word = value.strip().lower() if isinstance(value, str) else None
    nothing = value is None or (word in ("none", "null") and word != field.default)
    if nothing and "None" in field.type.split(" | "):
        return None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "bool" and word in TRUTH_WORDS:
        return TRUTH_WORDS[word]
    if kind in ("int", "float") and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = float(value)
        if kind == "float":
            return number
        return int(number) if number == int(number) else _refuse()
    if kind == "list[dict]" and isinstance(value, str):
        value = parse_json(value)
    if kind.startswith("list"):
        # one word is a list only where the field takes no plain text
        if isinstance(value, str) and ("," in value or "str" not in field.type.split(" | ")):
            value = [item.strip() for item in value.split(",")]
        return [_as_kind(item, kind[5:-1], field) for item in value] if isinstance(value, list) else _refuse()
    if kind == "dict":
        mapping = parse_json(value) if isinstance(value, str) else value
        return mapping if isinstance(mapping, dict) else _refuse()
    if kind == "str" and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    return _refuse()


def _refuse() -> Any:
    raise TypeError
