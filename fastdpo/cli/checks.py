"""What is checked before anything heavy is loaded: the output folder, the model's folder, what belongs together."""

import os
import tempfile
from pathlib import Path

from fastdpo.cli.parsing import Request, UsageError


class TrainingFailed(Exception):
    """Something failed after the input was accepted; `__cause__` is the error."""


def check_request(request: Request) -> None:
    """Everything that the values alone and a look at the disk can tell. Raises UsageError with one sentence."""
    values = request.values
    if values.get("model_name_or_path") is None:
        raise UsageError(
            "--model_name_or_path (-m) is missing: give the folder or hub name of the model to train, "
            "or try fastdpo train --demo"
        )
    if values.get("dataset_name") is None:
        raise UsageError(
            "--dataset_name (-d) is missing: give a file (json, jsonl, csv, parquet), a saved dataset folder, "
            "a name in dataset_info.json or on the hub, or try fastdpo train --demo"
        )
    lora = [name for name in values if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    if lora and "use_peft" not in values:
        raise UsageError(
            f"{request.sources[lora[0]]} is set but --use_peft is not: add --use_peft to train a LoRA adapter"
        )
    check_model_folder(values["model_name_or_path"])
    resume = values.get("resume_from_checkpoint")
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise UsageError(f"{request.sources['resume_from_checkpoint']}: there is no checkpoint folder {resume}")


def check_model_folder(name: str) -> None:
    """A hub name is looked up later; a path is judged now."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UsageError(f"no such model: {name} is a file; give the folder that holds its config.json")
    looks_like_path = name.startswith((".", "/", "~")) or (name.count("/") != 1 and os.sep in name)
    if looks_like_path and not folder.is_dir():
        raise UsageError(f"no such model: the folder {name} does not exist")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UsageError(
            f"no such model: the folder {name} holds an adapter; give a model, for instance the merged one"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"no such model: the folder {name} holds no config.json")


def check_output_folder(output_dir: str) -> None:
    """Make the folder and try a file in it, so that a run does not end with results it cannot store."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {output_dir} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error


def one_sentence(error: BaseException) -> str:
    """The message without line breaks and stack-like tails; the type's name where there is no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
