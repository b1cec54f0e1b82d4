"""A model's folder, looked at before anything heavy is loaded."""

import os
from pathlib import Path

from fastdpo.cli.errors import UsageError


def _is_adapter_folder(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def check_model_folder(name: str, kind: str = "model") -> None:
    """A hub name is looked up later; a path is judged now. `kind` is what the message says there is none of."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UsageError(f"no such {kind}: {name} is a file; give the folder that holds its config.json")
    looks_like_path = name.startswith((".", "/", "~")) or (name.count("/") != 1 and os.sep in name)
    if looks_like_path and not folder.is_dir():
        raise UsageError(f"no such {kind}: the folder {name} does not exist")
    if _is_adapter_folder(folder):
        raise UsageError(
            f"no such {kind}: the folder {name} holds an adapter; give a model, for instance the merged one"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"no such {kind}: the folder {name} holds no config.json")
