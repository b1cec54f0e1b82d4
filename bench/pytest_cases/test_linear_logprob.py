"""`linear_logprob` as a pytest benchmark: the quick cases of this machine's device, every installed entry."""

from collections.abc import Callable

import pytest
import torch

from ..linear_logprob.cases import logprob_cases
from ..linear_logprob.peers import FACTORIES
from ..measure.entries import Factory
from ..session import InputCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = logprob_cases(DEVICE, quick=True)
ENTRIES = [factory for factory in FACTORIES if DEVICE in factory.devices]


@pytest.mark.parametrize("factory", ENTRIES, ids=lambda factory: factory.name.replace(" ", "-"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_linear_logprob(case: InputCase, factory: Factory, measure: Callable[[InputCase, Factory], None]):
    measure(case, factory)
