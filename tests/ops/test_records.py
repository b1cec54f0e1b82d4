"""An operator's arguments are the fields of named tuples, and its schema is inferred from them."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastdpo.ops.linear_logprob import operator
from fastdpo.ops.logprob import logprob
from fastdpo.ops.records import from_fields, takes_fields
from fastdpo.ops.sequence import segment_sum

TENSORS = "Tensor? bias, Tensor? lora_u, Tensor? lora_b"
SETTINGS = (
    "float temperature, float logit_scale, float? softcap, str stats, bool[] needs, bool unique_rows, bool ignored, "
    "ScalarType compute, ScalarType lora_compute, str backend, SymInt fused, SymInt workspace, SymInt keep"
)
SCHEMAS = {
    "linear_logprob": f"Tensor hidden, Tensor weight, {TENSORS}, Tensor labels, Tensor? rows, {SETTINGS}",
    "linear_logprob_backward": "Tensor? up, Tensor? up_entropy, Tensor? hidden, Tensor? weight, "
    f"{TENSORS}, Tensor? labels, Tensor? rows, Tensor? entropy, Tensor[] stored, SymInt[] sizes, "
    f"ScalarType hidden_dtype, ScalarType weight_dtype, ScalarType lora_dtype, {SETTINGS}",
    "logprob": "Tensor logits, Tensor labels, float inv_t, bool triton",
    "logprob_backward": "Tensor up, Tensor logits, Tensor labels, Tensor base, Tensor q, Tensor rest, float inv_t, "
    "bool triton",
    "segment_sum": "Tensor values, Tensor offsets",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schemas_of_the_operators(name):
    """Word for word, whatever torch infers from annotations."""
    assert all((operator.run, logprob, segment_sum)), "their modules register the operators"
    schema = getattr(torch.ops.fastdpo, name).default._schema
    assert str(schema) == f"fastdpo::{name}({SCHEMAS[name]}) -> Tensor[]"


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


class Options(NamedTuple):
    scale: float
    names: list[bool]

    @property
    def twice(self) -> float:
        return 2 * self.scale


def test_records_are_flattened_and_come_back():
    @takes_fields(Pair, Options)
    def scaled(pair: Pair, options: Options) -> list[Tensor]:
        """Of both."""
        return [pair.left * options.twice]

    left = torch.ones(2)
    assert scaled(left, None, 3.0, [True])[0].tolist() == [6.0, 6.0]
    assert torch.library.infer_schema(scaled, mutates_args=()) == (
        "(Tensor left, Tensor? right, float scale, bool[] names) -> Tensor[]"
    )
    assert (scaled.__name__, scaled.__doc__) == ("scaled", "Of both.")
    pair, options = from_fields((left, None, 3.0, [True]), Pair, Options)
    assert pair.left is left
    assert options == Options(3.0, [True])
    with pytest.raises(TypeError):
        scaled(left, None, 3.0)
