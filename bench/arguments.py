"""The command's arguments. Nothing heavy is imported here: help and a wrong name are answered at once."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdpo.wording import closest

BENCHMARKS = ("linear_logprob", "dpo_loss", "train_step")
OUT = "bench_results"
THRESHOLD = 1.15
# default of --memory_budget, MiB, by device and whether the run is a quick one
MEMORY_MIB = {("cpu", True): 64.0, ("cpu", False): 512.0, ("cuda", True): 2048.0, ("cuda", False): 2048.0}


class UsageError(ValueError):
    """The command cannot do what it was asked for; the message is one sentence for the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(message.removeprefix("argument "))


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The arguments, with `-` for `_` in names.

    Raises:
        UsageError: one of them is wrong.
    """
    parser = build_parser(prog)
    canonical = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), token) for token in argv]
    arguments, unknown = parser.parse_known_args(canonical)
    arguments.benchmarks += [token for token in unknown if not token.startswith("-")]
    unknown = [token for token in unknown if token.startswith("-")]
    if unknown:
        name = unknown[0].partition("=")[0]
        close = closest(name, [flag for flag in parser._option_string_actions if flag.startswith("--")])
        hint = f"did you mean '{close}'?" if close else f"see {prog} --help"
        raise UsageError(f"there is no argument '{name}': {hint}")
    for name in arguments.benchmarks:
        if name not in BENCHMARKS:
            close = closest(name, BENCHMARKS)
            hint = f"did you mean '{close}'?" if close else f"choose from {', '.join(BENCHMARKS)}"
            raise UsageError(f"there is no case '{name}': {hint}")
    return arguments


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [CASE ...] [arguments]",
        description="Measure log-probs, DPO losses and training steps against every installed peer: each is checked\n"
        "first, then all are timed interleaved, with their peak memory and the largest N that fits a budget.",
        epilog="Exit code: 0 done, 1 an entry of ours failed or fell behind the baseline, 2 wrong arguments.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
        add_help=False,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "benchmarks", nargs="*", metavar="CASE", help=f"{', '.join(BENCHMARKS)} (default: all, or the baseline's)"
    )
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    what.add_argument("--quick", action="store_true", help="the smallest shapes, 3 rounds, and --plot")
    what.add_argument("--entries", metavar="NAMES", type=lambda text: text.split(","), help="only these, by commas")
    what.add_argument(
        "--memory_budget",
        metavar="MIB",
        type=_number(0),
        help="find the largest N in that much memory above the inputs; 0: do not (default: {:g} on a CPU, {:g} with "
        "--quick, {:g} on a GPU)".format(
            *(MEMORY_MIB[key] for key in (("cpu", False), ("cpu", True), ("cuda", False)))
        ),
    )
    what.add_argument(
        "--real", metavar="FILE", nargs="?", const="", help="also activations stored by bench.linear_logprob.real"
    )
    what.add_argument(
        "--model", metavar="FOLDER", type=Path, help="train_step: also a model with its tokenizer, by LoRA"
    )

    how = parser.add_argument_group("how long, and with what")
    how.add_argument(
        "--rounds", metavar="INT", type=_number(1, int), help="default: 8 on a CPU, up to 20 on a GPU, 5 of train_step"
    )
    how.add_argument(
        "--minutes", metavar="FLOAT", type=_number(0), help="of new work for a CASE (default: 8 on a GPU, no limit)"
    )
    how.add_argument("--threads", metavar="INT", type=_number(1, int), help="CPU threads (default: torch's)")
    how.add_argument("--commit", metavar="STR", help="of the tree, where it is a copy without git")
    how.add_argument("--tune", action="store_true", help="sweep the tiles of the fused Triton kernels instead")

    result = parser.add_argument_group("what comes of it")
    result.add_argument("--out", metavar="FOLDER", type=Path, default=Path(OUT), help=f"JSON and PNG (default: {OUT})")
    result.add_argument(
        "--plot", action="store_true", default=None, help="measure more N and V; draw time and memory as a PNG"
    )
    result.add_argument("--no_plot", dest="plot", action="store_false", help="do not, with --quick")
    result.add_argument("--baseline", metavar="FILE", type=Path, help="compare with the JSON of an earlier run")
    result.add_argument(
        "--threshold",
        metavar="RATIO",
        type=_number(1),
        default=THRESHOLD,
        help=f"of time or memory to the baseline's, past which an entry of ours fails the run (default: {THRESHOLD})",
    )
    result.add_argument("-h", "--help", action="store_true", help="this text")
    return parser


def _number(least: float, kind: type[int] | type[float] = float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"should be {what}, at least {least:g}, got {text!r}")
        return value

    return read
