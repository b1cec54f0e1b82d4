"""Renders the pages' tables and figures from bench/results: `python -m bench.show.readme` (nobody types numbers)."""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastdpo.files import write_atomic

from ..arguments import BENCHMARKS
from ..measure.missing import in_a_cell, reasons
from ..train_step import tables
from . import plot, sentences

FOLDER = Path(__file__).resolve().parents[1]
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"
START, END = "<!-- rendered by python -m bench.show.readme from bench/results -->", "<!-- end -->"
CUDA_START = "<!-- rendered by python -m bench.show.readme from bench/results: cuda -->"
CUDA_TOKENS = 4096  # a page shows one N, the JSON has all
# the pages that show results, and which benchmarks each shows
PAGES = {"README.md": ("train_step",), "docs/benchmarks.md": BENCHMARKS}
HEADER = {"linear_logprob": "N x H x V, dtype, mode", "dpo_loss": "pairs, T x H x V, dtype, mode"}
Record = dict[str, Any]


def newest(device: str, benchmark: str = "linear_logprob") -> Path | None:
    results = sorted(RESULTS.glob(f"{benchmark}_{device}_[0-9]*.json"))
    return results[-1] if results else None


def table(path: Path) -> str:
    """Markdown: one line per case, one column per entry, and the conditions; then the largest N, and the figure."""
    record = json.loads(path.read_text())
    if record["case"] == "train_step":
        return _training(path, record)
    rows = [row for row in record["rows"] if not row.get("sweep")]
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    why = reasons(record)
    lines = _head(HEADER[record["case"]], (f"{name}: ms, peak MiB, error" for name in entries))
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {row["entry"]: row for row in rows if row["case"] == case}
        own = cells.get("fastdpo")
        texts = [_cell(cells.get(name), own, "best_ms", 0) or in_a_cell(why.get((case, name))) for name in entries]
        lines.append(f"| {case} | " + " | ".join(texts) + " |")
    lines += ["", f"{sentences.conditions(record['environment'], _versions(rows))}.", *_ratios_of_a_cpu(record)]
    return "\n".join([*lines, *_largest(record), *_figure(path, record)])


def cuda_table(path: Path) -> str:
    """Markdown: one line per head and mode (bf16, N = 4096 where N varies), one column per entry, the conditions."""
    record = json.loads(path.read_text())
    if record["case"] == "train_step":
        return _training(path, record)
    rows = [row for row in record["rows"] if row["dtype"] == "bf16" and row.get("n", CUDA_TOKENS) == CUDA_TOKENS]
    rows = [row for row in rows if not row.get("sweep")]
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    why = reasons(record)
    lines = _head("head, mode", (f"{name}: ms, peak MiB, error" for name in entries))
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {row["entry"]: row for row in rows if row["case"] == case}
        own, one = cells.get("fastdpo"), next(iter(cells.values()))
        texts = [_cell(cells.get(name), own, "median_ms", 2) or in_a_cell(why.get((case, name))) for name in entries]
        lines.append(f"| {one['head']} ({one['h']} x {one['v']}) {one['mode']} | " + " | ".join(texts) + " |")
    shown = "" if record["complete"] and not why else f" Not everything was measured: {path.name} says what."
    conditions = sentences.conditions(record["environment"], _versions(rows))
    lines += ["", f"{_size(rows)}, bf16, medians; {conditions}.{shown}"]
    return "\n".join([*lines, *_largest(record), *_figure(path, record)])


def _training(path: Path, record: Record) -> str:
    """Markdown: whole trainers' steps, and the conditions; then the figure."""
    all_there = record["complete"] and not reasons(record)
    shown = "" if all_there else f" Not everything was measured: {path.name} says what."
    clock = "best" if record["clock"] == "best_ms" else "median"
    conditions = sentences.conditions(record["environment"], _versions(record["rows"]))
    what = f"Pairs per second of the {clock} round; MiB: a step's peak + weights, reference and optimizer at rest"
    lines = ["", f"{what}. {conditions}.{shown}"]
    return "\n".join([*tables.markdown(record), *lines, *_ratios_of_a_cpu(record), *_figure(path, record)])


def _ratios_of_a_cpu(record: Record) -> list[str]:
    sentence = sentences.on_a_cpu(record)
    return [sentence] if sentence else []


