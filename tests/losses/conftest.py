"""A few pairs that the losses' tests read, in float64."""

from collections.abc import Callable

import pytest
import torch

from fastdpo.losses import PairLogps


def make(*values: tuple[float, float, float, float], lengths: tuple[list[int], list[int]] | None = None) -> PairLogps:
    columns = (torch.tensor(c, dtype=torch.float64) for c in zip(*values, strict=True))
    return PairLogps(*columns, *(torch.tensor(x) for x in (lengths or ())))


@pytest.fixture(scope="session")
def pairs() -> Callable[..., PairLogps]:
    """`pairs((chosen, rejected, ref_chosen, ref_rejected), ..., lengths=(chosen ones, rejected ones))`."""
    return make


@pytest.fixture(scope="session")
def one() -> PairLogps:
    """u_w = 2, u_l = -1, h = 3."""
    return make((-10.0, -20.0, -12.0, -19.0), lengths=([4], [5]))


@pytest.fixture(scope="session")
def some() -> PairLogps:
    return make(
        (-10.0, -20.0, -12.0, -19.0), (-3.0, -1.0, -2.5, -2.0), (-8.0, -4.5, -8.1, -4.0), lengths=([4, 2, 9], [5, 1, 3])
    )


@pytest.fixture(scope="session")
def three() -> PairLogps:
    """Pairs of other lengths and margins: what a mean over the batch or a sort does shows here."""
    return make(
        (-4.0, -9.0, -7.0, -8.0), (-6.0, -3.0, -5.0, -5.5), (-2.0, -5.0, -1.0, -9.0), lengths=([4, 1, 2], [5, 2, 8])
    )
