"""What is checked before anything heavy is loaded: the model's folder, what belongs together."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.model_folder import check_model_folder, is_adapter_folder
from fastdpo.cli.train.parsing import Request
from fastdpo.json_text import read_json

ADAPTER_OPTIONS = ("use_rslora", "use_dora", "init_lora_weights")  # and what begins with lora_


def check_request(request: Request) -> None:
    """Everything that the values alone and a look at the disk can tell. Raises UsageError with one sentence."""
    values = request.values
    if values.get("model_name_or_path") is None:
        raise UsageError(
            "--model_name_or_path (-m) is missing: give the folder or hub name of the model to train, "
            "or try fastdpo train --demo"
        )
    if values.get("dataset_name") is None and not values.get("datasets"):
        raise UsageError(
            "--dataset_name (-d) is missing: give a file (json, jsonl, csv, parquet), a saved dataset folder, "
            "a name in dataset_info.json or on the hub, or try fastdpo train --demo"
        )
    _check_adapters(request)
    _check_quantization(request)
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        where = request.sources["deepspeed"]
        raise UsageError(
            f"{where} needs the package deepspeed, which is not installed: pip install it, or leave it out"
        )
    check_model_folder(values["model_name_or_path"])
    if values.get("ref_model") is not None:
        check_model_folder(values["ref_model"], "reference")
    for name in [*(values.get("adapter_name_or_path") or []), *(values.get("ref_adapters") or [])]:
        if not Path(name, "adapter_config.json").is_file():
            raise UsageError(f"no such adapter: {name} is no folder with an adapter_config.json")
    resume = values.get("resume_from_checkpoint")
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise UsageError(f"{request.sources['resume_from_checkpoint']}: there is no checkpoint folder {resume}")


def with_base_model(request: Request) -> Request:
    """The request with the base model of an adapter's folder that was given as the model. Raises UsageError."""
    folder = request.values.get("model_name_or_path")
    if folder is None or not is_adapter_folder(Path(folder)):
        return request
    try:
        base = read_json(Path(folder, "adapter_config.json"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    fix = "give the model as --model_name_or_path, and the adapter as --adapter_name_or_path"
    if not base or not isinstance(base, str):
        raise UsageError(f"the adapter {folder} does not say which model it belongs to: {fix}")
    try:
        check_model_folder(base)
    except UsageError as error:
        raise UsageError(f"the adapter {folder} belongs to {base}, and there is {error}: {fix}") from error
    more = request.values.get("adapter_name_or_path") or []
    adapted = {"model_name_or_path": base, "adapter_name_or_path": [folder, *more]}
    return request._replace(values={**request.values, **adapted})


def _check_adapters(request: Request) -> None:
    """Which of a fresh adapter, one that goes on, and no adapter is trained."""
    values, sources = request.values, request.sources
    adapters, fresh = values.get("adapter_name_or_path"), values.get("create_new_adapter")
    lora = [name for name in values if name.startswith("lora_") or name in ADAPTER_OPTIONS]
    frozen = [name for name in values if name.startswith("freeze_") and values[name] is not None]
    if fresh and not adapters:
        raise UsageError(f"{sources['create_new_adapter']} merges an adapter first: name it in --adapter_name_or_path")
    if fresh and not values.get("use_peft"):
        raise UsageError(f"{sources['create_new_adapter']} trains a fresh adapter: add --use_peft")
    if adapters and not fresh and (values.get("use_peft") or lora):
        argument = sources.get("use_peft") if values.get("use_peft") else sources[lora[0]]
        raise UsageError(
            f"{argument} is about a fresh adapter, and {adapters[-1]} goes on being trained as it is: leave it out, or "
            "add --use_peft --create_new_adapter to merge that adapter first"
        )
    if lora and not adapters and "use_peft" not in values:
        raise UsageError(f"{sources[lora[0]]} is set but --use_peft is not: add --use_peft to train a LoRA adapter")
    if values.get("lora_r", 1) < 1:
        raise UsageError(f"{sources['lora_r']} is a rank and should be at least 1, got {values['lora_r']}")
    if not 0 <= values.get("lora_dropout", 0) < 1:
        raise UsageError(f"{sources['lora_dropout']} should be in [0, 1), got {values['lora_dropout']}")
    if frozen and (adapters or values.get("use_peft")):
        raise UsageError(f"{sources[frozen[0]]} is for training without an adapter: leave it or the adapter out")
    if frozen and values.get("freeze_trainable_layers") is None:
        raise UsageError(f"{sources[frozen[0]]} is set but --freeze_trainable_layers is not: say how many layers train")


def _check_quantization(request: Request) -> None:
    values, sources = request.values, request.sources
    asked = [name for name in ("load_in_4bit", "load_in_8bit") if values.get(name)]
    if len(asked) == 2:
        raise UsageError(f"{sources[asked[0]]} and {sources[asked[1]]} exclude each other: give one")
    adapters = values.get("adapter_name_or_path")
    if asked and not (values.get("use_peft") or adapters):
        raise UsageError(f"{sources[asked[0]]}: quantized weights cannot be trained: add --use_peft to train a LoRA")
    if asked and adapters and (values.get("create_new_adapter") or len(adapters) > 1):
        raise UsageError(
            f"{sources[asked[0]]}: an adapter is not merged into quantized weights: run fastdpo merge first"
        )
    if (asked or _is_quantized(values.get("ref_model_init_kwargs"))) and find_spec("bitsandbytes") is None:
        what = sources[asked[0]] if asked else sources["ref_model_init_kwargs"]
        raise UsageError(
            f"{what} needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave it out"
        )


def _is_quantized(init_kwargs: Any) -> bool:
    config = init_kwargs.get("quantization_config") if isinstance(init_kwargs, dict) else None
    return isinstance(config, dict) and config.get("quant_method") == "bitsandbytes"


def only_process_of_several(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch --cpu --num_processes N` was meant to start several: without mpirun it starts one."""
    several = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # it names a master only where it was asked for more than one process
    return on_cpu and "MASTER_ADDR" in environment and not any(name in environment for name in several)