def _head(first: str, others: Any) -> list[str]:
    names = [first, *others]
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _largest(record: Record) -> list[str]:
    """The largest N of each entry, where the record has it."""
    fits, why = record.get("largest", []), reasons(record)
    if not fits:
        return []
    entries = list(dict.fromkeys(fit["entry"] for fit in fits))
    budget = fits[0]["budget_mib"]
    lines = [
        "",
        f"The largest N (scored tokens) whose step needs at most {budget:g} MiB above its inputs, and its peak; "
        "each was run, and so was the next size, which needs more:",
        "",
        *_head("H x V, dtype, mode", entries),
    ]
    for case in dict.fromkeys(fit["case"] for fit in fits):
        cells = {fit["entry"]: fit for fit in fits if fit["case"] == case}
        one = next(iter(cells.values()))
        texts = [_fit(cells.get(name)) or in_a_cell(why.get((case, name))) for name in entries]
        pairs = f", pairs of {one['length']} positions" if one.get("length") else ""
        lines.append(f"| {one['h']} x {one['v']}{pairs}, {one['dtype']} {one['mode']} | {' | '.join(texts)} |")
    return lines


def _fit(fit: dict[str, Any] | None) -> str:
    if fit is None:
        return ""
    if not fit["n"]:
        return "none fits"
    least = "at least " if fit["next_n"] is None else ""
    return f"{least}{fit['n']} ({fit['peak_mib']:.0f} MiB)"


def _figure(path: Path, record: Record) -> list[str]:
    """The link to the figure beside the result, where it has points to draw."""
    if not plot.can_draw(record):
        return []
    what = "pairs per second and memory" if record["case"] == "train_step" else "time and peak memory against N and V"
    return ["", f"![{record['case']}: {what}](bench/results/{path.stem}.png)"]


def _cell(row: dict[str, Any] | None, own: dict[str, Any] | None, clock: str, digits: int) -> str:
    if row is None:
        return ""
    ratio = f" ({row[clock] / own[clock]:.2f} x)" if own and row is not own else ""
    error = next(iter(row["error"].values()))
    return f"{row[clock]:.{digits}f}{ratio}, {row['peak_mib']:.0f}, {error:.0e}"


def _size(rows: list[dict[str, Any]]) -> str:
    pairs = {f"{row['pairs']} pairs of {row['length']} positions" for row in rows if "pairs" in row}
    return ", ".join(sorted(pairs)) or f"{CUDA_TOKENS} scored tokens"


def _versions(rows: list[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(row["version"] for row in rows))


def shown(benchmarks: Collection[str] = BENCHMARKS) -> list[Path]:
    """The results of some benchmarks that pages show."""
    return [path for device in ("cpu", "cuda") for name in benchmarks if (path := newest(device, name))]


def rendered(text: str, page: str = "docs/benchmarks.md") -> str:
    """A page's text with the tables between its markers replaced; GPU tables stand after the CPU's where there are
    results of one, and nowhere else."""
    before, _, rest = _without_cuda(text).partition(START)
    _, _, after = rest.partition(END)
    results = shown(PAGES[page])
    here = [table(path) for path in results if "_cpu_" in path.name]
    body = "\n" + "\n\n".join(here) + "\n" if here else "\n"
    measured = [cuda_table(path) for path in results if "_cuda_" in path.name]
    cuda = f"\n\n{CUDA_START}\n" + "\n\n".join(measured) + f"\n{END}" if measured else ""
    block = f"{START}{body}{END}{cuda}".replace("](bench/", f"]({'../' * page.count('/')}bench/")
    return f"{before}{block}{after}"


def _without_cuda(text: str) -> str:
    before, marker, rest = text.partition(CUDA_START)
    return before.rstrip("\n") + rest.partition(END)[2] if marker else text


def main() -> int:
    absent = [ROOT / page for page in PAGES if not (ROOT / page).is_file()]
    if absent:
        print(
            f"{absent[0]} is not there: README and its results are in the checkout, not in the package", file=sys.stderr
        )
        return 1
    for result in shown():
        record = json.loads(result.read_text())
        if plot.can_draw(record):
            write_atomic(result.with_suffix(".png"), plot.draw(record))
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text(), page))
        print(f"rendered {page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
