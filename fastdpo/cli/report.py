"""`fastdpo report`: curves and tables of one or several runs, as a PNG and as one HTML page."""

import argparse
from pathlib import Path
from typing import Any

from fastdpo.cli.command import CommandParser, check_output_file, run_command, write_result
from fastdpo.cli.errors import UsageError


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 failed, 2 the input was wrong."""
    return run_command(_build_parser(), argv, work, render)


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "report",
        "RUN [RUN ...] [arguments]",
        "Curves of one or several runs in one PNG, and one HTML page with the curves, the final metrics and the\n"
        "arguments that differ. The page needs no other file and no network.",
    )
    runs = parser.add_argument_group("runs")
    runs.add_argument("runs", metavar="RUN", nargs="*", help="output_dir of a run, finished or not")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        default="fastdpo_report.html",
        metavar="FILE",
        help="the page; the PNG has the same name with .png (default: fastdpo_report.html)",
    )
    output.add_argument("--title", metavar="STR", help="of the page (default: the runs' names)")
    return parser


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """The final metrics and arguments, with both files written."""
    if not arguments.runs:
        raise UsageError("RUN is missing: fastdpo report RUN [RUN ...], where each RUN is the output_dir of a run")
    page = Path(arguments.out)
    if page.suffix != ".html" or page.is_dir():
        raise UsageError(f"--out should be a file that ends in .html, got {arguments.out}")
    check_output_file(page)

    from fastdpo.runs.pages import differing_arguments, final_metrics, read_runs, runs_html, runs_png

    runs = read_runs(arguments.runs)
    png = runs_png(runs)
    picture = page.with_suffix(".png")
    write_result(picture, png)
    write_result(page, runs_html(runs, png, arguments.title or "DPO: " + ", ".join(run.name for run in runs)))
    return {
        "runs": [run.name for run in runs],
        "metrics": final_metrics(runs),
        "arguments": differing_arguments(runs),
        "page": str(page),
        "picture": str(picture),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    from fastdpo.runs.pages import show

    lines = []
    several = len(report["runs"]) > 1
    for heading, rows in (
        ("final metrics", report["metrics"]),
        ("arguments that differ", report["arguments"] if several else {}),
    ):
        if rows:
            table = [[heading, *report["runs"]], *([name, *map(show, values)] for name, values in rows.items())]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += [
                "  ".join(
                    [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
                )
                for row in table
            ]
            lines.append("")
    return "\n".join([*lines, f"page: {report['page']}", f"curves: {report['picture']}"])
