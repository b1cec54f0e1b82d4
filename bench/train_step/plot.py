"""`train_step` as a figure: pairs per second, and the memory of a step, of every trainer on every model."""

from collections.abc import Mapping, Sequence
from typing import Any

from .tables import rate

Rowlike = Mapping[str, Any]


def figure(record: Mapping[str, Any], style: Mapping[str, str]) -> Any:
    """One row of panels per case. `style`: the colour of each entry.

    Raises:
        ValueError: the record has no rows.
    """
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in record["rows"]))
    if not cases:
        raise ValueError("no trainer was measured")
    drawn = Figure(figsize=(10, 1.4 + 0.5 * len(cases) + 0.28 * len(record["rows"])), dpi=100, layout="constrained")
    panels = drawn.subplots(len(cases), 2, squeeze=False)
    for index, case in enumerate(cases):
        rows = [row for row in record["rows"] if row["case"] == case]
        _speed(panels[index][0], rows, record["clock"], style)
        _memory(panels[index][1], rows, style)
        panels[index][0].set_title(case, fontsize=9, loc="left")
    panels[-1][0].set_xlabel("pairs per second; the line is p20 to p80")
    panels[-1][1].set_xlabel("MiB: a step's peak above weights, reference and optimizer (pale)")
    drawn.suptitle(f"{record['case']}: full optimizer steps of the trainers", fontweight="bold", fontsize=13)
    return drawn


def _speed(panel: Any, rows: Sequence[Rowlike], clock: str, style: Mapping[str, str]) -> None:
    rates = [rate(row, clock) for row in rows]
    # p20 of the times is the fast end
    ends = [[1e3 * row["pairs"] / row[key] for row in rows] for key in ("p80_ms", "p20_ms")]
    panel.barh([row["entry"] for row in rows], rates, color=[style[row["entry"]] for row in rows])
    panel.hlines([row["entry"] for row in rows], *ends, color="#999999", linewidth=2)
    for at, value in enumerate(rates):
        panel.text(value, at, f" {value:.3g}", va="center", fontsize=8)
    panel.margins(x=0.15)
    panel.invert_yaxis()


def _memory(panel: Any, rows: Sequence[Rowlike], style: Mapping[str, str]) -> None:
    names, colours = [row["entry"] for row in rows], [style[row["entry"]] for row in rows]
    resting, peaks = ([row[key] for row in rows] for key in ("resting_mib", "peak_mib"))
    panel.barh(names, resting, color=colours, alpha=0.3)
    panel.barh(names, peaks, left=resting, color=colours)
    for at, (low, high) in enumerate(zip(resting, peaks, strict=True)):
        panel.text(low + high, at, f" {high:.0f}", va="center", fontsize=8)
    panel.margins(x=0.15)
    panel.invert_yaxis()
