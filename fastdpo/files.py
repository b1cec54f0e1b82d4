"""Files that appear whole or not at all: a kill at any moment leaves either the old content or the new."""

import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FOLDER = "dpo_metrics"  # of a run, in its output_dir
# what transformers and PEFT write in place, through a link
_MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "training_args.bin"),
)


class DiskError(ValueError):
    """A folder cannot be written, or has no room for what a run writes; the message is one sentence."""


def check_writable(folder: str | os.PathLike[str], argument: str) -> None:
    """Make `folder` and try a file in it, so that a run does not end with results it cannot store.

    Raises:
        DiskError: it is a file, or cannot be made or written; the sentence names `argument`.
    """
    path = Path(folder)
    try:
        if path.exists() and not path.is_dir():
            raise DiskError(f"{argument} {folder} is a file; give a folder")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))  # on a full disk an empty file can be made
            file.flush()
    except OSError as error:
        raise DiskError(f"{argument} {folder} cannot be written: {error.strerror}") from error


def check_output_dir(folder: str | os.PathLike[str], argument: str) -> None:
    """`check_writable`, and that the metric files would be in `folder`, which may be a link itself.

    Raises:
        DiskError: as above; or its `METRICS_FOLDER` is a link that leads out of it.
    """
    check_writable(folder, argument)
    metrics = Path(folder, METRICS_FOLDER)
    if metrics.is_symlink() and not metrics.resolve().is_relative_to(Path(folder).resolve()):
        raise DiskError(
            f"{argument} {folder}: its {METRICS_FOLDER} is a link to {os.readlink(metrics)}, out of that folder; "
            f"remove the link, or give another {argument.lstrip('-')}"
        )


def remove_tree(path: Path) -> None:
    """Delete a folder as far as that is possible; of a link the link alone."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def cut_model_links(folder: str | os.PathLike[str]) -> None:
    """Remove links among the files that saving a model would write through: what they lead to is somebody else's."""
    for name in _MODEL_FILES:
        path = Path(folder, name)
        if path.is_symlink():
            path.unlink(missing_ok=True)


def why_not_written(error: BaseException) -> str | None:
    """The system's reason that a library could not write a file, None where the error is another one."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    system_reason = re.search(r"I/O error: (.+?)(?: \(os error \d+\))?$", str(error))  # safetensors
    if system_reason is not None:
        return system_reason[1]
    torch_s = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return "the disk is full, or a limit is reached" if torch_s else None


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write `data` (text as UTF-8) to `path`: a temporary file in the same folder, fsync, rename.

    The folder is made when it is missing. On an error the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode("utf-8") if isinstance(data, str) else data
    # not mkstemp, which makes a file that only its owner may read; not the pid alone, which two machines may share
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in `folder` durable; a system that cannot fsync a folder is left alone."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """fsync every file and folder below `folder`, and `folder` itself."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(parent)


def plain_json(value: Any) -> Any:
    """`value` with only what strict JSON has: numbers that are not finite become null, unknown objects text."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
