"""How many processes run the tests: one a core for the whole suite, one for anything else."""

import os

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` (pyproject.toml) means. `-m gpu`, `-m slow`, benchmarks and chosen files run alone."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.markexpr != "not slow":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)
