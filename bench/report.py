"""What a run leaves: a JSON after every case, a table per case, a summary."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.comparison import AnyCase
from bench.measure import Missing, Row
from fastdpo.training.files import write_atomic

RATES = {
    "GEMM {:.4g} TF/s": "gemm_tflops",
    "with an fp32 result {:.4g}": "gemm_fp32_out_tflops",
    "copy {:.4g} GB/s": "copy_gbs",
}


class Report:
    """Rows so far, and by name everything that has none. `path` None writes nothing."""

    def __init__(self, path: Path | None, case: str, environment: dict[str, Any], planned: Sequence[AnyCase]) -> None:
        self.path, self.case, self.environment = path, case, environment
        self.rows: list[Row] = []
        self.missing: list[Missing] = []
        self.cases = {case.name: case for case in planned}
        self._done: set[str] = set()

    def add(self, case: AnyCase, rows: list[Row], missing: list[Missing]) -> None:
        self.rows += rows
        self.missing += missing
        self._done.add(case.name)
        self.write()

    def unmeasured(self) -> list[Missing]:
        """Entries and cases that have no row; a run that was stopped names what it did not reach."""
        return self.missing + [Missing(name, "", "not reached") for name in self.cases if name not in self._done]

    def write(self) -> None:
        # not before there is something: an older file may be there
        if self.path is not None and self._done:
            write_atomic(self.path, json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "complete": len(self._done) == len(self.cases),
            "environment": self.environment,
            "rows": [{**row.summary(), **asdict(self.cases[row.case])} for row in self.rows],
            "refused": [str(m) for m in self.missing if "failed the oracle" in m.reason],
            "missing": [asdict(m) for m in self.unmeasured()],
        }


def table(case: AnyCase, rows: Sequence[Row], missing: Sequence[Missing], clock: str) -> str:
    """One line per entry. `clock` ("best_ms" or "median_ms") is what the first column and the ratios are of."""
    title = f"\n{case.name}" + (f"  ({case.head})" if case.head else "")
    lines = [title]
    if rows:
        rates = ((name, rows[0].ceilings.get(key)) for name, key in RATES.items())
        lines = [title + "".join(f"; {name.format(rate)}" for name, rate in rates if rate)]
        header = f"  {'':20}{clock.removesuffix('_ms') + ' ms':>10}{'p20 - p80':>18}{'peak MiB':>10}{'TF/s':>9}"
        header += "".join(f"{name:>{width}}" for name, width, *_ in _bounds(rows[0]))
        lines.append(f"{header}{''.join(f'{name:>9}' for name in rows[0].error)}{'dh rows':>9}  vs")
    own = next((row for row in rows if row.entry == "fastdpo"), None)
    lines += [_line(row, own, clock) for row in rows]
    return "\n".join(lines + [f"  {m.entry or 'all'}: {m.reason}" for m in missing])


def _bounds(row: Row) -> list[tuple[str, int, str, str]]:
    """Columns (name, width, key, form) that need the measured rates."""
    columns = [
        ("of GEMM", 9, "gemm_share", ".0%"),
        ("bound ms", 10, "bound_ms", ".4g"),
        ("of it", 7, "bound_share", ".0%"),
    ]
    return columns if row.ceilings else []


def _line(row: Row, own: Row | None, clock: str) -> str:
    s = row.summary()

    def text(value: Any, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    spread = f"{s['p20_ms']:.4g} - {s['p80_ms']:.4g}"
    line = f"  {row.entry:20}{s[clock]:10.4g}{spread:>18}{row.peak_mib:10.1f}{text(s['tflops'], '.3g', 9)}"
    line += "".join(text(s[key], form, width) for _, width, key, form in _bounds(row))
    line += "".join(f"{error:9.0e}" for error in row.error.values())
    line += text(row.row_errors.get("share_within"), ".0%", 9)
    return line if own is None or row is own else f"{line}  {s[clock] / own.summary()[clock]:.2f} x"


def over_trl(report: Report, tokens: int) -> str:
    """Of each of our forms at that N: how many times faster than TRL, what both bounds say is possible, how close to
    its own bound it is, and its peak memory over TRL's."""
    lines = []
    for trl in (row for row in report.rows if row.entry == "trl"):
        case = report.cases[trl.case]
        if getattr(case, "n", None) != tokens:
            continue
        for own in (row for row in report.rows if row.case == trl.case and row.entry.startswith("fastdpo")):
            ours, theirs = own.bound_ms, trl.bound_ms
            possible = (
                f"{theirs / ours:9.2f} x{ours / own.median_ms:10.0%}" if ours and theirs else f"{'-':>11}{'-':>10}"
            )
            lines.append(
                f"  {f'{case.head} {case.dtype} {case.mode}':32}{own.entry:18}{trl.median_ms / own.median_ms:7.2f} x"
                f"{possible}{own.peak_mib / trl.peak_mib:8.2f}"
            )
    head = f"  {'':50}{'over trl':>9}{'by bounds':>11}{'of bound':>10}{'memory':>8}"
    return "\n".join([head, *lines]) if lines else ""
