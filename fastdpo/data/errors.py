"""What goes wrong with data: `DataError` for the user, `RowError` for the one row that has a reason."""

import json


class DataError(ValueError):
    """Data that cannot be used. The message is complete and user-facing; it may list rows line by line."""


class RowError(ValueError):
    """Why one row cannot be used. Whoever reads the rows adds the place and collects them into a
    `DataError`."""


def why_not_json(error: ValueError | RecursionError) -> str:
    """What `json.loads` (or `raw_decode`) stumbled over, for a message."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} (column {error.colno})"
    # python's own limit on the digits of an integer is the only other ValueError
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "JSON with an integer of too many digits"


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def in_bytes(size: int) -> str:
    """`9 GB`, `670 bytes`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            number = size / unit
            return f"{number:,.0f} {name}" if number >= 100 else f"{number:.3g} {name}"
    return f"{size} bytes"


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line without its full stop."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
