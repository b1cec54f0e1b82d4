"""Named tuples as arguments of an operator, which takes their fields one after another.

What an operator takes is written once, as the fields of its records: torch infers the schema from them.
"""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any, get_type_hints

from torch import Tensor


def takes_fields(*records: Any) -> Callable[[Callable[..., list[Tensor]]], Callable[..., list[Tensor]]]:
    """Makes of a function of such named tuples one of all their fields, with a signature that a schema follows from.

    records: classes whose fields are of types that `torch.library.infer_schema` knows: Tensor, int, float, bool, a list
    of one of these, str, torch.dtype; or None beside one of them.
    """
    fields = {name: kind for record in records for name, kind in get_type_hints(record).items()}
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in fields.items()]

    def decorate(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def flat(*values: Any) -> list[Tensor]:
            return function(*from_fields(values, *records))

        flat.__name__, flat.__doc__ = function.__name__, function.__doc__
        flat.__signature__ = Signature(parameters, return_annotation=list[Tensor])  # pyright: ignore[reportFunctionMemberAccess]
        return flat

    return decorate


def from_fields(values: Sequence[Any], *records: Any) -> list[Any]:
    """The named tuples whose fields, one after another, are `values`."""
    made, start = [], 0
    for record in records:
        end = start + len(record._fields)
        made.append(record(*values[start:end]))
        start = end
    return made
