"""Curves and tables of one or several runs, from the metric files that each run has in dpo_metrics."""

import base64
import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.escaping import figure_text
from fastdpo.training.report.metric_files import FOLDER, draw_band, metric_columns, read_summary

# title -> metrics; the second of two is dashed
PANELS = {
    "loss": ("loss",),
    "reward margin (chosen - rejected)": ("rewards/margins",),
    "accuracy (share of pairs with margin > 0)": ("rewards/accuracies",),
    "KL from the reference (KTO's estimate, nats)": ("kl",),
    "rewards: chosen, rejected (dashed)": ("rewards/chosen", "rewards/rejected"),
    "log-probs: chosen, rejected (dashed)": ("logps/chosen", "logps/rejected"),
    "gradient norm": ("grad_norm",),
    "scored tokens of an answer: chosen, rejected (dashed)": ("length/chosen", "length/rejected"),
    "entropy (nats a token)": ("entropy",),
    "tokens per second": ("tokens_per_second",),
    "peak memory (GB)": ("peak_memory_gb",),
}


@dataclass(frozen=True)
class Run:
    """One run: rows of its CSV by column (only cells that hold a number), and its summary ({} while it trains)."""

    name: str
    folder: str
    rows: list[dict[str, float]]
    summary: dict[str, Any]

    def last(self, metric: str) -> float | None:
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def arguments(self) -> dict[str, Any]:
        """What the run was started with, by dotted name."""
        parts = {name: self.summary.get(name) for name in ("model", "data", "reference", "settings", "versions")}
        flat = _flat(parts)
        # the settings are what is asked for most, by the names of their arguments
        return {name.removeprefix("settings."): value for name, value in flat.items() if value is not None}


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in the given output folders (or their dpo_metrics). Raises ValueError with one sentence.

    The CSV follows a run, so that one that still trains, or was killed, has its curves too.
    """
    metrics = [_metrics_folder(folder) for folder in folders]
    names = _short_names([path.parent if path.name == FOLDER else path for path in metrics])
    runs = []
    for folder, path, name in zip(folders, metrics, names, strict=True):
        rows = _read_csv(path / "training_metrics.csv")
        if not rows:
            raise ValueError(f"the run {folder} has not logged a step yet ({path / 'training_metrics.csv'} has no row)")
        runs.append(Run(name, folder, rows, read_summary(path / "summary.json")))
    return runs


def _metrics_folder(folder: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"no such run: the folder {folder} does not exist")
    for candidate in (path / FOLDER, path):
        if (candidate / "training_metrics.csv").is_file():
            return candidate.resolve()
    raise ValueError(
        f"{folder} is no run: it has no {FOLDER}/training_metrics.csv, which a run writes unless metric_files is off"
    )


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if list(paths).count(path) > 1)
        raise ValueError(f"the run {twice} is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _read_csv(path: Path) -> list[dict[str, float]]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"{path} cannot be read: {reason}") from error
    for line, cells in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2):
        if None in cells.values():
            raise ValueError(f"{path}:{line}: the row has fewer cells than the header; the file was cut short")
        try:
            rows.append({name: float(cell) for name, cell in cells.items() if cell})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{line}: wanted numbers, got {list(cells.values())}") from error
        if "step" not in rows[-1]:
            raise ValueError(f"{path}:{line}: there is no step in this row")
    return rows


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{name}.{key}" if name else str(key))
    return flat


def final_metrics(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """metric -> its last value in each run, training first; then runtime and tokens where summaries have them."""
    columns = [name for name in metric_columns(row for run in runs for row in run.rows) if name != "epoch"]
    table = {name: [run.last(name) for run in runs] for name in columns}
    for label, read in (
        ("train_runtime (s)", lambda summary: (summary.get("runtime") or {}).get("train_runtime")),
        ("tokens", lambda summary: summary.get("tokens")),
    ):
        values = [read(run.summary) for run in runs]
        if any(isinstance(value, (int, float)) for value in values):
            table[label] = values
    return table


def differing_arguments(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """argument -> its value in each run (None where it has none): all of a single run, those that differ of several."""
    arguments = [run.arguments() for run in runs]
    names = dict.fromkeys(name for values in arguments for name in values)
    table = {name: [values.get(name) for values in arguments] for name in names}
    return {name: values for name, values in table.items() if len(runs) == 1 or any(v != values[0] for v in values)}


def runs_png(runs: Sequence[Run]) -> bytes:
    """A panel for each metric that a run has: lines are training, dots are evaluations, a colour for each run.

    The shade around a margin is from the pairs' 10% to their 90% quantile.
    """
    # the object interface: no pyplot state, no display, any thread
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = {name for run in runs for row in run.rows for name in row}
    panels = {
        title: names
        for title, names in PANELS.items()
        if any(prefix + name in there for name in names for prefix in ("", "eval_"))
    } or {"loss": ("loss",)}
    height = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12, 3.4 * height + 0.35 * math.ceil(len(runs) / 3)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, 2, squeeze=False).ravel()
    # ten colours that differ well, or as many as it takes
    few = len(runs) <= 10
    colors = colormaps["tab10" if few else "turbo"](np.arange(len(runs)) if few else np.linspace(0, 1, len(runs)))
    for place, (title, names) in zip(axes, panels.items(), strict=False):
        for index, run in enumerate(runs):
            color = colors[index]
            for name, line in zip(names, ("-", "--"), strict=False):
                points = [(row["step"], row[name]) for row in run.rows if name in row]
                evals = [(row["step"], row[f"eval_{name}"]) for row in run.rows if f"eval_{name}" in row]
                if points:
                    # a single training point would be an invisible line
                    style = "." if len(points) == 1 else line
                    place.plot(*zip(*points, strict=True), style, color=color, linewidth=1.4)
                draw_band(place, run.rows, name, color)
                if evals:
                    face = color if line == "-" else "white"
                    place.plot(*zip(*evals, strict=True), "o", color=color, markerfacecolor=face, markersize=5)
        place.set(title=title, xlabel="step")
        place.grid(alpha=0.3)
        if min(place.get_ylim()) < 0 < max(place.get_ylim()):
            place.axhline(0, color="black", linewidth=0.6)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    handles = [axes[0].plot([], [], color=colors[i], label=figure_text(run.name))[0] for i, run in enumerate(runs)]
    if any(name.startswith("eval_") for name in there):
        handles.append(axes[0].plot([], [], "o", color="gray", label="evaluation")[0])
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.25em 0.9em; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
"""


