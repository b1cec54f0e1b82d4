"""Make fastdpo/cli/train/fields.py, the table that help and name checking read, from the dataclasses.

Run `python -m fastdpo.cli.train.generate_fields` after a change of DPOConfig, ModelArguments or DataArguments, or for
another transformers release; a test compares the table with the dataclasses.
"""

import ast
import dataclasses
import inspect
import re
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from fastdpo.cli.train.arguments import DataArguments, Field, ModelArguments
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.losses import LOSSES, UNPAIRED_LOSSES

# --help shows these, in this order; every other field is in --help-all only
MAIN: dict[str, tuple[str, ...]] = {
    "model": (
        "model_name_or_path",
        "model_revision",
        "dtype",
        "attn_implementation",
        "trust_remote_code",
        "load_in_4bit",
        "load_in_8bit",
        "ref_model",
        "ref_adapters",
    ),
    "data": (
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_dir",
        "skip_bad_rows",
        "max_samples",
        "max_length",
        "truncation_mode",
        "on_overlong",
        "scored_turns",
    ),
    "DPO": ("loss_type", "beta", "label_smoothing", "loss_weights", "simpo_gamma", "rpo_alpha", "aggregate"),
    "training": (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "bf16",
        "fp16",
        "optim",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "seed",
    ),
    "LoRA": (
        "use_peft",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
        "adapter_name_or_path",
    ),
    "evaluation": (
        "eval_strategy",
        "eval_steps",
        "eval_dataset_name",
        "dataset_test_split",
        "test_split_size",
        "per_device_eval_batch_size",
    ),
    "output": (
        "output_dir",
        "logging_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "report_to",
        "run_name",
    ),
}

# `debug` is TrainingArguments' overflow debugger, here --debug shows the traceback; the other cannot be given as text
LEFT_OUT = ("debug", "parallelism_config")
TYPES = {
    "resume_from_checkpoint": "bool | str | None",  # TrainingArguments says str; Trainer.train takes True as well
    "tools": "str | None",  # JSON: commas in it separate nothing
}
HELP = {"resume_from_checkpoint": "Checkpoint folder to go on from; no value: the newest complete one in output_dir"}
FURTHER = {"model": "model", "data": "data", "dpo": "DPO"}
PLAIN = {bool: "bool", int: "int", float: "float", str: "str", dict: "dict", type(None): "None"}


def fields_of_dataclasses() -> tuple[Field, ...]:
    """The table, made from the dataclasses as they are installed."""
    table = {}
    for owner, cls in (("model", ModelArguments), ("data", DataArguments), ("dpo", DPOConfig)):
        docs = _attribute_docstrings(cls)
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if not item.init or item.name in LEFT_OUT:
                continue
            if item.name in table:
                raise TypeError(f"{item.name} is a field of {cls.__name__} and of {table[item.name].owner} arguments")
            table[item.name] = _field(item, hints[item.name], owner, docs)
    unknown = [name for names in MAIN.values() for name in names if name not in table]
    if unknown:
        raise TypeError(f"MAIN names {', '.join(unknown)}, which no dataclass has")
    ordered = [table.pop(name) for names in MAIN.values() for name in names]
    return (*ordered, *table.values())


def _field(item: dataclasses.Field, hint: Any, owner: str, docs: dict[str, str]) -> Field:
    name = item.name
    group = next((title for title, names in MAIN.items() if name in names), None)
    default = item.default if item.default is not dataclasses.MISSING else None
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    if isinstance(default, Enum):
        default = default.value
    enum = next((kind for kind in (hint, *typing.get_args(hint)) if _is_enum(kind)), None)
    choices = tuple(member.value for member in enum) if enum else item.metadata.get("choices")
    choices = (*LOSSES, *UNPAIRED_LOSSES) if name == "loss_type" else choices
    text = HELP.get(name) or item.metadata.get("help") or docs.get(name) or ""
    return Field(
        name=name,
        type=TYPES.get(name) or _type_text(hint),
        default=default,
        choices=tuple(choices) if choices else None,
        group=group or (f"{FURTHER[owner]}, further" if name in docs else "inherited from TrainingArguments"),
        help=" ".join(text.replace("`", "").split()) if name in docs else _first_sentence(text),
        owner=owner,
        main=group is not None,
    )


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _type_text(hint: Any) -> str:
    """The alternatives of a type hint, most special first: "bool | int | float | list[str] | dict | str | None"."""
    alternatives = typing.get_args(hint) if _is_union(hint) else (hint,)
    texts = []
    for kind in alternatives:
        origin = typing.get_origin(kind)
        if origin is list:
            item = typing.get_args(kind)[0]
            texts.append(f"list[{PLAIN.get(typing.get_origin(item) or item, 'str')}]")
        elif origin is dict:
            texts.append("dict")
        elif origin is typing.Literal:
            texts.extend("bool" if isinstance(value, bool) else "str" for value in typing.get_args(kind))
        elif _is_enum(kind):
            texts.append("str")
        elif kind in PLAIN:
            texts.append(PLAIN[kind])
        else:
            raise TypeError(f"no text form for the type {kind!r}: name its field in LEFT_OUT or TYPES")
    order = ["bool", "int", "float", "list[str]", "list[int]", "list[float]", "list[dict]", "dict", "str", "None"]
    return " | ".join(sorted(set(texts), key=order.index))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """name -> docstring written under the field; "" for a field of the class's own without one."""
    tree = ast.parse(inspect.getsource(cls).lstrip()).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            docs[node.target.id] = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[node.target.id] = str(following.value.value)
    return docs


def _first_sentence(text: str, limit: int = 160) -> str:
    text = " ".join(re.sub(r"\[?`+([^`]*)`+\]?(\([^)]*\))?", r"\1", text).split())
    sentence = re.split(r"(?<=[a-z0-9)])\. (?=[A-Z`])", text)[0].rstrip(".")
    return sentence if len(sentence) <= limit else sentence[: limit - 4].rsplit(" ", 1)[0] + " ..."


def render(table: tuple[Field, ...]) -> str:
    """The text of fields.py."""
    import transformers

    rows = "\n".join("    Field(" + ", ".join(ascii(value) for value in field) + ")," for field in table)
    return (
        '"""Every argument of `fastdpo train`; made by `python -m fastdpo.cli.train.generate_fields`."""\n\n'
        "# ruff: noqa: E501\n"
        "from fastdpo.cli.train.arguments import Field\n\n"
        f'TRANSFORMERS = "{transformers.__version__}"\n\n'
        "# fmt: off\n"
        f"FIELDS = (\n{rows}\n)\n"
    )


def main() -> int:
    path = Path(__file__).with_name("fields.py")
    table = fields_of_dataclasses()
    path.write_text(render(table), encoding="ascii")
    print(f"{path}: {len(table)} fields")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
