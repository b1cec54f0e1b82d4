"""`fastdpo train` in this process."""

from collections.abc import Callable
from functools import partial

import pytest


@pytest.fixture
def run(fastdpo: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """run(*arguments): exit code, stdout and stderr of `fastdpo train`."""
    return partial(fastdpo, "train")
