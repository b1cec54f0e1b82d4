"""Renders README's tables from bench/results: `python -m bench.tables` (nobody types numbers)."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- rendered by python -m bench.tables from bench/results -->", "<!-- end -->"
CUDA_START = "<!-- rendered by python -m bench.tables from bench/results: cuda -->"
CUDA_CASES = ("linear_logprob", "dpo_loss")
CUDA_TOKENS = 4096  # README shows one N, the JSON has all


def newest(device: str, case: str = "linear_logprob") -> Path | None:
    found = sorted(RESULTS.glob(f"{case}_{device}_*.json"))
    return found[-1] if found else None


def table(path: Path) -> str:
    """Markdown: one line per case, one column per entry, and the conditions."""
    record = json.loads(path.read_text())
    rows = record["rows"]
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    absent = _absent(record)
    lines = [
        "| N x H x V, dtype, mode | " + " | ".join(f"{name}: ms, peak MiB, error" for name in entries) + " |",
        "|---" * (len(entries) + 1) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {row["entry"]: row for row in rows if row["case"] == case}
        own = cells.get("fastdpo")
        texts = [_cell(cells.get(name), own, "best_ms", 0) or _why(absent.get((case, name))) for name in entries]
        lines.append(f"| {case} | " + " | ".join(texts) + " |")
    env = record["environment"]
    lines += [
        "",
        f"{env['device']}, {env['threads']} threads; torch {env['torch']}; {_versions(rows)}; commit {env['commit']}; "
        f"{env['date']}; load average {env['load_average_at_start']:.1f} to {env['load_average_at_end']:.1f}; "
        f"`{env['command']}`.",
    ]
    if "_cpu_" in path.name:
        lines.append(
            "On a CPU the trl op folds its tiles in eager torch, on a GPU it does not: these ratios are CPU ratios."
        )
    return "\n".join(lines)


def cuda_table(path: Path) -> str:
    """Markdown: one line per head and mode (bf16, N = 4096 where N varies), one column per entry, the conditions."""
    record = json.loads(path.read_text())
    rows = [row for row in record["rows"] if row["dtype"] == "bf16" and row.get("n", CUDA_TOKENS) == CUDA_TOKENS]
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    absent = _absent(record)
    lines = [
        "| head, mode | " + " | ".join(f"{name}: ms, peak MiB, error" for name in entries) + " |",
        "|---" * (len(entries) + 1) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {row["entry"]: row for row in rows if row["case"] == case}
        own, one = cells.get("fastdpo"), next(iter(cells.values()))
        texts = [_cell(cells.get(name), own, "median_ms", 2) or _why(absent.get((case, name))) for name in entries]
        lines.append(f"| {one['head']} ({one['h']} x {one['v']}) {one['mode']} | " + " | ".join(texts) + " |")
    env = record["environment"]
    shown = "" if record["complete"] and not absent else f" Not everything was measured: {path.name} says what."
    lines += [
        "",
        f"{_size(rows)}, bf16, medians; {env['device']}, driver {env['driver']}, CUDA {env['cuda']}; "
        f"torch {env['torch']}; {_versions(rows)}; commit {env['commit']}; {env['date']}; `{env['command']}`.{shown}",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, own: dict[str, Any] | None, clock: str, digits: int) -> str:
    if row is None:
        return ""
    ratio = f" ({row[clock] / own[clock]:.2f} x)" if own and row is not own else ""
    error = next(iter(row["error"].values()))
    return f"{row[clock]:.{digits}f}{ratio}, {row['peak_mib']:.0f}, {error:.0e}"


def _absent(record: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(m["case"], m["entry"]): m["reason"] for m in record.get("missing", ())}


def _why(reason: str | None) -> str:
    return "failed the oracle" if reason and "failed the oracle" in reason else reason or "-"


def _size(rows: list[dict[str, Any]]) -> str:
    pairs = {f"{row['pairs']} pairs of {row['length']} positions" for row in rows if "pairs" in row}
    return ", ".join(sorted(pairs)) or f"{CUDA_TOKENS} scored tokens"


def _versions(rows: list[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(row["version"] for row in rows))


def rendered(readme: str) -> str:
    """README's text with the tables between its markers replaced; GPU tables stand after the CPU's where there are
    results of one, and nowhere else."""
    before, _, rest = _without_cuda(readme).partition(START)
    _, _, after = rest.partition(END)
    path = newest("cpu")
    body = f"\n{table(path)}\n" if path else "\n"
    measured = [cuda_table(found) for case in CUDA_CASES if (found := newest("cuda", case))]
    cuda = f"\n\n{CUDA_START}\n" + "\n\n".join(measured) + f"\n{END}" if measured else ""
    return f"{before}{START}{body}{END}{cuda}{after}"


def _without_cuda(readme: str) -> str:
    before, found, rest = readme.partition(CUDA_START)
    return before.rstrip("\n") + rest.partition(END)[2] if found else readme


def main() -> int:
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
    print(f"rendered {path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
