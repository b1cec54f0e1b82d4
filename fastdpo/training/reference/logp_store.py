"""Reference log-probs on disk: computed once, in parts, and read by every run with the same settings.

A dataset has a folder of its own. manifest.json says what its numbers were computed from; shard-00000.safetensors and
so on hold `SHARD_ROWS` rows each: the sum of each completion's log-probs, of pairs the part of it beyond the shorter
completion's length (so that LD-DPO of any `ld_alpha` reads the same files), and the scored tokens. A shard appears
whole or not at all, so a run that was killed goes on with the first one that is missing; a folder whose manifest says
other settings is refused, never used and never overwritten. Every shard names the settings too, by their hash, so that
two runs that begin in one empty folder cannot mix theirs, and the hash of its numbers, so that a flipped bit is found.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from fastdpo.data.rows.sides import MISMATCHED, token_columns
from fastdpo.files import write_atomic
from fastdpo.json_text import read_json
from fastdpo.training.checkpoints.content_hashes import tensors_hash
from fastdpo.training.reference.fingerprints import data_hash

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 2
SHARD_ROWS = 256
# in a shard's metadata
KEY = "settings"
HASH = "content"


class StaleLogpsError(ValueError):
    """A folder of reference log-probs that belong to other settings; the message is one sentence."""


@dataclass
class Pass:
    """What a pass of the reference over a dataset needs.

    logps: a list of rows -> (B,) of each of `columns` and `lengths`, on any device.
    columns: those of the reference's log-probs, lengths: of the completions' scored tokens.
    settings: what the numbers depend on beside the dataset; `notes` only explain a difference.
    """

    logps: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    columns: tuple[str, ...]
    lengths: tuple[str, ...]
    settings: dict[str, Any]
    notes: dict[str, Any]
    batch_size: int
    process_index: int
    num_processes: int
    wait: Callable[[], None]
    quiet: bool


def with_reference_logps(dataset: Dataset, folder: Path, work: Pass) -> Dataset:
    """`dataset` with the columns of `work`: read from `folder` as far as they are there, computed where not.

    Raises:
        StaleLogpsError: `folder` holds those of other settings or data.
        ValueError: a log-prob is not a finite number, the message names the row; `folder` cannot be written.
    """
    name = folder.name
    shards = range(-(-len(dataset) // SHARD_ROWS))
    manifest = {
        "format": FORMAT,
        "rows": len(dataset),
        "shard_rows": SHARD_ROWS,
        "data": data_hash(dataset, mismatched=True),
        **work.settings,
        "notes": work.notes,
    }
    key = _key(manifest)
    check_manifest(folder, manifest)
    work.wait()  # every process has looked before one writes
    if work.process_index == 0 and not (folder / MANIFEST).exists():
        _write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    work.wait()
    check_manifest(folder, manifest)  # another run may have begun here meanwhile
    missing = [shard for shard in shards if _read_shard(folder, shard, len(dataset), key, work) is None]
    work.wait()  # every process has the same list of missing parts before one of them appears
    mine = missing[work.process_index :: work.num_processes]
    names = dataset.column_names
    seen = [*token_columns(names), *(name for name in names if name.startswith(MISMATCHED))]
    began = time.monotonic()
    with tqdm(total=len(mine), desc=f"reference log-probs of {name}", disable=work.quiet or not mine) as bar:
        for shard in mine:
            rows = dataset.select(_rows_of(shard, len(dataset))).select_columns(seen)
            values = _compute(rows, shard * SHARD_ROWS, name, work)
            _write(folder / _shard_name(shard), save(values, metadata={KEY: key, HASH: tensors_hash(values)}))
            bar.update()
    work.wait()
    if work.process_index == 0:
        done = f"{len(missing)} of {len(shards)} parts computed in {time.monotonic() - began:.0f} s, kept in {folder}"
        logger.info(f"{name}: reference log-probs: {done if missing else f'read from {folder}'}.")
    columns: dict[str, list[Tensor]] = {column: [] for column in work.columns}
    for shard in shards:
        read = _read_shard(folder, shard, len(dataset), key, work)
        if read is None:
            raise FileNotFoundError(
                f"{folder / _shard_name(shard)} is missing after every process has written its part; all of them must "
                "see one folder: name a shared one with precompute_ref_dir."
            )
        for column in columns:
            columns[column].append(read[column])
    stored = Dataset.from_dict({column: torch.cat(parts).numpy() for column, parts in columns.items()})
    dataset = dataset.remove_columns([column for column in work.columns if column in dataset.column_names])
    return concatenate_datasets([dataset, stored], axis=1)


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise StaleLogpsError unless `folder` is empty or holds log-probs of the same settings."""
    path = folder / MANIFEST
    try:
        stored = read_json(path)
    except FileNotFoundError:
        if any(folder.glob("shard-*")):
            raise StaleLogpsError(f"{folder} has reference log-probs and no {MANIFEST}; remove the folder.") from None
        return
    except (ValueError, OSError) as error:
        raise StaleLogpsError(f"{path} is not readable ({error}); remove {folder}.") from None
    if not isinstance(stored, dict):
        raise StaleLogpsError(f"{path} is not a JSON object; remove {folder}.")
    differ = [key for key in manifest if key != "notes" and stored.get(key) != manifest[key]]
    if differ:
        said = [_difference(key, stored.get(key), manifest[key]) for key in differ]
        notes = stored.get("notes")
        notes = notes if isinstance(notes, dict) else {}
        said += [
            _difference(key, notes.get(key), value)
            for key, value in manifest["notes"].items()
            if notes.get(key) != value
        ]
        raise StaleLogpsError(
            f"{folder} holds reference log-probs of other settings: {'; '.join(said)}; remove the folder to compute "
            "them again, or give another precompute_ref_dir."
        )


