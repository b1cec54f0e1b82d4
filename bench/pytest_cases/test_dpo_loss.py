"""`dpo_loss` as a pytest benchmark: the quick cases of this machine's device, every installed entry."""

from collections.abc import Callable

import pytest
import torch

from ..dpo_loss.cases import pair_cases
from ..dpo_loss.peers import FACTORIES
from ..measure.entries import Factory
from ..session import InputCase

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = pair_cases(DEVICE, quick=True)
ENTRIES = [factory for factory in FACTORIES if DEVICE in factory.devices]


@pytest.mark.parametrize("factory", ENTRIES, ids=lambda factory: factory.name.replace(" ", "-"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_dpo_loss(case: InputCase, factory: Factory, measure: Callable[[InputCase, Factory], None]):
    measure(case, factory)
