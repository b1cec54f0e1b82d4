"""A run's tables on a terminal."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..largest import Fit
from ..linear_logprob.cases import Growth
from ..measure.comparison import AnyCase
from ..measure.missing import Missing
from ..measure.rows import Row
from ..record import RunRecord

RATES = {
    "GEMM {:.4g} TF/s": "gemm_tflops",
    "with an fp32 result {:.4g}": "gemm_fp32_out_tflops",
    "copy {:.4g} GB/s": "copy_gbs",
}


class Column(NamedTuple):
    """One key of a row's summary."""

    name: str
    width: int
    key: str
    form: str


def table(case: AnyCase, rows: Sequence[Row], missing: Sequence[Missing], clock: str) -> str:
    """One line per entry. `clock` ("best_ms" or "median_ms"): the time that the last column's ratios are made of."""
    title = f"\n{case.name}" + (f"  ({case.head})" if case.head else "")
    lines = [title]
    if rows:
        rates = ((name, rows[0].ceilings.get(key)) for name, key in RATES.items())
        lines = [title + "".join(f"; {name.format(rate)}" for name, rate in rates if rate)]
        columns = _columns(rows[0], clock)
        header = "".join(f"{column.name:>{column.width}}" for column in columns)
        errors = "".join(f"{name:>9}" for name in rows[0].error)
        ratios = "vs" if rows[0].bounded else "vs, on a CPU"
        lines.append(f"  {'':20}{header}{errors}{'dh rows':>9}  {ratios}")
    own = next((row for row in rows if row.entry == "fastdpo"), None)
    lines += [_line(row, own, clock) for row in rows]
    return "\n".join(lines + [f"  {m.entry or 'all'}: {m.reason}" for m in missing])


def _columns(row: Row, clock: str) -> list[Column]:
    best = [Column("best ms", 10, "best_ms", ".4g")] if clock == "best_ms" else []
    common = [
        *best,
        Column("median ms", 11, "median_ms", ".4g"),
        Column("p20 - p80", 18, "", ""),
        Column("peak MiB", 10, "peak_mib", ".1f"),
        Column("TF/s", 8, "tflops", ".3g"),
        Column("of GEMM", 9, "gemm_share", ".0%"),
    ]
    if row.bounded:
        return [*common, Column("bound ms", 10, "bound_ms", ".4g"), Column("of it", 7, "bound_share", ".0%")]
    return [*common, Column("GB/s", 7, "gbs", ".3g"), Column("of copy", 9, "copy_share", ".0%")]


def _line(row: Row, own: Row | None, clock: str) -> str:
    s = row.summary()
    p20_p80 = f"{s['p20_ms']:.4g} - {s['p80_ms']:.4g}"
    line = f"  {row.entry:20}"
    for column in _columns(row, clock):
        line += _text(s[column.key], column.form, column.width) if column.key else f"{p20_p80:>{column.width}}"
    line += "".join(f"{error:9.0e}" for error in row.error.values())
    line += _text(row.row_errors.get("share_within"), ".0%", 9)
    return line if own is None or row is own else f"{line}  {s[clock] / own.summary()[clock]:.2f} x"


def _text(value: Any, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def growth_table(case: Growth, fits: Sequence[Fit], missing: Sequence[Missing]) -> str:
    """The largest N of each entry and its peak, and the next size with its own."""
    lines = [f"\n{case.name}" + (f"  ({case.head})" if case.head else "")]
    names = list(next((fit.error for fit in fits if fit.error), {}))
    errors = "".join(f"{name:>9}" for name in names)
    lines.append(f"  {'':20}{'N':>10}{'peak MiB':>10}{'next N':>10}{'its peak':>10}{errors}")
    for fit in fits:
        size = "none" if not fit.n else f">= {fit.n}" if fit.next_n is None else str(fit.n)
        after = "OOM" if fit.next_n and fit.next_peak_mib is None else _text(fit.next_peak_mib, ".1f", 0)
        line = f"  {fit.entry:20}{size:>10}{_text(fit.peak_mib, '.1f', 10)}{_text(fit.next_n, 'd', 10)}{after:>10}"
        lines.append(line + "".join(_text(fit.error.get(name), ".0e", 9) for name in names))
    return "\n".join(lines + [f"  {m.entry or 'all'}: {m.reason}" for m in missing])


def summary(record: RunRecord) -> str:
    """One line per case that is no point of a plot: times and peaks, of others as ratios to ours."""
    rows = [row for row in record.rows if not getattr(record.cases[row.case], "sweep", False)]
    entries = list(dict.fromkeys(row.entry for row in rows))
    if not rows or len(entries) > 5:
        return ""
    width = max(len(row.case) for row in rows) + 2
    lines = [" " * width + "".join(f"{name:>24}" for name in entries)]
    for case in dict.fromkeys(row.case for row in rows):
        cells = {row.entry: row for row in rows if row.case == case}
        own = cells.get("fastdpo")
        texts = (_cell(cells.get(name), own, record.clock) for name in entries)
        lines.append(f"{case:{width}}" + "".join(f"{text:>24}" for text in texts))
    return "\n".join(lines)


def _cell(row: Row | None, own: Row | None, clock: str) -> str:
    if row is None:
        return "-"
    ms = row.summary()[clock]
    time = f"{ms:.4g} ms" if own is None or row is own else f"{ms / own.summary()[clock]:.2f} x"
    return f"{time}, {row.peak_mib:.0f} MiB"


def over_trl(record: RunRecord, tokens: int) -> str:
    """Of each of our forms at that N: how many times faster than TRL, what both bounds say is possible, how close to
    its own bound it is, and its peak memory over TRL's."""
    lines = []
    for trl in (row for row in record.rows if row.entry == "trl"):
        case = record.cases[trl.case]
        if getattr(case, "n", None) != tokens:
            continue
        for own in (row for row in record.rows if row.case == trl.case and row.entry.startswith("fastdpo")):
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