def _key(manifest: dict[str, Any]) -> str:
    """SHA-256 of what the numbers depend on."""
    settings = {name: value for name, value in manifest.items() if name != "notes"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: str | bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error}); give another precompute_ref_dir.") from error


def _difference(key: str, old: Any, new: Any) -> str:
    label = key.replace("_", " ") if key not in ("max_length", "truncation_mode") else key
    if isinstance(new, str) and re.fullmatch(r"[0-9a-f]{64}", new):
        return f"not the same {label}"
    return f"{label} was {old} and is {new}"


def _compute(rows: Dataset, first: int, name: str, work: Pass) -> dict[str, Tensor]:
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(rows), work.batch_size):
        batch = [cast(dict, rows[i]) for i in range(start, min(start + work.batch_size, len(rows)))]
        parts.append({name: values.cpu() for name, values in work.logps(batch).items()})
        finite = torch.stack([parts[-1][name].isfinite() for name in work.columns]).all(0)
        if not bool(finite.all()):
            row = first + start + int((~finite).nonzero()[0])
            raise ValueError(f"{name}[{row}]: the reference's log-prob is not a finite number; fp16 may be too narrow.")
    values = {name: torch.cat([part[name] for part in parts]) for name in (*work.columns, *work.lengths)}
    return {name: value.long() if name in work.lengths else value.float() for name, value in values.items()}


def _rows_of(shard: int, rows: int) -> range:
    return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, rows))


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _read_shard(folder: Path, shard: int, rows: int, key: str, work: Pass) -> dict[str, Tensor] | None:
    path = folder / _shard_name(shard)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored_key = metadata.get(KEY)
            read = {name: file.get_tensor(name) for name in (*work.columns, *work.lengths)}
    except (SafetensorError, OSError):
        stored_key, read, metadata = None, {}, {}
    if read and HASH in metadata and metadata[HASH] != tensors_hash(read):
        logger.warning(f"{path} is not as it was written (its content hash differs) and is computed again.")
        return None
    if read and stored_key != key:
        raise StaleLogpsError(
            f"{path} holds reference log-probs of other settings than {MANIFEST} beside it, as if two runs had begun "
            f"in one folder; remove {folder} to compute them again, or give another precompute_ref_dir."
        )
    if read and all(len(values) == len(_rows_of(shard, rows)) for values in read.values()):
        return read
    logger.warning(f"{path} is not readable and is computed again.")
    return None
