"""`fastdpo train`: arguments, then data, then tokenizer and model; training; files and a short result.

What is cheap to check is checked first, and torch is imported only when names and values are known to be good.
stdout gets the result, stderr everything else.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.cli.command import end_command
from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.checks import check_request, only_process_of_several, with_base_model
from fastdpo.cli.train.data import load_data
from fastdpo.cli.train.fields import FIELDS
from fastdpo.cli.train.parsing import DEFAULTS, Request, help_text, parse
from fastdpo.escaping import visible
from fastdpo.files import check_output_dir, check_writable
from fastdpo.wording import first_sentence

if TYPE_CHECKING:
    from fastdpo.config.dpo_config import DPOConfig

logger = logging.getLogger(__name__)

OWNER = {field.name: field.owner for field in FIELDS}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 failed, 2 the input was wrong (one sentence on stderr), 130 interrupted, 143 told to end."""
    if {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        print(help_text(show_all=bool({"--help-all", "--help_all"} & set(argv))), end="")
        return 0
    output_dir = "output"

    def parse_and_train() -> str:
        nonlocal output_dir
        request = parse(argv)
        output_dir = request.values.get("output_dir") or output_dir
        return run(request)

    return end_command(
        "fastdpo train",
        "--debug" in argv,
        parse_and_train,
        visible,
        interrupted=lambda: f"interrupted; {_how_to_go_on(output_dir)}",
        noun="training is done and saved, but its result",
    )


def _how_to_go_on(output_dir: str) -> str:
    # by name alone: what would judge a checkpoint may not be imported yet
    done = [path.parent.name for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    last = max(done, key=lambda name: int("".join(filter(str.isdigit, name)) or 0), default=None)
    if last is None:
        return f"there is no checkpoint in {output_dir} yet, so the same command starts from the beginning"
    return f"--resume_from_checkpoint goes on from {Path(output_dir, last)}"


def run(request: Request) -> str:
    """Train as asked and return the result's text; "" on other processes than the first."""
    if request.demo:
        from fastdpo.cli.train.demo import with_demo_arguments

        request = with_demo_arguments(request)
    request = with_base_model(request)
    check_request(request)
    if only_process_of_several(os.environ):
        logger.warning(
            "accelerate launch --cpu has started one process, which trains alone; for several on CPUs: "
            "accelerate launch --multi_gpu --num_processes N -m fastdpo train ... --use_cpu"
        )
    args = build_config(request)
    check_output_dir(str(args.output_dir), "--output_dir")

    from fastdpo.training.checkpoints.run_lock import check_free

    if args.process_index == 0:  # the others may come here when it holds the lock already
        check_free(Path(str(args.output_dir)))
    if args.precompute_ref_log_probs and args.precompute_ref_dir is not None:
        check_writable(args.precompute_ref_dir, "--precompute_ref_dir")
    option = {**DEFAULTS, **request.values}
    train_dataset, eval_dataset = load_data(option, args)
    tokenizer, model_type = load_tokenizer(option)
    peft_config = build_peft_config(option, model_type) if option["use_peft"] else None

    from fastdpo.cli.train.session import Session

    session = Session(args, option, tokenizer, train_dataset, eval_dataset, peft_config)
    if request.demo:
        from fastdpo.cli.train.demo import run_demo

        return run_demo(session)
    text = session.train()
    # without it a process that ends before the others may abort in its group's threads
    session.trainer.accelerator.end_training()
    return text


def build_config(request: Request) -> "DPOConfig":
    """DPOConfig from the values it owns. Raises UsageError for what this transformers release does not have."""
    import torch
    import transformers

    from fastdpo.cli.terminal import hide_bars, no_bars_without_terminal
    from fastdpo.config.dpo_config import DPOConfig

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
    if values.setdefault("disable_tqdm", no_bars_without_terminal()):
        hide_bars()
    # torch warns of pinned memory that nothing will use
    values.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    return DPOConfig(**values)


def load_tokenizer(option: dict[str, Any]) -> tuple[Any, str]:
    """Tokenizer and architecture (`config.model_type`) of the model. Raises UsageError where there is no such model."""
    from transformers import AutoTokenizer

    from fastdpo.models.size import checked_config

    name = option["model_name_or_path"]
    # an adapter's folder has one where training saved it, maybe with tokens of its own
    adapters = option["adapter_name_or_path"] or []
    own = next((path for path in reversed(adapters) if Path(path, "tokenizer_config.json").is_file()), None)
    hub = {"trust_remote_code": option["trust_remote_code"]}
    if option["model_revision"] is not None:
        hub["revision"] = option["model_revision"]
    try:
        config = checked_config(name, **hub)
    except (OSError, ValueError) as error:
        if (Path(name) / "config.json").is_file():
            raise UsageError(f"the config.json of the model {name} is not readable: {_reason(error)}") from error
        raise UsageError(
            f"no such model: {name} is neither a folder with a config.json nor a model that can be read from the hub"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(own or name, **({} if own else hub))
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises no narrower class for a broken tokenizer.json
        folder, reason = Path(own or name), _reason(error)
        if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            reason = "the folder holds no tokenizer.json; save the tokenizer there that the model was trained with"
        raise UsageError(f"the model {own or name} has no tokenizer that can be read: {reason}") from error
    if option["chat_template"] is not None:
        tokenizer.chat_template = read_template(option["chat_template"])
    return tokenizer, config.model_type


def read_template(template: str) -> str:
    """Jinja text as it is, or that of the file. Raises UsageError for a file that cannot be read."""
    if "{" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat_template {template} is neither Jinja text nor a file that can be read") from error


def _reason(error: BaseException) -> str:
    """What a library says, in one sentence, without the advice that follows it."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own; read that, and give --trust_remote_code to run it"
    return first_sentence(error).rstrip(".")


def build_peft_config(option: dict[str, Any], model_type: str) -> Any:
    """The LoRA configuration of the flags, for an architecture (`config.model_type`)."""
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    from fastdpo.cli.terminal import say

    targets = option["lora_target_modules"]
    if isinstance(targets, str) and targets.isidentifier():
        targets = [targets]  # a text is a pattern of whole names in PEFT
    if targets is None and model_type not in KNOWN:
        targets = "all-linear"
        say(f"LoRA: PEFT has no default modules for {model_type}, so all linear layers get an adapter")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=option["lora_r"],
        lora_alpha=option["lora_alpha"],
        lora_dropout=option["lora_dropout"],
        target_modules=targets,
        target_parameters=option["lora_target_parameters"],
        modules_to_save=option["lora_modules_to_save"],
        init_lora_weights=option["init_lora_weights"],
        use_rslora=option["use_rslora"],
        use_dora=option["use_dora"],
    )
