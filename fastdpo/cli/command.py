"""What the smaller commands share: a parser that answers in one sentence, and how a run of one ends."""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdpo.cli.errors import UsageError, WriteFailed
from fastdpo.escaping import visible
from fastdpo.files import write_atomic
from fastdpo.wording import closest, one_sentence


class CommandParser(argparse.ArgumentParser):
    """argparse with UsageError for exit, and with `-` for `_` in names; has --json, --debug and --help."""

    def __init__(self, name: str, arguments: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"fastdpo {name}",
            usage=f"fastdpo {name} {arguments}",
            description=description,
            epilog=epilog,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
            add_help=False,
            allow_abbrev=False,
        )
        self.name = name
        command = self.add_argument_group("command")
        command.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
        command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        command.add_argument("-h", "--help", action="store_true", help="this text")

    def error(self, message: str) -> Any:
        raise UsageError(message.removeprefix("argument "))

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments. Raises UsageError with one sentence."""
        canonical = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), text) for text in argv]
        given, unknown = self.parse_known_args(canonical)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                raise UsageError(
                    f"'{unknown[0]}' is one argument too many: others are --name value (see fastdpo {self.name} --help)"
                )
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            close = closest(name, flags)
            hint = f"did you mean '{close}'?" if close else f"see fastdpo {self.name} --help"
            raise UsageError(f"there is no argument '{name}': {hint}")
        return given


def count_above(lowest: int) -> Callable[[str], int]:
    """An argparse type: whole numbers of `lowest` or more."""

    def convert(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"should be a whole number of {lowest} or more, got {text!r}")
        return value

    return convert


def number_from(lowest: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: finite numbers of `lowest` or more, or above it."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < lowest or (above and value == lowest):
            wanted = f"above {lowest:g}" if above else f"of {lowest:g} or more"
            raise argparse.ArgumentTypeError(f"should be a number {wanted}, got {text!r}")
        return value

    return convert


NESTED = "a file or a value is nested too deeply to be read; arguments, rows and model files are flat (--debug: where)"


def check_output_file(path: Path, argument: str = "--out") -> None:
    """Try the folder that a result will be written to, so that nothing is computed in vain. Makes nothing.

    Raises UsageError.
    """
    try:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{argument} {path} cannot be written: {error.strerror}") from error


def write_result(path: Path, data: str | bytes) -> None:
    """Write a result's file whole or not at all. Raises WriteFailed."""
    try:
        write_atomic(path, data)
    except OSError as error:
        raise WriteFailed(f"{path} cannot be written: {error.strerror}") from error


def run_command(
    parser: CommandParser,
    argv: list[str],
    work: Callable[[argparse.Namespace], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
) -> int:
    """Parse, work, print. Exit code: 0 done, 1 failed, 2 the input was wrong (one sentence), 130 interrupted.

    stdout gets the result (as text, or as JSON with --json), stderr everything else.
    """
    if {"-h", "--help"} & set(argv):
        print(parser.format_help(), end="")
        return 0
    debug = "--debug" in argv
    try:
        given = parser.read(argv)
        # libraries print to stdout, which is the result's
        with contextlib.redirect_stdout(sys.stderr), log_to_stderr():
            result = work(given)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        # a message of ours may list rows line by line
        ours = type(error).__module__.startswith("fastdpo.")
        return fail(debug, f"{parser.prog}: error: {error if ours else one_sentence(error)}", 2)
    except RecursionError:  # of a library, or one of the steps that walk what was read
        return fail(debug, f"{parser.prog}: error: {NESTED}", 2)
    except WriteFailed as error:
        return fail(debug, f"{parser.prog}: failed: {error}", 1)
    except Exception as error:
        hint = "" if debug else " (--debug shows the traceback)"
        return fail(debug, f"{parser.prog}: failed: {type(error).__name__}: {one_sentence(error)}{hint}", 1)
    text = (
        json.dumps(_finite(result), indent=1, ensure_ascii=False, allow_nan=False)
        if given.json
        else visible(render(result))
    )
    try:
        print(text, flush=True)
    except OSError as error:
        # the interpreter flushes once more as it ends, and would end in a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return fail(debug, f"{parser.prog}: failed: the result cannot be printed to stdout: {error.strerror}", 1)
    return 0


def fail(debug: bool, message: str, code: int) -> int:
    if debug:
        traceback.print_exc()
    print(visible(message), file=sys.stderr)
    return code


def _finite(value: Any) -> Any:
    """Numbers that JSON has not become null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Visible(logging.Formatter):
    """A message may have a file's name or a row's text in it, which must not steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """The package's own log lines, bare, on stderr; without a warning of PEFT that every run would give."""
    logger = logging.getLogger("fastdpo")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    # of several processes the first one speaks
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
