"""A patch of another package's modules, which can be nested and undone."""

import threading
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, TypeVar

_EXCHANGE = threading.RLock()
P = TypeVar("P", bound="Patch")


class Change(Protocol):
    """Something of ours in the place of something of theirs."""

    def put_on(self) -> None: ...

    def take_off(self) -> None: ...


class Patch:
    """A handle on a patch: `undo()` ends it, and so does leaving a `with` block, also by an exception.

    Each patch is a subclass. Its changes are made for the first handle and taken back with the last, from any thread.
    """

    _in_force: ClassVar[list["Patch"]]
    _changes: ClassVar[list[Change]]

    def __init_subclass__(cls) -> None:
        cls._in_force, cls._changes = [], []

    @classmethod
    def put_on(cls: type[P], prepare: Callable[[], Sequence[Change]]) -> P:
        """A new handle. Without another in force, the changes of `prepare()` are made first."""
        with _EXCHANGE:
            if not cls._in_force:
                cls._changes[:] = prepare()
                for change in cls._changes:
                    change.put_on()
            handle = cls()
            cls._in_force.append(handle)
            return handle

    def undo(self) -> None:
        """Puts back what was there, unless another handle still needs the patch; a second call does nothing."""
        with _EXCHANGE:
            if self not in self._in_force:
                return
            self._in_force.remove(self)
            if not self._in_force:
                for change in self._changes:
                    change.take_off()
                self._changes.clear()

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
