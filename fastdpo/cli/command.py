"""What all commands share: a parser that answers in one sentence, and how a run ends."""

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
from typing import Any, TypeVar

from fastdpo.cli.errors import TrainingFailed, UsageError, WriteFailed
from fastdpo.escaping import visible
from fastdpo.files import write_atomic
from fastdpo.wording import did_you_mean, one_sentence

Result = TypeVar("Result")


class SentenceParser(argparse.ArgumentParser):
    """argparse with UsageError for exit, whole names alone, and help in two columns."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
            add_help=False,
            allow_abbrev=False,
        )

    def error(self, message: str) -> Any:
        raise UsageError(message.removeprefix("argument "))


class CommandParser(SentenceParser):
    """A parser with `-` for `_` in names, and with --json, --debug and --help. json_help: what --json gives."""

    def __init__(
        self,
        name: str,
        arguments: str,
        description: str,
        epilog: str | None = None,
        json_help: str = "the result as one JSON object on stdout",
    ) -> None:
        super().__init__(f"fastdpo {name}", f"fastdpo {name} {arguments}", description, epilog)
        command = self.add_argument_group("command")
        command.add_argument("--json", action="store_true", help=json_help)
        command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        command.add_argument("-h", "--help", action="store_true", help="this text")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments. Raises UsageError with one sentence."""
        canonical = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), text) for text in argv]
        arguments, unknown = self.parse_known_args(canonical)
        if unknown:
            name = unknown[0].partition("=")[0]
            see = f"see {self.prog} --help"
            if not name.startswith("-"):
                takes_words = bool(self._get_positional_actions())
                why = "is one argument too many: others" if takes_words else "stands alone: arguments"
                raise UsageError(f"'{unknown[0]}' {why} are --name value ({see})")
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            raise UsageError(f"there is no argument '{name}': {did_you_mean(name, flags) or see}")
        return arguments


def count_from(lowest: int, said: str | None = None) -> Callable[[str], int]:
    """An argparse type: whole numbers of `lowest` or more. said: how a message puts that."""

    def convert(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"should be a whole number {said or f'of {lowest} or more'}, got {text!r}")
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
            said = f"above {lowest:g}" if above else f"of {lowest:g} or more"
            raise argparse.ArgumentTypeError(f"should be a number {said}, got {text!r}")
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


# what a library or a step of ours raises where the input is at fault
INPUT_ERRORS = (ValueError, OSError, ImportError)


def run_command(
    parser: CommandParser,
    argv: list[str],
    work: Callable[[argparse.Namespace], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
    *,
    not_finite: Callable[[float], Any] = lambda number: None,
    **ending: Any,
) -> int:
    """Help, or: parse, work, print as text or as JSON (--json). The exit code of `end_command`, which takes `ending`.

    not_finite: what JSON has in place of NaN and infinities.
    """
    if {"-h", "--help"} & set(argv):
        print(parser.format_help(), end="")
        return 0

    def show(result: dict[str, Any]) -> str:
        if "--json" not in argv:
            return visible(render(result)) + "\n"
        return json.dumps(_finite(result, not_finite), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    return end_command(parser.prog, "--debug" in argv, lambda: work(parser.read(argv)), show, **ending)


def end_command(
    name: str,
    debug: bool,
    work: Callable[[], Result],
    show: Callable[[Result], str],
    *,
    exit_code: Callable[[Result], int] = lambda result: 0,
    input_errors: tuple[type[Exception], ...] = INPUT_ERRORS,
    interrupted: Callable[[], str] = lambda: "interrupted",
    noun: str = "the result",
) -> int:
    """Work, print what `show` makes of the result, and end: every command's exit codes and sentences.

    0, or `exit_code` of the result: done. 1: failed. 2: the input was wrong, one of `input_errors`. 130: interrupted.
    What a SystemExit says, where it was said already why (a signal).
    stdout gets the result, stderr everything else. `noun`: what cannot be printed where stdout cannot be written.
    """
    try:
        # progress bars and libraries print to stdout, which is the result's
        with contextlib.redirect_stdout(sys.stderr), log_to_stderr():
            result = work()
    except KeyboardInterrupt:
        print(f"{name}: {interrupted()}", file=sys.stderr)
        return 130
    except SystemExit as end:
        if isinstance(end.code, str):  # a library's
            return _fail(debug, f"{name}: failed: {one_sentence(end)}", 1)
        return end.code or 0
    except input_errors as error:
        # a message of ours may list rows line by line
        return _fail(debug, f"{name}: error: {error if _is_ours(error) else one_sentence(error)}", 2)
    except RecursionError:  # of a library, or one of the steps that walk what was read
        return _fail(debug, f"{name}: error: {NESTED}", 2)
    except Exception as error:
        return _fail(debug, f"{name}: failed: {_failure(error, debug)}", 1)
    try:
        print(show(result), end="", flush=True)
    except OSError as error:
        # the interpreter flushes once more as it ends, and would end in a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(debug, f"{name}: failed: {noun} cannot be printed to stdout: {error.strerror}", 1)
    return exit_code(result)


def _fail(debug: bool, message: str, code: int) -> int:
    if debug:
        traceback.print_exc()
    print(visible(message), file=sys.stderr)
    return code


def _failure(error: Exception, debug: bool) -> str:
    """What a failure of the program is called, in one sentence."""
    cause = error.__cause__ if isinstance(error, TrainingFailed) and error.__cause__ else error
    if isinstance(error, WriteFailed) or (isinstance(error, TrainingFailed) and _is_ours(cause)):
        return str(cause)
    # where memory ran out, a library's text about its allocator helps less
    sentence = getattr(cause, "fastdpo_sentence", None) or f"{type(cause).__name__}: {one_sentence(cause)}"
    return sentence + ("" if debug else " (--debug shows the traceback)")


def _is_ours(error: BaseException) -> bool:
    """Whether the message was written for the user, possibly over several lines (bad rows)."""
    return type(error).__module__.startswith("fastdpo.")


def _finite(value: Any, not_finite: Callable[[float], Any]) -> Any:
    """The value with something else for numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(item, not_finite) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, not_finite) for item in value]
    return not_finite(value) if isinstance(value, float) and not math.isfinite(value) else value


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
