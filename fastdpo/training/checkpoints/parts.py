"""What a trainer hands to `CrashSafeTrainer` to be kept in its checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Part(Protocol):
    """JSON values, under names that no other part has."""

    def state_dict(self) -> dict[str, Any]:
        """Called on every process."""
        ...

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from the values of all parts of a checkpoint; None: from nothing.

        Raises:
            CheckpointError: a run with these values cannot go on as this one.
        """
        ...


class FilePart(Protocol):
    """Files of its own in a checkpoint's folder."""

    def size(self) -> int:
        """About how many bytes `save` writes."""
        ...

    def save(self, folder: Path) -> None:
        """Called on the process that saves."""
        ...

    def load(self, folder: Path) -> None:
        """Not called where training starts from scratch. Raises CheckpointError."""
        ...
