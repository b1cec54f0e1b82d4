"""JSON of a moderate depth: what is nested deeper would end a later step, which walks it, in a RecursionError."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
TOO_DEEP = f"JSON nested more than {MAX_DEPTH} deep"


def parse_json(text: str, **options: Any) -> Any:
    """`json.loads`, for files that people write and runs leave.

    Raises:
        ValueError: a `JSONDecodeError`; or it is nested too deeply, or has an integer that Python does not read.
    """
    try:
        value = json.loads(text, **options)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:  # python's own limit on digits, with advice that is for programmers
        raise ValueError("JSON with an integer of too many digits") from error
    # text with few brackets cannot be deep
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise ValueError(TOO_DEEP)
    return value


def read_json(path: Path) -> Any:
    """`parse_json` of a file in UTF-8. Raises ValueError (a UnicodeDecodeError is one) and OSError."""
    return parse_json(path.read_text(encoding="utf-8"))


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and mappings in `value` are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        level = [item for item in level if isinstance(item, Mapping | list | tuple)]
        if not level:
            return False
        level = [inner for item in level for inner in (item.values() if isinstance(item, Mapping) else item)]
    return any(isinstance(item, Mapping | list | tuple) for item in level)
