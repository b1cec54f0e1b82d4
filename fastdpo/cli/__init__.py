"""The command line: one file or folder per command, each with `main(argv) -> int`.

Nothing here imports torch or transformers before the arguments are known to be good.
"""

import sys
from importlib import import_module
from types import ModuleType

from fastdpo.versions import __version__
from fastdpo.wording import did_you_mean

COMMANDS = {
    "train": "train a model on preference pairs with DPO",
    "inspect": "say what preference data becomes under a model's tokenizer, before training",
    "merge": "merge an adapter into its base model, and check the result",
    "report": "curves and tables of one or several runs, as a picture and one HTML page",
    "compare": "answers of a trained model and its reference side by side, with implicit rewards",
    "doctor": "say what is installed, which path log-probs take and why, and test them on this machine",
    "bench": "measure log-probs and DPO losses against every installed peer: time, memory, error",
}

_USAGE = """usage: fastdpo COMMAND [arguments]

commands:
{commands}

options:
  -h, --help   this text
  --version    the version

`fastdpo train --demo` needs no data, no network and no GPU.
"""


def command_module(name: str) -> ModuleType:
    """The module with a command's `main(argv) -> int`: a file, or command.py of a folder."""
    return import_module(f"fastdpo.cli.{name}" + (".command" if name in ("train", "doctor") else ""))


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 the input was wrong.

    argv: the arguments after the program's name; sys.argv[1:] if None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
        print(_USAGE.format(commands=commands), end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"fastdpo {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or f"the commands are: {', '.join(COMMANDS)}."
        print(f"fastdpo: error: there is no command '{argv[0]}'; {hint}", file=sys.stderr)
        return 2
    return command_module(argv[0]).main(argv[1:])
