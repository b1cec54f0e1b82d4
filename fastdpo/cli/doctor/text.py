"""The text of `fastdpo doctor`: the report of `fastdpo.cli.doctor.command.examine`, in aligned columns."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

TRAINED = {"none": "no gradient", "lora": "frozen head", "head": "trained head"}


def render(report: dict[str, Any]) -> str:
    """About 40 lines, and one for each kernel that was compiled."""
    parts = [_versions(report), _system(report)]
    if report.get("plans"):
        parts.append(_plans(report["shape"], report["plans"]))
    if report.get("self_test"):
        parts.append(_self_test(report["self_test"]))
    if report.get("kernels"):
        parts += _kernels(report["kernels"])
    parts.append(_findings(report))
    return "\n\n".join("\n".join(part) for part in parts)


def _versions(report: dict[str, Any]) -> list[str]:
    versions, build = report["versions"], report["torch"]
    there = {"fastdpo": report["fastdpo"], "python": report["system"]["python"]}
    there |= {name: version for name, version in versions.items() if version}
    if build:
        there["torch"] = f"{build['version']} ({build['build']}, {build['threads']} threads)"
    missing = [name for name, version in versions.items() if not version]
    lines = _labelled(list(there.items()))
    return [*lines, *_labelled([("not installed", ", ".join(missing))])] if missing else lines


def _system(report: dict[str, Any]) -> list[str]:
    system = report["system"]
    units = system["bf16_units"]
    bf16 = "bf16 units unknown" if units is None else f"bf16: {', '.join(units) if units else 'no units'}"
    memory = "unknown"
    if system["ram_gib"] is not None:
        memory = f"{system['ram_gib']:.1f} GiB, {system['ram_available_gib']:.1f} available"
    lines = [
        ("OS", system["os"]),
        ("CPU", f"{system['cpu']}, {system['usable_cores']} of {system['cores']} cores, {bf16}"),
        ("RAM", memory),
    ]
    for card in report["gpus"]:
        driver = f", driver {card['driver']}" if card["driver"] else ""
        size = f"{card['memory_gib']:.1f} GiB, {card['free_gib']:.1f} free"
        lines.append((f"GPU {card['index']}", f"{card['name']}, {card['arch']}, {size}{driver}"))
    if not report["gpus"]:
        lines.append(("GPU", "none that torch sees"))
    lines.append(("switches", " ".join(f"{k}={v}" for k, v in report["switches"].items()) or "none set"))
    return _labelled(lines)


def _plans(shape: dict[str, Any], plans: list[dict[str, Any]]) -> list[str]:
    model = f"{shape['model']}: " if shape["model"] else ""
    scale = "" if shape["logit_scale"] == 1 else f", logit_scale {shape['logit_scale']:g}"
    cap = "" if shape["softcap"] is None else f", softcap {shape['softcap']:g}"
    where = f"{shape['device']}, {shape['arch']}" if shape["arch"] else shape["device"]
    absent = "" if shape["here"] else " (not this machine's: from the plan alone)"
    sizes = f"N {shape['n']}, H {shape['h']}, V {shape['v']}"
    first = plans[0]
    lines = [f"{model}{sizes}, {shape['dtype']}{scale}{cap} on {where}{absent}"]
    lines += _labelled([("backend", f"{first['backend']}: {first['why_backend']}")])
    if first["backend"] != "reference":
        lines += _labelled([("products", f"{first['gemm']}: {first['why_gemm']}")])
    if first["kernel_tile"]:
        lines += _labelled([("kernel tile", first["kernel_tile"])])
    header = ("train", "path", "tile", "TFLOP", "peak MiB", "eager MiB")
    rows = []
    for plan in plans:
        tile = "x".join(map(str, plan["tile"])) if plan["tile"] else "-"
        peak = f"{plan['peak_mib']:,.0f}" if plan["peak_mib"] is not None else "as eager"
        train = f"{plan['train']}: {TRAINED[plan['train']]}"
        rows.append((train, plan["path"], tile, f"{plan['tflop']:.2f}", peak, f"{plan['eager_mib']:,.0f}"))
    lines += _columns([header, *rows], right=3)
    reasons = {}
    for plan in plans:
        again = f"; dW in tiles of {'x'.join(map(str, plan['back_tile']))}" if plan["back_tile"] else ""
        reasons[plan["path"]] = plan["why_path"] + again
    lines += _labelled(list(reasons.items()))
    lines += _labelled([("peak", _peak(plans))])
    formulas = {f"{plan['eager_mib']:,.0f} MiB = {plan['eager_formula']}": None for plan in plans}
    return lines + _labelled([("eager", formula) for formula in formulas])


def _peak(plans: list[dict[str, Any]]) -> str:
    sizes = [f"{plan['train']} {plan['gradients_mib']:,.0f}" for plan in plans if plan["gradients_mib"]]
    gradients = f", with the gradients ({', '.join(sizes)}), which eager's figure leaves out" if sizes else ""
    return f"MiB above the arguments{gradients}"


def _self_test(result: dict[str, Any]) -> list[str]:
    shape, limits = result["shape"], result["limits"]
    sizes = f"N {shape['n']}, H {shape['h']}, V {shape['v']}"
    ended = "passed" if result["passed"] else "FAILED"
    lines = [f"self-test on {result['device']} against float64, {sizes}: {ended} in {result['seconds']:.1f} s"]
    header = ["backend", "dtype", "log-prob", "relative", "rows of dh", "limit", "dW, db", "same bits"]
    rows = []
    for row in result["rows"]:
        errors = row["errors"]
        gradients = [errors[name] for name in ("dw", "db") if name in errors]
        # max() would pass over a NaN
        worst = next((x for x in gradients if x != x), max(gradients, default=None))
        same = "no" if any("bits" in text for text in row["failures"]) else "yes" if errors else "-"
        shown = [_number(errors.get(name)) for name in ("logp", "relative", "dh")]
        rows.append([row["backend"], row["dtype"], *shown, f"{row['row_limit']:g}", _number(worst), same])
    lines += _columns([header, *rows], right=2)
    what = f"limits: log-prob {limits['logp']:g} nats and {limits['relative']:g} of itself, rows of dh as listed, "
    lines.append(f"  {what}dW and db 1 (twice eager's error + 1e-6)")
    lines.append("  same bits: on a second run, and with or without gradients (policy and reference)")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _kernels(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One table for each target."""
    tables = []
    for target, of_target in groupby(rows, key=lambda row: row["target"]):
        table = [(target, "registers", "spills", "shared KiB", "matrix", "copies", "limits")]
        for row in of_target:
            numbers = (str(row["registers"]), str(row["spills"]), f"{row['shared'] / 1024:.1f}")
            over = f"EXCEEDED: {row['over']}" if row["over"] else "ok"
            table.append((row["kernel"], *numbers, row["matrix"] or "-", row["async"] or "-", over))
        tables.append(_columns(table, right=1, last=4, indent=""))
    return tables


def _findings(report: dict[str, Any]) -> list[str]:
    lines = [f"{'FAILED' if finding['fatal'] else 'note'}: {finding['text']}" for finding in report["findings"]]
    return [*lines, "all is well" if report["ok"] else "not all is well: see the lines above"]


def _labelled(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {label:<14} {text}" for label, text in pairs]


def _columns(table: Sequence[Sequence[str]], right: int, last: int | None = None, indent: str = "  ") -> list[str]:
    """Rows of equal length, aligned; columns from `right` up to `last` hold numbers."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if right <= i < (last or len(row)) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines
