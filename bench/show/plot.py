"""Time and peak memory against N and against V, as one PNG of a result: `python -m bench.show.plot RESULT.json`."""

import argparse
import hashlib
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.files import write_atomic

from ..measure.missing import OUT_OF_MEMORY
from ..train_step import plot
from . import sentences

MODES = {"frozen": "head frozen (LoRA)", "trained": "head trained"}
AXES = {"tokens": "scored tokens N", "v": "vocabulary V"}
SHAPE = ("n", "pairs", "length", "h", "v", "dtype", "softcap", "inputs")
VARYING = {"tokens": ("n", "length"), "v": ("v",)}
# readable in grey and with any colour vision (Okabe and Ito)
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#999999", "#7A5195", "#B8A600")
MARKERS = "os^Dv*Pxhd"
DIGEST = "fastdpo result"  # the PNG's field that says of which record it is
Row = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """Rows that differ in one size only, ordered by it, and what they have in common."""

    axis: str
    rows: tuple[Row, ...]

    @property
    def common(self) -> str:
        row = self.rows[0]
        sizes = [f"{row['pairs']} pairs"] if "pairs" in row else []
        if self.axis == "v":
            sizes.append(f"T = {row['length']}" if "length" in row else f"N = {row['n']}")
        sizes.append(f"H = {row['h']}")
        if self.axis == "tokens":
            sizes.append(f"V = {row['v']}")
        return ", ".join([*sizes, row["dtype"]])


def series(rows: Sequence[Row], mode: str, axis: str) -> Series | None:
    """The longest run of sizes along `axis` in a mode; None where no shape was measured at two of them."""
    fixed = [name for name in SHAPE if name not in VARYING[axis]]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["mode"] == mode and row.get("tokens"):
            groups.setdefault(tuple(row.get(name) for name in fixed), []).append(row)
    longest = max(groups.values(), key=lambda group: len({row[axis] for row in group}), default=[])
    if len({row[axis] for row in longest}) < 2:
        return None
    return Series(axis, tuple(sorted(longest, key=lambda row: row[axis])))


def can_draw(record: dict[str, Any]) -> bool:
    if record["case"] == "train_step":
        return bool(record["rows"])
    return any(series(record["rows"], mode, axis) for mode in MODES for axis in AXES)


def digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def draw(record: dict[str, Any]) -> bytes:
    """The PNG.

    Raises:
        ValueError: the record has nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if record["case"] == "train_step":
        names = dict.fromkeys(row["entry"] for row in record["rows"])
        figure = plot.figure(record, dict(zip(names, COLOURS, strict=False)))
    else:
        figure = _lines(record)
    FigureCanvasAgg(figure)
    figure.supxlabel("\n".join(textwrap.wrap(_caption(record), 150)), fontsize=8, ha="left", x=0.01)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={DIGEST: digest(record)})
    return buffer.getvalue()


def _lines(record: dict[str, Any]) -> Any:
    """A row of panels for time and one for memory in each mode, a column for each size that varies.

    Raises:
        ValueError: the record has no two points to draw a line through.
    """
    from matplotlib.figure import Figure

    rows = record["rows"]
    modes = [mode for mode in MODES if any(series(rows, mode, axis) for axis in AXES)]
    if not modes:
        raise ValueError("no shape was measured at two N or two V: run with --plot")
    drawn = [points for mode in modes for axis in AXES if (points := series(rows, mode, axis))]
    versions = {row["entry"]: row["version"] for points in drawn for row in points.rows}
    style = {entry: index for index, entry in enumerate(versions)}
    figure = Figure(figsize=(10, 1.6 + 5.6 * len(modes)), dpi=100, layout="constrained")
    panels = figure.subplots(2 * len(modes), len(AXES), squeeze=False)
    for m, mode in enumerate(modes):
        for a, axis in enumerate(AXES):
            points = series(rows, mode, axis)
            for k, kind in enumerate(("time", "memory")):
                _panel(panels[2 * m + k][a], points, kind, mode, axis, style)
    handles = {str(line.get_label()): line for panel in figure.axes for line in panel.get_lines()}
    labels = [f"{entry} ({versions[entry]})" for entry in handles]
    figure.legend(
        list(handles.values()),
        labels,
        title=f"{record['case']}: time and peak memory of a step (forward and backward)",
        title_fontproperties={"weight": "bold", "size": 13},
        loc="outside upper center",
        ncols=min(3, len(labels)),
        frameon=False,
    )
    return figure


def _panel(panel: Any, points: Series | None, kind: str, mode: str, axis: str, style: dict[str, int]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xlabel(AXES[axis])
    panel.set_ylabel("median ms" if kind == "time" else "peak MiB above inputs")
    if points is None:
        panel.set_axis_off()
        panel.text(
            0.5, 0.5, f"{MODES[mode]}:\nonly one {AXES[axis][-1]} was measured", ha="center", transform=panel.transAxes
        )
        return
    panel.set_title(f"{MODES[mode]}; {points.common}", fontsize=9)
    for entry, index in style.items():
        rows = [row for row in points.rows if row["entry"] == entry]
        if not rows:
            continue
        x = [row[axis] for row in rows]
        y = [row["median_ms" if kind == "time" else "peak_mib"] for row in rows]
        look = {"color": COLOURS[index % len(COLOURS)], "linewidth": 2.4 if entry == "fastdpo" else 1.4}
        panel.plot(x, y, marker=MARKERS[index % len(MARKERS)], markersize=5, label=entry, **look)
        if kind == "time":
            low, high = ([row[key] for row in rows] for key in ("p20_ms", "p80_ms"))
            panel.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = sorted({row[axis] for row in points.rows})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(True, which="major", alpha=0.3)


def _caption(record: dict[str, Any]) -> str:
    memory = sorted({m["entry"] for m in record.get("missing", ()) if m["reason"] == OUT_OF_MEMORY and m["entry"]})
    lost = f" Lines that end early ran out of memory: {', '.join(memory)}." if memory else ""
    conditions = sentences.conditions(record["environment"])
    what = "Medians; the band is the 20th to the 80th percentile."
    if record["case"] == "train_step":
        what = "Of the best round." if record["clock"] == "best_ms" else "Of the median round."
    return f"{what} {conditions}.{lost} {sentences.on_a_cpu(record)}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.show.plot", description="Draws a result of bench.run.")
    parser.add_argument("result", type=Path, help="JSON file; the PNG is written beside it")
    path = parser.parse_args(argv).result
    try:
        image = draw(json.loads(path.read_text()))
    except (OSError, ValueError) as reason:
        parser.error(f"{path}: {reason}")
    write_atomic(path.with_suffix(".png"), image)
    print(f"written: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
