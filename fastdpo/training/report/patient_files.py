"""Files that a run can do without for a while: on a full disk they wait in memory, and training goes on."""

import logging
import os
from pathlib import Path

from fastdpo.files import write_atomic

logger = logging.getLogger(__name__)


class PatientFiles:
    """Writes whole files, each atomically; one that cannot be written is kept, and tried again with the next one.

    The log has one line when that begins and one when all is written, not one for each file and step.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._waiting: dict[Path, str | bytes] = {}
        self._reason: str | None = None

    def write(self, path: str | os.PathLike[str], data: str | bytes) -> None:
        """Write `data` (text as UTF-8) to `path`, now or later; it takes the place of what waits for that path."""
        self._waiting[Path(path)] = data
        self.retry()

    def retry(self) -> bool:
        """Write what waits; whether nothing waits any more."""
        folder, reason = None, None
        for path in list(self._waiting):
            folder = path.parent
            try:
                write_atomic(path, self._waiting[path])
                del self._waiting[path]
            except OSError as error:  # another file may be small enough
                reason = error.strerror or str(error)
        if reason is not None and self._reason is None:
            logger.warning(
                f"{self.what} cannot be written to {folder}: {reason}; training goes on, and they are kept in memory "
                "and written when it is possible again."
            )
        elif reason is None and self._reason is not None:
            logger.warning(f"{self.what} are written to {folder} again, with what was kept.")
        self._reason = reason
        return reason is None

    def read(self, path: str | os.PathLike[str]) -> str | None:
        """The text that is to be in `path`, None where there is none. Raises OSError where it cannot be read."""
        waiting = self._waiting.get(Path(path))
        if waiting is not None:
            return waiting if isinstance(waiting, str) else waiting.decode("utf-8")
        return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else None

    def lost(self) -> str | None:
        """Once nothing more will be written: the system's reason that something was not, None where all was."""
        return None if self.retry() else self._reason
