"""The trackers that `report_to` may name: known, installed, and no reason for a run to end."""

import functools
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from transformers import TrainerCallback

from fastdpo.wording import closest

logger = logging.getLogger(__name__)

# each tracker that transformers knows: the modules of which one must be installed, and what pip calls it
TRACKERS: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": ((), ""),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raises ValueError for a tracker that transformers does not know, or that is not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ["none"])
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in TRACKERS:
            near = closest(str(name), TRACKERS)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ValueError(f"report_to: unknown tracker {name!r}; choose from {', '.join(TRACKERS)}.{hint}")
        modules, package = TRACKERS[name]
        if modules and not any(find_spec(module) for module in modules):
            raise ValueError(
                f"report_to names {name!r}, which is not installed; run `pip install {package}` "
                "or leave it out of report_to."
            )


def outlive_full_disk(callback: TrainerCallback) -> None:
    """Let a tracker of transformers that cannot write, from the first step on, cost its log and not the run.

    One line says so. What it does before the first step (a folder to make, a server to reach) ends the run as ever.
    """
    if not type(callback).__module__.startswith("transformers.integrations") or hasattr(callback, "outlives_full_disk"):
        return
    callback.outlives_full_disk = False  # pyright: ignore[reportAttributeAccessIssue] ours; True once it has

    def guarded(event: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(event)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return event(*args, **kwargs)
            except OSError as error:
                if not callback.outlives_full_disk:  # pyright: ignore[reportAttributeAccessIssue] as above
                    callback.outlives_full_disk = True  # pyright: ignore[reportAttributeAccessIssue] as above
                    logger.warning(
                        f"{type(callback).__name__} cannot write: {error.strerror or error}; training goes on, and its "
                        "log may end here."
                    )
                return None

        return call

    for name in dir(callback):
        if name.startswith("on_") and name not in ("on_init_end", "on_train_begin"):
            setattr(callback, name, guarded(getattr(callback, name)))
