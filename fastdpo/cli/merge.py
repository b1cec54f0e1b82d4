"""`fastdpo merge`: an adapter into its base model, read back and compared before the folder appears."""

import argparse
import re
from pathlib import Path
from typing import Any

from fastdpo.cli.command import CommandParser, check_output_file, run_command
from fastdpo.cli.errors import UsageError
from fastdpo.cli.model_folder import check_model_folder

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 failed (nothing is left of the merged model), 2 the input was wrong."""
    return run_command(_build_parser(), argv, work, render)


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "merge",
        "ADAPTER --out FOLDER [arguments]",
        "Merge a LoRA (or another adapter that changes weights) into its base model: a folder that needs no PEFT.\n"
        "It is read back and its logits are compared with the adapter's before it gets its name.",
    )
    models = parser.add_argument_group("model")
    models.add_argument("adapter", metavar="ADAPTER", nargs="?", help="folder of the adapter: a run's output_dir")
    models.add_argument("--base", metavar="MODEL", help="base model (default: the one that the adapter names)")
    models.add_argument("--trust_remote_code", action="store_true", help="run code that the model's folder brings")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FOLDER", help="new or empty folder for model and tokenizer")
    output.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: the base model's)")
    output.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file, in MB or GB (default: 5GB)"
    )
    return parser


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Merge as asked."""
    for name, value in (("ADAPTER", arguments.adapter), ("--out", arguments.out)):
        if value is None:
            raise UsageError(f"{name} is missing: fastdpo merge ADAPTER --out FOLDER")
    if not re.fullmatch(r"0*[1-9]\d*[KMG]i?B", arguments.max_shard_size):
        raise UsageError(f"--max_shard_size should be a size such as 500MB or 5GB, got '{arguments.max_shard_size}'")
    if arguments.base is not None:
        check_model_folder(arguments.base)
    check_output_file(Path(arguments.out))

    import torch

    from fastdpo.cli.terminal import no_bars_without_terminal
    from fastdpo.runs.merge import merge_adapter

    no_bars_without_terminal()
    return merge_adapter(
        arguments.adapter,
        arguments.out,
        base=arguments.base,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        max_shard_size=arguments.max_shard_size,
        trust_remote_code=arguments.trust_remote_code,
    )


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    check = report["check"]
    size = sum(report["files"].values()) / 2**20
    head = "; the head is untied from the embedding" if report["untied_head"] else ""
    return "\n".join(
        (
            f"merged {report['adapter']} into {report['base']}",
            f"  {report['out']}: {report['dtype']}, {size:,.0f} MiB in {len(report['files'])} files{head}",
            f"  read back: logits of {check['tokens']} tokens differ from the adapter's by {check['difference']:.1e} "
            f"of their size (allowed {check['tolerance']:g}; the adapter moves them by {check['adapter_effect']:.1e})",
        )
    )
