"""What an entry of a comparison is, and how those that are installed are found."""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

logger = logging.getLogger("fastdpo.bench")


class LeftOut(Exception):
    """A peer that is not installed, or has not the API that its entry calls; the message says which."""


@dataclass(frozen=True)
class Entry:
    """One implementation.

    Attributes:
        run: what is called; its arguments are the benchmark's (the first line of its `peers.py`).
        settings: environment variables while it runs, backward included.
        softcap: it takes one; dtypes: those that it takes, None for all.
        products: by mode, the products of N x H x V that its algorithm needs, as its source does it; None: not known,
            or a matter of the data (what a filter skips).
        tile_bytes: (mode, bytes of an operand) -> bytes through device memory for each element of N x V (`bounds.py`);
            None: not counted.
    """

    name: str
    version: str
    run: Callable[..., Any]
    settings: dict[str, str] = field(default_factory=dict)
    softcap: bool = True
    dtypes: tuple[str, ...] | None = None
    products: Mapping[str, int] | None = None
    tile_bytes: Callable[[str, int], int] | None = None

    def obstacle(self, dtype: str, softcap: float | None) -> str | None:
        """Why it cannot take such inputs."""
        if softcap is not None and not self.softcap:
            return "it has no softcap"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {' and '.join(self.dtypes)} only"
        return None

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = {name: os.environ.get(name) for name in self.settings}
        os.environ.update(self.settings)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@dataclass(frozen=True)
class Factory:
    """Makes an entry, importing the peer inside; `devices`: where it takes part unless named."""

    name: str
    make: Callable[[str], Entry]
    devices: Collection[str] = ("cpu", "cuda")


def make_entries(factories: Collection[Factory], device: str, names: Collection[str] | None = None) -> dict[str, Entry]:
    """name -> entry, of those asked for (by default the device's own); what is not there is named in the log."""
    entries = {}
    for factory in factories:
        if device not in factory.devices if names is None else factory.name not in names:
            continue
        try:
            entries[factory.name] = factory.make(factory.name)
        except Exception as reason:  # a peer's import may fail in any way
            logger.warning("%s: left out: %s", factory.name, _one_line(reason))
    return entries


@cache
def installed(package: str) -> str:
    """ "package version".

    Raises:
        LeftOut: it is not installed.
    """
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        raise LeftOut(f"not installed (pip install {package})") from None


def own_version() -> str:
    import fastdpo

    return f"fastdpo {fastdpo.__version__}"


def _one_line(reason: Exception) -> str:
    text = " ".join(str(reason).split())
    return text if isinstance(reason, LeftOut) else f"{type(reason).__name__}: {text}"
