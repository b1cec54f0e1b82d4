"""Bytes that operators read and write, counted one by one: what a path in plain torch moves.

Each operator is counted as reading its inputs once and writing its results once, whatever a cache saves of it. What a
compiled kernel does inside is not seen.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# memory is taken or seen otherwise, nothing is moved
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view"}
# the old content is not read
OVERWRITE = {"copy_", "zero_", "fill_"}
# elements are picked: the rest of the first argument is not touched
PICK = {"gather", "index_select", "index", "embedding"}
PICK |= {"scatter_", "scatter_add_", "index_put_", "_index_put_impl_", "index_copy_", "index_add_"}


class Traffic(TorchDispatchMode):
    """Counts while it is entered; backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes += _moved(func._schema, args, kwargs or {}, out)
        return out


def _moved(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    name = schema.name.partition("::")[2]
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if is_view or name in FREE:
        return 0
    fresh = not any(r.alias_info is not None for r in schema.returns)
    made = sum(map(_bytes, _tensors(out))) if fresh else 0
    if name in PICK:
        picked = sum(map(_bytes, _tensors(args[1:]))) + made
        return picked + made if fresh else 2 * picked
    if name.startswith("new_") or name.endswith("_like"):
        return made
    total = made
    for index, argument in enumerate(schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        size = sum(map(_bytes, _tensors(value)))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        total += size if not changed or argument.kwarg_only or name in OVERWRITE else 2 * size
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(x: Tensor) -> int:
    """An expanded dimension is stored once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * x.element_size()
