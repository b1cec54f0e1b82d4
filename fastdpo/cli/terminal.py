"""What commands show on stderr while they work: log lines, and progress bars where there is a terminal."""

import contextlib
import sys

import datasets
import transformers

from fastdpo.escaping import visible


def say(text: str) -> None:
    """One line of the log: stderr, without breaking a progress bar."""
    from tqdm.auto import tqdm

    with contextlib.suppress(OSError):  # a terminal that was closed ends no run
        tqdm.write(visible(text), file=sys.stderr)


def no_bars_without_terminal() -> bool:
    """Progress bars are noise in a log file: switch the libraries' off where stderr is no terminal; True if so."""
    if sys.stderr.isatty():
        return False
    hide_bars()
    return True


def hide_bars() -> None:
    """Switch the libraries' progress bars off."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
