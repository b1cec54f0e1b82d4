"""`fastdpo train`: arguments, then data, then tokenizer and model; training; files and a short result.

What is cheap to check is checked first, and torch is imported only when names and values are known to be good.
stdout gets the result, stderr everything else.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.cli.checks import TrainingFailed, check_output_folder, check_request, one_sentence
from fastdpo.cli.command import fail, log_to_stderr
from fastdpo.cli.fields import FIELDS
from fastdpo.cli.parsing import Request, UsageError, help_text, parse

if TYPE_CHECKING:
    from datasets import Dataset

    from fastdpo.training.config import DPOConfig

OWNER = {field.name: field.owner for field in FIELDS}
DEFAULTS = {field.name: field.default for field in FIELDS}


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 failed, 2 the input was wrong (one sentence on stderr), 130 interrupted."""
    if {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        print(help_text(show_all=bool({"--help-all", "--help_all"} & set(argv))), end="")
        return 0
    debug = "--debug" in argv
    try:
        request = parse(argv)
        # progress bars and libraries print to stdout, which is the result's
        with contextlib.redirect_stdout(sys.stderr), log_to_stderr():
            result = run(request)
    except KeyboardInterrupt:
        print("fastdpo train: interrupted; --resume_from_checkpoint goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        message = str(error) if _is_ours(error) else one_sentence(error)
        return fail(debug, f"fastdpo train: error: {message}", 2)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, TrainingFailed) and error.__cause__ else error
        hint = "" if debug else " (--debug shows the traceback)"
        return fail(debug, f"fastdpo train: failed: {type(cause).__name__}: {one_sentence(cause)}{hint}", 1)
    try:
        print(result, end="", flush=True)
    except OSError as error:
        # the interpreter flushes once more as it ends, and would end in a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message = f"training is done and saved, but its result cannot be printed to stdout: {error.strerror}"
        return fail(debug, f"fastdpo train: failed: {message}", 1)
    return 0


def _is_ours(error: BaseException) -> bool:
    """Whether the message was written for the user, possibly over several lines (bad rows)."""
    return type(error).__module__.startswith("fastdpo.")


def run(request: Request) -> str:
    """Train as asked and return the result's text; "" on other processes than the first."""
    if request.demo:
        from fastdpo.cli.demo import with_demo_arguments

        request = with_demo_arguments(request)
    check_request(request)
    args = build_config(request)
    check_output_folder(str(args.output_dir))
    option = {**DEFAULTS, **request.values}
    train_dataset, eval_dataset = load_data(option, args)
    tokenizer, model_type = load_tokenizer(option)
    peft_config = build_peft_config(option, model_type) if option["use_peft"] else None

    from fastdpo.cli.session import Session

    session = Session(args, option, tokenizer, train_dataset, eval_dataset, peft_config)
    if request.demo:
        from fastdpo.cli.demo import run_demo

        return run_demo(session)
    text = session.train()
    # without it a process that ends before the others may abort in its group's threads
    session.trainer.accelerator.end_training()
    return text


def build_config(request: Request) -> "DPOConfig":
    """DPOConfig from the values it owns. Raises UsageError for what this transformers release does not have."""
    import torch
    import transformers

    from fastdpo.cli.show import no_bars_without_terminal
    from fastdpo.training.config import DPOConfig

    values = {name: value for name, value in request.values.items() if OWNER[name] == "dpo"}
    unknown = [name for name in values if name not in DPOConfig.__dataclass_fields__]
    if unknown:
        raise UsageError(
            f"--{unknown[0]} is not an argument of transformers {transformers.__version__}, which is installed"
        )
    option = {**DEFAULTS, **request.values}
    init = {"revision": option["model_revision"], "dtype": option["dtype"]}
    init["attn_implementation"] = option["attn_implementation"]
    init = {name: value for name, value in init.items() if value is not None}
    if init:
        values["model_init_kwargs"] = {**(values.get("model_init_kwargs") or {}), **init}
    values.setdefault("disable_tqdm", no_bars_without_terminal())
    # torch warns of pinned memory that nothing will use
    values.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    return DPOConfig(**values)


def load_data(option: dict[str, Any], args: "DPOConfig") -> "tuple[Dataset, Dataset | None]":
    """Train and evaluation pairs; bad rows end the command here, before any model is loaded."""
    from fastdpo.data.formats import load_preferences

    common = {
        "config": option["dataset_config"],
        "dataset_dir": option["dataset_dir"],
        "skip_bad_rows": args.skip_bad_rows,
    }
    train = load_preferences(option["dataset_name"], split=option["dataset_train_split"], **common)
    if option["eval_dataset_name"] is not None:
        return train, _load_eval_dataset(option, common)
    if args.eval_strategy == "no":
        return train, None
    try:
        return train, load_preferences(option["dataset_name"], split=option["dataset_test_split"], **common)
    except ValueError as error:
        raise UsageError(
            f"eval_strategy is '{option['eval_strategy']}' and there are no pairs to evaluate on: "
            f"{one_sentence(error)} Give --eval_dataset_name, or --eval_strategy no."
        ) from error


def _load_eval_dataset(option: dict[str, Any], common: dict[str, Any]) -> "Dataset":
    """The pairs of eval_dataset_name: its split dataset_test_split, or what it has where that is the only one."""
    from fastdpo.cli.show import say
    from fastdpo.data.formats import DataError, load_preferences

    name, split = option["eval_dataset_name"], option["dataset_test_split"]
    if Path(name).is_file() and split == DEFAULTS["dataset_test_split"]:
        return load_preferences(name, split="train", **common)  # a file's only split
    try:
        return load_preferences(name, split=split, **common)
    except DataError:
        if split != DEFAULTS["dataset_test_split"] or name == option["dataset_name"]:
            raise
        dataset = load_preferences(name, split="train", **common)
        say(f"eval: {name} has no split {split!r}, its split 'train' is used")
        return dataset


def load_tokenizer(option: dict[str, Any]) -> tuple[Any, str]:
    """Tokenizer and architecture (`config.model_type`) of the model. Raises UsageError where there is no such model."""
    from transformers import AutoConfig, AutoTokenizer

    name = option["model_name_or_path"]
    hub = {"trust_remote_code": option["trust_remote_code"]}
    if option["model_revision"] is not None:
        hub["revision"] = option["model_revision"]
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        if (Path(name) / "config.json").is_file():
            reason = one_sentence(error)
            raise UsageError(f"the config.json of the model {name} is not readable: {reason}") from error
        raise UsageError(
            f"no such model: {name} is neither a folder with a config.json nor a model that can be read from the hub"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(name, **hub), config.model_type
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises no narrower class for a broken tokenizer.json
        reason = one_sentence(error).split(". ")[0]
        raise UsageError(f"the model {name} has no tokenizer that can be read: {reason}") from error


def build_peft_config(option: dict[str, Any], model_type: str) -> Any:
    """The LoRA configuration of the flags, for an architecture (`config.model_type`)."""
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    from fastdpo.cli.show import say

    targets = option["lora_target_modules"]
    if targets is None and model_type not in KNOWN:
        targets = "all-linear"
        say(f"LoRA: PEFT has no default modules for {model_type}, so all linear layers get an adapter")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=option["lora_r"],
        lora_alpha=option["lora_alpha"],
        lora_dropout=option["lora_dropout"],
        target_modules=targets,
        modules_to_save=option["lora_modules_to_save"],
        use_rslora=option["use_rslora"],
        use_dora=option["use_dora"],
    )
