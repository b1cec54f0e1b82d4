"""A model's folder, looked at before anything heavy is loaded."""

import os
from pathlib import Path

from fastdpo.cli.errors import UsageError

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def is_adapter_folder(folder: Path) -> bool:
    """Whether it holds an adapter and no model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def check_model_folder(name: str, kind: str = "model") -> None:
    """A hub name is looked up later; a path is judged now. `kind` is what the message says there is none of."""
    folder = _folder(name, kind, "config.json")
    if is_adapter_folder(folder):
        raise UsageError(
            f"no such {kind}: the folder {name} holds an adapter; give a model, for instance the merged one"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"no such {kind}: the folder {name} holds no config.json")


def check_tokenizer_folder(name: str) -> None:
    """The same where a tokenizer is all that is read."""
    folder = _folder(name, "model", "tokenizer")
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UsageError(f"the folder {name} holds no tokenizer ({', '.join(TOKENIZER_FILES)})")


def _folder(name: str, kind: str, part: str) -> Path:
    """The folder, which need not be there where `name` may be the hub's."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UsageError(f"no such {kind}: {name} is a file; give the folder that holds its {part}")
    looks_like_path = name.startswith((".", "/", "~")) or (name.count("/") != 1 and os.sep in name)
    if looks_like_path and not folder.is_dir():
        raise UsageError(f"no such {kind}: the folder {name} does not exist")
    return folder
