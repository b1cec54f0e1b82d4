"""What a run of a benchmark leaves: a JSON, written after every case."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdpo.files import write_atomic

from .largest import Fit
from .measure.comparison import AnyCase
from .measure.missing import WRONG, Missing
from .measure.rows import Row


class RunRecord:
    """Rows so far, and by name everything that has none.

    path: of the JSON; None writes nothing. planned: the benchmark's cases. clock: "best_ms" or "median_ms", the time
    that ratios are made of.
    """

    def __init__(
        self,
        path: Path | None,
        benchmark: str,
        environment: dict[str, Any],
        planned: Sequence[AnyCase],
        clock: str = "median_ms",
    ) -> None:
        self.path, self.benchmark, self.environment, self.clock = path, benchmark, environment, clock
        self.rows: list[Row] = []
        self.fits: list[Fit] = []
        self.missing: list[Missing] = []
        self.cases = {case.name: case for case in planned}
        self._done: set[str] = set()

    def add(self, case: AnyCase, rows: list[Row], missing: list[Missing], fits: Sequence[Fit] = ()) -> None:
        self.rows += rows
        self.fits += fits
        self.missing += missing
        self._done.add(case.name)
        self.write()

    def unmeasured(self) -> list[Missing]:
        """Entries and cases that have no row; a run that was stopped names what it did not reach."""
        return self.missing + [Missing(name, "", "not reached") for name in self.cases if name not in self._done]

    def write(self) -> None:
        # not before there is something: an older file may be there
        if self.path is not None and self._done:
            write_atomic(self.path, json.dumps(self.as_dict(), indent=1) + "\n")

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.benchmark,
            "clock": self.clock,
            "complete": len(self._done) == len(self.cases),
            "environment": self.environment,
            "rows": [{**row.summary(), **asdict(self.cases[row.case])} for row in self.rows],
            "largest": [{**fit.summary(), **asdict(self.cases[fit.case])} for fit in self.fits],
            "refused": [str(m) for m in self.missing if WRONG in m.reason],
            "missing": [asdict(m) for m in self.unmeasured()],
        }
