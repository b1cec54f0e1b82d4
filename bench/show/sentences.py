"""A result's conditions in words."""

from typing import Any


def on_a_cpu(record: dict[str, Any]) -> str:
    """What a ratio over TRL says there; "" where the record has none of a CPU."""
    if "driver" in record["environment"] or all(row["entry"] != "trl" for row in record["rows"]):
        return ""
    return "On a CPU the trl op folds its tiles in eager torch, on a GPU it does not: these ratios are CPU ratios."


def conditions(environment: dict[str, Any], versions: str = "") -> str:
    """Device, versions, commit, date, load and command of a record's environment, without a full stop.

    versions: of the entries; by default those of the installed packages that the environment names.
    """
    threads = environment.get("threads")
    device = f"{environment['device']}, {threads} thread{'s' if threads != 1 else ''}"
    if "driver" in environment:
        device = f"{environment['device']}, driver {environment['driver']}, CUDA {environment['cuda']}"
    versions = versions or ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    parts = [device, f"torch {environment['torch']}", versions, environment.get("data", "")]
    parts += [f"commit {environment['commit']}" if environment["commit"] else "no checkout", environment["date"]]
    if "driver" not in environment and "load_average_at_end" in environment:
        load = (environment[f"load_average_at_{when}"] for when in ("start", "end"))
        parts.append("load average {:.1f} to {:.1f}".format(*load))
    return "; ".join([part for part in parts if part] + [f"`{environment['command']}`"])
