"""Rows that come out of Arrow: without the nulls that it added, since its columns give every row every row's keys."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

Rows = Callable[[dict[str, Any]], dict[str, Any]]


def arrow_rows(schema: pa.Schema, decoded: bool) -> Rows:
    """A function of a row (Python's values of `schema`) -> the row as somebody wrote it.

    A key of a struct whose value is null is left out: whether it was written as null cannot be known. What a column of
    JSON holds keeps its nulls. decoded: such values are objects already, and not their JSON text.
    """
    columns = {field.name: field.type for field in schema if _is_nested(field.type)}
    return lambda row: {
        name: _written(value, columns[name], decoded) if name in columns else value for name, value in row.items()
    }


def _is_json(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_nested(kind: Any) -> bool:
    return _is_json(kind) or pa.types.is_struct(kind) or (_is_list(kind) and _is_nested(kind.value_type))


def _written(value: Any, kind: Any, decoded: bool) -> Any:
    if value is None:
        return None
    if _is_json(kind):
        return value if decoded else json.loads(value)
    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        return {
            name: _written(item, kind.field(name).type, decoded) for name, item in value.items() if item is not None
        }
    if _is_list(kind) and isinstance(value, list):
        return [_written(item, kind.value_type, decoded) for item in value]
    return value
