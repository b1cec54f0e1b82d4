"""`train_step` as a table, on a terminal and in pages, and what each part of the gain over TRL comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.missing import Missing, in_a_cell, reasons
from ..measure.rows import Row
from .cases import YARDSTICK, TrainCase

# from TRL's trainer in steps: what is switched on, and the entry that has it
PARTS = (
    ("head and synchronisation", "fastdpo padded"),
    ("no padding", "fastdpo packed"),
    ("prompts once", "fastdpo shared"),
)
WIDTHS = (10, 10, 10, 20, 10, 10, 11, 7)
Summary = Mapping[str, Any]


def terminal_table(case: TrainCase, rows: Sequence[Row], missing: Sequence[Missing], clock: str) -> str:
    """One line per entry. `clock` ("best_ms" or "median_ms"): the time that pairs/s and the ratios are made of."""
    lines = [f"\n{case.name}: steps of whole trainers"]
    summaries = {row.entry: row.summary() for row in rows}
    if summaries:
        columns = ("pairs/s", "over trl", "ms/step", "p20 - p80", "peak MiB", "at rest", "positions", "reads")
        names = list(next(iter(summaries.values()))["error"])
        header = "".join(f"{column:>{width}}" for column, width in zip(columns, WIDTHS, strict=True))
        lines.append(f"  {'':20}{header}" + "".join(f"{name:>15}" for name in names) + "  batches")
    for entry, row in summaries.items():
        texts = (
            f"{rate(row, clock):.3g}",
            over_trl(row, summaries.get(YARDSTICK), clock),
            f"{row[clock]:.1f}",
            f"{row['p20_ms']:.1f} - {row['p80_ms']:.1f}",
            f"{row['peak_mib']:.1f}",
            f"{row['resting_mib']:.1f}",
            f"{row['positions']:.0f}",
            f"{row['host_reads']}",
        )
        line = "".join(f"{text:>{width}}" for text, width in zip(texts, WIDTHS, strict=True))
        line += "".join(f"{error:15.0e}" for error in row["error"].values())
        lines.append(f"  {entry:20}{line}  {row['batches']}".rstrip())
    if gain := split(summaries, clock):
        lines.append(f"  {gain}")
    return "\n".join(lines + [f"  {m.entry or 'all'}: {m.reason}" for m in missing])


def rate(row: Summary, clock: str) -> float:
    """Pairs per second."""
    return row["best_pairs_per_s" if clock == "best_ms" else "pairs_per_s"]


def over_trl(row: Summary, trl: Summary | None, clock: str) -> str:
    return "-" if trl is None else f"{trl[clock] / row[clock]:.2f} x"


def split(summaries: Mapping[str, Summary], clock: str) -> str:
    """The gain of each part over the entry before it, as far as they were measured; "" where there is no first."""
    last, parts = summaries.get(YARDSTICK), []
    for name, entry in PARTS:
        if last is None or entry not in summaries:
            break
        parts.append(f"{name} {last[clock] / summaries[entry][clock]:.2f} x")
        last = summaries[entry]
    return f"over trl, one after the other: {', '.join(parts)}" if parts else ""


def markdown(record: Mapping[str, Any]) -> list[str]:
    """A page's table: one line per case, one column per entry, and each case's gain in parts."""
    clock, rows = record["clock"], record["rows"]
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    why = reasons(record)
    names = ["model, pairs of tokens, dtype, mode", *(f"{name}: pairs/s (over trl), peak MiB" for name in entries)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    gains = []
    for case in dict.fromkeys(row["case"] for row in rows):
        summaries = {row["entry"]: row for row in rows if row["case"] == case}
        trl = summaries.get(YARDSTICK)
        cells = [
            _cell(summaries[name], trl, clock) if name in summaries else in_a_cell(why.get((case, name)))
            for name in entries
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
        if gain := split(summaries, clock):
            gains += ["", f"{case}: {gain}."]
    return lines + gains


def _cell(row: Summary, trl: Summary | None, clock: str) -> str:
    ratio = f" ({over_trl(row, trl, clock)})" if trl is not None and row is not trl else ""
    return f"{rate(row, clock):.3g}{ratio}, {row['peak_mib']:.0f} + {row['resting_mib']:.0f}"
