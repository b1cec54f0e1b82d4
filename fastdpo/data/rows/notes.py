"""What was done to rows of a data set, said once for all of them."""

import logging
from typing import NamedTuple

from fastdpo.wording import count

logger = logging.getLogger(__name__)


class Note(NamedTuple):
    """What happened to one row; the same text for each row that it happened to. lost: something is not used."""

    text: str
    lost: bool = False

    @property
    def level(self) -> int:
        return logging.WARNING if self.lost else logging.INFO


class Notes:
    """Counts notes over the rows of a data set, and remembers the first place of each."""

    def __init__(self) -> None:
        self.counts: dict[Note, int] = {}
        self.places: dict[Note, str] = {}

    def add(self, place: str, notes: tuple[Note, ...]) -> list[Note]:
        """Count the notes of a row; those that are new come back."""
        new = [note for note in notes if note not in self.counts]
        for note in notes:
            self.places.setdefault(note, place)
            self.counts[note] = self.counts.get(note, 0) + 1
        return new

    def log(self, where: str, rows: int) -> None:
        """One line for each note. rows: how many there are in all."""
        for note, times in self.counts.items():
            first = self.places[note]
            logger.log(note.level, f"{where}: {note.text} (in {times} of {count(rows, 'row')}; the first is {first}).")
