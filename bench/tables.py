"""Renders README's table from bench/results: `python -m bench.tables` (nobody types numbers)."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- rendered by python -m bench.tables from bench/results -->", "<!-- end -->"


def newest(device: str) -> Path | None:
    found = sorted((ROOT / "bench" / "results").glob(f"linear_logprob_{device}_*.json"))
    return found[-1] if found else None


def table(path: Path) -> str:
    """Markdown: one line per case, one column per entry, and the conditions."""
    record = json.loads(path.read_text())
    rows, env = record["rows"], record["environment"]
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    lines = [
        "| N x H x V, dtype, mode | " + " | ".join(f"{name}: ms, peak MiB, error" for name in entries) + " |",
        "|---" * (len(entries) + 1) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {row["entry"]: row for row in rows if row["case"] == case}
        own = cells.get("fastdpo")
        texts = []
        for name in entries:
            row = cells.get(name)
            if row is None:
                texts.append("failed the oracle")
                continue
            ratio = f" ({row['best_ms'] / own['best_ms']:.2f} x)" if own and row is not own else ""
            texts.append(f"{row['best_ms']:.0f}{ratio}, {row['peak_mib']:.0f}, {row['error']['logp']:.0e}")
        lines.append(f"| {case} | " + " | ".join(texts) + " |")
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    lines += [
        "",
        f"{env['device']}, {env['threads']} threads; torch {env['torch']}; {versions}; commit {env['commit']}; "
        f"{env['date']}; load average {env['load_average_at_start']:.1f} to {env['load_average_at_end']:.1f}; "
        f"`{env['command']}`.",
    ]
    if "_cpu_" in path.name:
        lines.append(
            "On a CPU the trl op folds its tiles in eager torch, on a GPU it does not: these ratios are CPU ratios."
        )
    return "\n".join(lines)


def rendered(readme: str) -> str:
    """README's text with the table between its markers replaced."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    path = newest("cpu")
    body = f"\n{table(path)}\n" if path else "\n"
    return f"{before}{START}{body}{END}{after}"


def main() -> int:
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
    print(f"rendered {path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
