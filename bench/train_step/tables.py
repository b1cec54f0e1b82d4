"""`train_step` as a table, on a terminal and in README, and what each part of the gain over TRL comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.rows import Missing, Row
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
    """One line per entry. `clock` ("best_ms" or "median_ms"): of a step, what pairs/s and the ratios are of."""
    lines = [f"\n{case.name}: steps of whole trainers"]
    found = {row.entry: row.summary() for row in rows}
    if found:
        columns = ("pairs/s", "over trl", "ms/step", "p20 - p80", "peak MiB", "at rest", "positions", "reads")
        names = list(next(iter(found.values()))["error"])
        header = "".join(f"{column:>{width}}" for column, width in zip(columns, WIDTHS, strict=True))
        lines.append(f"  {'':20}{header}" + "".join(f"{name:>15}" for name in names) + "  batches")
    for entry, one in found.items():
        texts = (
            f"{rate(one, clock):.3g}",
            over_trl(one, found.get(YARDSTICK), clock),
            f"{one[clock]:.1f}",
            f"{one['p20_ms']:.1f} - {one['p80_ms']:.1f}",
            f"{one['peak_mib']:.1f}",
            f"{one['resting_mib']:.1f}",
            f"{one['positions']:.0f}",
            f"{one['host_reads']}",
        )
        line = "".join(f"{text:>{width}}" for text, width in zip(texts, WIDTHS, strict=True))
        line += "".join(f"{error:15.0e}" for error in one["error"].values())
        lines.append(f"  {entry:20}{line}  {one['batches']}".rstrip())
    if told := split(found, clock):
        lines.append(f"  {told}")
    return "\n".join(lines + [f"  {m.entry or 'all'}: {m.reason}" for m in missing])


def rate(one: Summary, clock: str) -> float:
    """Pairs per second."""
    return one["best_pairs_per_s" if clock == "best_ms" else "pairs_per_s"]


def over_trl(one: Summary, trl: Summary | None, clock: str) -> str:
    return "-" if trl is None else f"{trl[clock] / one[clock]:.2f} x"


def split(found: Mapping[str, Summary], clock: str) -> str:
    """The gain of each part over the entry before it, as far as they were measured; "" where there is no first."""
    last, parts = found.get(YARDSTICK), []
    for name, entry in PARTS:
        if last is None or entry not in found:
            break
        parts.append(f"{name} {last[clock] / found[entry][clock]:.2f} x")
        last = found[entry]
    return f"over trl, one after the other: {', '.join(parts)}" if parts else ""


def markdown(record: Mapping[str, Any]) -> list[str]:
    """README's table: one line per case, one column per entry, and each case's gain in parts."""
    clock, rows = record["clock"], record["rows"]
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    absent = {(m["case"], m["entry"]): m["reason"] for m in record.get("missing", ())}
    names = ["model, pairs of tokens, dtype, mode", *(f"{name}: pairs/s (over trl), peak MiB" for name in entries)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    gains = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["entry"]: row for row in rows if row["case"] == case}
        cells = [
            _cell(found[name], found.get(YARDSTICK), clock) if name in found else _why(absent.get((case, name)))
            for name in entries
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
        if told := split(found, clock):
            gains += ["", f"{case}: {told}."]
    return lines + gains


def _cell(one: Summary, trl: Summary | None, clock: str) -> str:
    ratio = f" ({over_trl(one, trl, clock)})" if trl is not None and one is not trl else ""
    return f"{rate(one, clock):.3g}{ratio}, {one['peak_mib']:.0f} + {one['resting_mib']:.0f}"


def _why(reason: str | None) -> str:
    return "failed the oracle" if reason and "failed the oracle" in reason else reason or "-"
