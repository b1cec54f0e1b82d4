"""A finished run's folder: what it trained, with which beta, and what its reference was."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.models.saved import read_adapter_config
from fastdpo.training.report.metric_files import FOLDER, read_summary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedRun:
    """folder: the run's output_dir. is_adapter: an adapter was trained, over `base`; else a whole model, from `base`.

    base: None where neither adapter nor summary names it. beta: None where no summary.json says it. reference: what the
    summary has about it (see `Reference.origin`, and "description"), {} where there is none.
    """

    folder: str
    is_adapter: bool
    base: str | None
    beta: float | None
    reference: Mapping[str, Any]


def read_run(folder: str) -> SavedRun:
    """Look into a run's folder. Raises ValueError with one sentence where it holds no model."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"no such run: the folder {folder} does not exist")
    adapter, whole = (path / "adapter_config.json").is_file(), (path / "config.json").is_file()
    if not adapter and not whole:
        raise ValueError(
            f"the folder {folder} holds neither a model (config.json) nor an adapter (adapter_config.json)"
        )
    summary = read_summary(path / FOLDER / "summary.json")
    model = summary.get("model") or {}
    if adapter and whole:  # of two runs in one folder, the summary is of the later one
        adapter = model.get("trained_as", "lora") != "full"
    base = model.get("name_or_path")
    if adapter:
        # what a fresh adapter over merged ones belongs to has no name
        base = read_adapter_config(folder).base_model_name_or_path or (None if _merged_adapters(model) else base)
    beta = (summary.get("settings") or {}).get("beta")
    return SavedRun(folder, adapter, base, beta, summary.get("reference") or {})


def no_base_model(adapter: str) -> str:
    """Why the model of an adapter that names none is not known, and what to give. Raises ValueError."""
    model = read_summary(Path(adapter, FOLDER, "summary.json")).get("model") or {}
    merged = _merged_adapters(model)
    if merged:
        how = f"{merged[0]} --out FOLDER`" if len(merged) == 1 else "ADAPTER --out FOLDER`, one after the other"
        return (
            f"the adapter {adapter} was trained over {model.get('name_or_path')}: write that model with `fastdpo merge "
            f"{how}, and give FOLDER as --base"
        )
    return f"the adapter {adapter} does not say which model it belongs to; give its base model"


def _merged_adapters(model: Mapping[str, Any]) -> list[str]:
    """The adapters that a run merged into its model first, by what its summary says of the model."""
    return list(model.get("adapter_name_or_path") or []) if model.get("create_new_adapter") else []


def reference_path(run: SavedRun, ref_model: str | None = None) -> str | None:
    """The reference model's path; None is the run's own base model with the adapter switched off.

    ref_model wins; then what the summary says. A reference that the run does not keep (another adapter, a moving one)
    is answered by the model that training started from, and a log line says so. Raises ValueError where no model is
    known.
    """
    if ref_model is not None:
        return ref_model
    origin = run.reference
    if origin.get("kind") == "model" and "path" in origin:
        if origin.get("synced"):
            logger.warning(
                f"the run's reference moved with the policy; it is compared with its start, {origin['path']}"
            )
        return origin["path"]
    start = "the base model, its adapter switched off" if run.is_adapter else run.base
    if start is None:
        raise ValueError(
            f"{run.folder} has no {FOLDER}/summary.json that says which model was trained; give the ref_model"
        )
    kept = origin.get("kind") == ("base" if run.is_adapter else "start") and not origin.get("synced")
    if origin and not kept:
        logger.warning(
            f"the run's reference was {origin.get('description', origin)}, which is not kept; it is compared with "
            f"{start}"
        )
    return None if run.is_adapter else run.base
