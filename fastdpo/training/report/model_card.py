"""The README.md of a trained model or adapter: what it was made from, how, and what it reached."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftModel

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.escaping import markdown_code, markdown_fence, markdown_text
from fastdpo.files import write_atomic
from fastdpo.losses import UNPAIRED_LOSSES, LossOptions, UnpairedOptions
from fastdpo.models.adapters import trained_adapter
from fastdpo.versions import installed_versions

logger = logging.getLogger(__name__)

METRICS = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "kl",
    "delta",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "length/chosen",
    "length/rejected",
)
_TITLE = "<!-- written by fastdpo -->"
# cards that are written anew: ours, PEFT's empty form, transformers' draft
_GENERATED = (_TITLE, "# Model Card for Model ID", "model card has been generated automatically according to")


@dataclass(frozen=True)
class Card:
    """What a card says. base, data: as they were named; the front matter has them where they look like hub names.

    logs: the trainer's log history. extra: more entries of the front matter (language, license, ...).
    """

    name: str
    is_adapter: bool
    base: str | None
    data: Sequence[str]
    pairs: int | None
    reference: str
    args: DPOConfig
    steps: int
    logs: Sequence[Mapping[str, Any]]
    command: str | None = None
    tags: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The whole file: front matter, then Markdown."""
        matter = ModelCardData(
            **{
                "library_name": "peft" if self.is_adapter else "transformers",
                "base_model": self.base if self.base and on_hub(self.base) else None,
                "datasets": [name for name in self.data if "/" in name and on_hub(name)] or None,
                "model_name": self.name,
                "pipeline_tag": "text-generation",
                "tags": list(
                    dict.fromkeys([_tag(self.args), "fastdpo", *(["lora"] if self.is_adapter else []), *self.tags])
                ),
                **self.extra,
            }
        )
        base = markdown_code(self.base) if self.base else "a model given in Python"
        what = f"An adapter for {base}" if self.is_adapter else f"{base} fine-tuned"
        parts = [
            f"---\n{matter.to_yaml()}\n---\n{_TITLE}\n",
            f"# {markdown_text(self.name)}\n",
            f"{what[0].upper()}{what[1:]}, trained on {_method(self.args)} by fastdpo.\n",
            markdown_fence(
                "from transformers import pipeline\n\ngenerator = pipeline("
                f'"text-generation", model={json.dumps(self.args.hub_model_id or self.args.output_dir)})',
                "python",
            )
            + "\n",
            "## Training\n",
            _table(["", ""], [[name, value] for name, value in self._settings().items()]),
            *self._metrics(),
            *([f"## Command\n\n{markdown_fence(self.command)}\n"] if self.command else []),
            "## Versions\n",
            ", ".join(f"{name} {version}" for name, version in installed_versions().items()) + "\n",
        ]
        return "\n".join(parts)

    def _settings(self) -> dict[str, str]:
        args = self.args
        weights = args.loss_weights or [1.0] * len(args.loss_type)
        losses = [f"{w:g} x {name}" if w != 1 else name for name, w in zip(args.loss_type, weights, strict=True)]
        plain = {option.name: option.default for kind in (LossOptions, UnpairedOptions) for option in fields(kind)}
        shown = ("loss_type", "loss_weights", "beta")
        others = {name: getattr(args, name) for name, default in plain.items() if name not in shown}
        parts = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        return {
            "data": ", ".join(self.data) or "given in Python",
            **({} if self.pairs is None else {args.rows_are: f"{self.pairs:,}"}),
            "loss": " + ".join(losses),
            "beta": f"{args.beta:g}",
            **{name: f"{value}" for name, value in others.items() if value != plain[name]},
            "reference": self.reference,
            "steps": f"{self.steps:,}",
            f"{args.rows_are} a step": "{} ({} x {} accumulated x {} processes)".format(math.prod(parts), *parts),
            "learning rate": f"{args.learning_rate:g}, {schedule}",
            "max_length": f"{args.max_length}",
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "seed": f"{args.seed}",
        }

    def _metrics(self) -> list[str]:
        """The last training log and the last evaluation, as far as there are any."""
        columns = {}
        for heading, prefix in (("training", ""), ("evaluation", "eval_")):
            last = next((log for log in reversed(self.logs) if f"{prefix}loss" in log), None)
            if last is not None:
                columns[f"{heading}, step {last['step']}"] = {name: last.get(prefix + name) for name in METRICS}
        rows = [[name, *(_number(column[name]) for column in columns.values())] for name in METRICS]
        rows = [row for row in rows if any(row[1:])]
        return ["## Metrics\n", _table(["", *columns], rows)] if rows else []


def card_of(
    trainer: Any,
    name: str | None = None,
    data: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    *,
    language: str | None = None,
    license: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> Card:
    """What a `DPOTrainer` trained; the other arguments go before what it knows.

    tasks: names the pipeline. dataset, dataset_tags: as `data`. dataset_args: not used.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter, details, rows = isinstance(model, PeftModel), trainer.card_details, trainer.train_dataset
    origin = model.peft_config[trained_adapter(model)].base_model_name_or_path if adapter else model.name_or_path
    pipeline = (_listed(tasks) or ["text-generation"])[0]
    entries = {"language": language, "license": license, "pipeline_tag": pipeline}
    return Card(
        name=name or Path(trainer.args.hub_model_id or str(trainer.args.output_dir)).resolve().name,
        is_adapter=adapter,
        base=finetuned_from or origin or details.get("base"),
        data=_listed(data or dataset or dataset_tags) or details.get("data") or hub_names(rows),
        pairs=len(rows) if hasattr(rows, "__len__") else None,
        reference=trainer.reference_description,
        args=trainer.args,
        steps=trainer.state.global_step,
        logs=trainer.state.log_history,
        command=details.get("command"),
        tags=_listed(tags),
        extra={name: value for name, value in entries.items() if value is not None},
    )


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def write_card(folder: str, text: str) -> bool:
    """Write README.md into `folder`, unless there is one that somebody wrote by hand; whether it was written."""
    path = Path(folder) / "README.md"
    if path.is_file() and not any(mark in path.read_text(encoding="utf-8", errors="replace") for mark in _GENERATED):
        logger.warning(f"{path} is not a generated model card, so it is left as it is.")
        return False
    write_atomic(path, text)
    return True


def on_hub(name: str) -> bool:
    """Whether it looks like a name on the hub and not like a path; the hub refuses cards with others."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()


def hub_names(dataset: Any) -> list[str]:
    """The names of the hub datasets that a Dataset was downloaded from."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    matches = (re.match(r"hf://datasets/([^@]+)@", source) for source in sources)
    return list(dict.fromkeys(match[1] for match in matches if match))


def _tag(args: DPOConfig) -> str:
    return args.loss_type[0] if args.unpaired else "dpo"


def _method(args: DPOConfig) -> str:
    """What it was trained on and with, with the paper."""
    if args.unpaired:
        rows, name, paper = "answers with a label", args.loss_type[0].upper(), UNPAIRED_LOSSES[args.loss_type[0]].paper
    else:
        rows, name, paper = "preference pairs", "Direct Preference Optimization", "arXiv:2305.18290"
    return f"{rows} with {name} ([{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')}))"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = (list(map(markdown_text, line)) if line is not lines[1] else line for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"
