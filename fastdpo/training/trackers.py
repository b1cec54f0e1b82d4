"""The trackers that `report_to` may name: known, and installed."""

from difflib import get_close_matches
from importlib.util import find_spec

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
            near = get_close_matches(str(name), TRACKERS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"report_to: unknown tracker {name!r}; choose from {', '.join(TRACKERS)}.{hint}")
        modules, package = TRACKERS[name]
        if modules and not any(find_spec(module) for module in modules):
            raise ValueError(
                f"report_to names {name!r}, which is not installed; run `pip install {package}` "
                "or leave it out of report_to."
            )
