"""The progress bars of `datasets`, which know nothing of `disable_tqdm`."""

from collections.abc import Iterator
from contextlib import contextmanager

from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextmanager
def dataset_bars(shown: bool) -> Iterator[None]:
    """Inside it `datasets` shows bars only if `shown`, and afterwards as before."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
