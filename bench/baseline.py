"""An earlier result beside this one: ratios of time, peak memory and largest N, and which of ours fell behind."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import BENCHMARKS, UsageError
from .measure.missing import OUT_OF_MEMORY, reasons

SLACK_MIB = 1.0  # of peak memory: less is an allocator's rounding
Key = tuple[str, str]  # case, entry


@dataclass
class Verdict:
    """The comparison as text, and in one line each, what of ours is past the threshold."""

    text: str
    behind: list[str] = field(default_factory=list)


def load(path: Path) -> dict[str, Any]:
    """The record of an earlier run.

    Raises:
        UsageError: it is none.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--baseline {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--baseline {path} is not JSON: {error}") from error
    keys = {"case", "environment", "rows"}
    if not isinstance(record, dict) or not keys <= record.keys() or record["case"] not in BENCHMARKS:
        raise UsageError(f"--baseline {path} is no result of this command (it has no case, environment and rows)")
    return record


def check(
    before: dict[str, Any], path: Path, benchmark: str, environment: dict[str, Any], planned: Iterable[str]
) -> None:
    """Refuses what cannot be compared.

    Args:
        before, path: the baseline; benchmark, environment, planned: of this run, and its cases' names.

    Raises:
        UsageError: another benchmark, device, number of threads, or no shape in common.
    """
    if before["case"] != benchmark:
        raise UsageError(
            f"--baseline {path} holds {before['case']}, and {benchmark} is measured: give one of {benchmark}"
        )
    here, there = (_machine(e) for e in (environment, before["environment"]))
    if here != there:
        raise UsageError(f"--baseline {path} was measured on {there}, this is {here}: give one of the same device")
    planned = list(planned)
    shapes = list(dict.fromkeys(row["case"] for row in before["rows"]))
    if not set(shapes) & set(planned):
        holds = f"{shapes[0]!r} ..." if shapes else "no rows"
        raise UsageError(
            f"--baseline {path} has no shape in common with this run: it holds {holds}, here it is {planned[0]!r} ..."
        )


def compare(before: dict[str, Any], now: dict[str, Any], name: str, threshold: float) -> Verdict:
    """Every case and entry of both records. `name`: of the baseline; ratios above `threshold` are named."""
    clock = now["clock"]
    env = before["environment"]
    lines = [
        f"\nagainst {name} (commit {env.get('commit')}, torch {env.get('torch')}, {env.get('date')}): "
        f"{clock.removesuffix('_ms')} ms and peak MiB, before, now and their ratio",
    ]
    behind = []
    old, new = (_by_key(record["rows"]) for record in (before, now))
    width = max((len(f"{case}  {entry}") for case, entry in old.keys() & new.keys()), default=0) + 4
    for key in (key for key in new if key in old):
        times, peaks = [[row[k] for row in (old[key], new[key])] for k in (clock, "peak_mib")]
        slower = _ratio(*times) > threshold
        larger = _ratio(*peaks) > threshold and peaks[1] - peaks[0] > SLACK_MIB
        verdict = " and ".join(word for word, is_so in (("slower", slower), ("more memory", larger)) if is_so)
        lines.append(
            f"  {'  '.join(key):{width}}{_numbers(times, '.4g')}   {_numbers(peaks, '.1f')}  {verdict}".rstrip()
        )
        if verdict and _is_ours(key):
            behind.append(f"{key[0]}: {key[1]}: {verdict}")
    old_fits, new_fits = (_by_key(record.get("largest", ())) for record in (before, now))
    for key in (key for key in new_fits if key in old_fits):
        sizes = [old_fits[key]["n"], new_fits[key]["n"]]
        fewer = sizes[1] * threshold < sizes[0]
        lines.append(f"  {key[0]}  {key[1]}: N {sizes[0]} -> {sizes[1]}{'  fewer' if fewer else ''}")
        if fewer and _is_ours(key):
            behind.append(f"{key[0]}: {key[1]}: fewer")
    why = reasons(now)
    then, here = {**old, **old_fits}, {**new, **new_fits}
    for absent, reason in _absent(then, here, why).items():
        lines.append(f"  only in the baseline: {absent}{f' (here: {reason})' if reason else ''}")
    lines += [f"  only here: {absent}" for absent in _absent(here, then, {})]
    for key in then:
        if key not in here and why.get(key) == OUT_OF_MEMORY and _is_ours(key):
            behind.append(f"{key[0]}: {key[1]}: {OUT_OF_MEMORY}")
    if behind:
        lines += [f"past {threshold:g} x of the baseline:", *(f"  {line}" for line in behind)]
    else:
        lines.append(f"none of ours is past {threshold:g} x of the baseline (peers are its control and do not count)")
    return Verdict("\n".join(lines), behind)


def _absent(present: Collection[Key], other: Collection[Key], why: dict[Key, str]) -> dict[str, str]:
    """What is in `present` and not in `other`, by name, and why; a whole case is named once."""
    cases = {case for case, _ in other}
    absent = {}
    for case, entry in (key for key in present if key not in other):
        name = f"{case}: {entry}" if case in cases else case
        absent[name] = why.get((case, entry)) or why.get((case, ""), "")
    return absent


def _machine(environment: dict[str, Any]) -> str:
    return f"{environment.get('device')} with {environment.get('threads')} threads"


def _by_key(rows: Iterable[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    return {(row["case"], row["entry"]): row for row in rows}


def _is_ours(key: Key) -> bool:
    return key[1].startswith("fastdpo")


def _ratio(before: float, now: float) -> float:
    return now / before if before else (float("inf") if now else 1.0)


def _numbers(both: list[float], form: str) -> str:
    before, now = both
    return f"{before:>10{form}}{now:>10{form}}{_ratio(before, now):>7.2f} x"
