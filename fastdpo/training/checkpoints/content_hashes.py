"""Content hashes: what is read back is what was written, to the bit, or it is not used.

XXH3 (128 bits) finds every flipped bit and every cut, and costs a few hundredths of writing a file; it does not stop
somebody who forges files on purpose.
"""

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import TrainingArguments

from fastdpo.files import write_atomic
from fastdpo.json_text import read_json

MANIFEST = "fastdpo_hashes.json"
ALGORITHM = "xxh3_128"
_PIECE = 1 << 24


def files_of(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, relative and with `/`, by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def file_hash(path: str | os.PathLike[str]) -> str:
    """The hash of a file's content, read through the page cache without a copy of it."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
                for start in range(0, len(view), _PIECE):
                    digest.update(view[start : start + _PIECE])
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The hash of names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The hashes of those of `names` that are files in `folder`."""
    return {name: file_hash(folder / name) for name in names if (folder / name).is_file()}


def hash_checkpoint(folder: Path, args: TrainingArguments) -> dict[str, str]:
    """The hashes of all files in `folder`, by all processes; of those that this machine has where each has its own."""
    if args.world_size == 1 or args.save_on_each_node:
        return hash_files(folder, files_of(folder)) if args.should_save else {}
    # each process looks at its share
    names = cast(Any, broadcast_object_list([files_of(folder) if args.process_index == 0 else None]))[0]
    mine = hash_files(folder, names[args.process_index :: args.world_size])
    hashes = dict(gather_object(list(mine.items())))
    if args.process_index == 0:  # files that the others do not see
        hashes |= hash_files(folder, [name for name in names if name not in hashes])
    return hashes


def write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write them into `folder`."""
    write_atomic(folder / MANIFEST, json.dumps({"algorithm": ALGORITHM, "files": dict(hashes)}, indent=1))


def changed_file(folder: Path) -> str | None:
    """Why the files in `folder` are not those that its manifest names; None where they are, or where there is none."""
    try:
        manifest: Any = read_json(folder / MANIFEST)
        if manifest["algorithm"] != ALGORITHM or not manifest["files"]:
            return f"{MANIFEST} is not readable"
        for name, expected in dict(manifest["files"]).items():
            if file_hash(folder / name) != expected:
                return f"{name} is not as it was written (its hash differs; to use it all the same remove {MANIFEST})"
    except FileNotFoundError as error:
        missing = Path(str(error.filename))
        return None if missing.name == MANIFEST else f"{missing.name} is missing"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        where = Path(str(getattr(error, "filename", None) or MANIFEST)).name
        return f"{where} is not readable"
    return None