def runs_html(runs: Sequence[Run], png: bytes, title: str) -> str:
    """One page that needs no other file: the curves as base64, final metrics, arguments."""
    names = [run.name for run in runs]
    heading = "Arguments" if len(runs) == 1 else "Arguments that differ"
    arguments = differing_arguments(runs)
    image = base64.b64encode(png).decode("ascii")
    # without its rows the table would say that nothing differs of runs whose arguments nobody knows
    unknown = [run.name for run in runs if not run.summary]
    note = f"<p>No summary.json yet, so no arguments: {_text(', '.join(unknown))}.</p>" if unknown else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        f'<img alt="training curves" src="data:image/png;base64,{image}">\n'
        f"<h2>Final metrics</h2>\n{_table(names, final_metrics(runs))}\n"
        f"{_advice(runs)}<h2>{heading}</h2>\n{note}{_table(names, arguments) if arguments else '<p>None.</p>'}\n"
        "</body>\n</html>\n"
    )


def _advice(runs: Sequence[Run]) -> str:
    """What was said about each run's numbers while it trained."""
    lines = [
        f"<li>{_text(run.name)}, step {_text(show(advice.get('step')))}: {_text(str(advice.get('text')))}</li>"
        for run in runs
        for advice in run.summary.get("advice") or []
    ]
    return "<h2>Advice</h2>\n<ul>\n" + "\n".join(lines) + "\n</ul>\n" if lines else ""


def _table(names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in ("", *names))
    body = "\n".join(
        f"<tr><td>{_text(name)}</td>" + "".join(f"<td>{_text(show(value))}</td>" for value in values) + "</tr>"
        for name, values in rows.items()
    )
    return f"<div><table>\n<tr>{head}</tr>\n{body}\n</table></div>"


def show(value: Any) -> str:
    """A cell: numbers with five digits, "-" for what is not there."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"
    return json.dumps(value) if isinstance(value, (list, bool)) else str(value)


def _text(value: str) -> str:
    return html.escape(value, quote=True)
