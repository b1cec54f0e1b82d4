"""What a run trains with, as plain JSON: kept in its checkpoints, and compared where one of them is resumed."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import PeftModel

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.adapters import trained_adapter
from fastdpo.training.checkpoints.folders import CheckpointError
from fastdpo.training.reference.fingerprints import data_hash

logger = logging.getLogger(__name__)

# what activation checkpointing, FSDP and torch.compile put into a parameter's name
_WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
DATA, TRAINED = "data", "trained weights"
# arguments that change nothing of what is trained: where and how a run is looked after, and how it is resumed
_NOT_COMPARED = {
    *("output_dir", "logging_dir", "run_name", "project", "trackio_space_id", "report_to", "disable_tqdm"),
    *("log_level", "log_level_replica", "log_on_each_node", "local_rank", "ddp_timeout", "precompute_ref_dir"),
    *("resume_from_checkpoint", "resume_with_other_data", "on_nan", "metric_files", "skip_memory_metrics"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_revision"),
    *("hub_always_push", "do_train", "do_eval", "do_predict", "dataset_num_proc"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor",),
}


class RunFacts:
    """The facts of this run, as a `Part` of its checkpoints.

    model: the policy, not wrapped. reference: what it is, for a program (`Reference.origin`).
    """

    def __init__(self, model: Any, reference: Mapping[str, Any]) -> None:
        self.model, self.reference = model, reference

    def begin(self, args: DPOConfig, train_dataset: Any, eval_dataset: Any) -> None:
        """Training begins: with these, as Trainer takes them, and as they are before Trainer changes the arguments."""
        self.args, self.train_dataset, self.eval_dataset = args, train_dataset, eval_dataset
        self._at_start = facts_at_start(args.to_dict(), self.model)
        self._facts: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        if self._facts is None:  # hashes of all rows, so not before a checkpoint is written or read
            self._facts = run_facts(
                self._at_start, self.args.world_size, self.model, self.train_dataset, self.eval_dataset, self.reference
            )
        return self._facts

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.facts()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Raises CheckpointError where the checkpoint's run cannot go on as this one; other differences are logged."""
        if state is not None and isinstance(state.get("run"), dict):
            self._compare(state["run"], self.facts())

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        other_data = None not in (old.get(DATA), new[DATA]) and old[DATA] != new[DATA]
        if other_data and not self.args.resume_with_other_data:
            raise CheckpointError(
                "cannot resume: the checkpoint's run trained on other rows (their token ids differ, or their order), "
                "so that the steps done and to do would be of two data sets; give the data that it began with, or set "
                "resume_with_other_data."
            )
        if TRAINED in old and old[TRAINED] != new[TRAINED]:
            raise CheckpointError(
                f"cannot resume: the checkpoint's run trained other weights ({old[TRAINED]} where this run has "
                f"{new[TRAINED]}), and an optimizer's state goes by their order; train the same, or start from the "
                "model in the checkpoint without resuming."
            )
        optimizers = [str(facts.get("optim")) for facts in (old, new)]
        if optimizers[0] != optimizers[1] and not all(name.startswith("adamw_torch") for name in optimizers):
            raise CheckpointError(
                f"cannot resume: the checkpoint has the state of optim {optimizers[0]}, and this run has "
                f"{optimizers[1]}; go on with the same, or start from the model in the checkpoint without resuming."
            )
        differ = differences(old, new)
        if self.args.should_log and (differ or other_data):
            data = ["the rows are others"] if other_data else []
            logger.warning(f"resume: this run differs from the checkpoint's: {'; '.join([*data, *differ])}.")


def facts_at_start(arguments: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """What Trainer and its engines may change while they train: arguments, the model's name, dtypes, trained weights.

    arguments: `TrainingArguments.to_dict()`.
    """
    facts = {name: value for name, value in arguments.items() if name not in _NOT_COMPARED}
    # where it was loaded from; an adapter's is its base model's
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    facts["model"] = base.name_or_path or type(base).__name__
    facts["dtypes"] = sorted({str(p.dtype).removeprefix("torch.") for p in base.parameters()})
    names = [_WRAPPERS.sub("", name) for name, p in model.named_parameters() if p.requires_grad]
    facts[TRAINED] = f"{len(names)} tensors ({hashlib.sha256(repr(names).encode()).hexdigest()[:12]})"
    return facts


def run_facts(
    started: Mapping[str, Any],
    processes: int,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    reference: Mapping[str, Any],
) -> dict[str, Any]:
    """Every argument, and model, adapter, reference, processes, what is trained, and hashes of the data, by name.

    started: `facts_at_start`. reference: what it is, for a program (`Reference.origin`). The hash is of token ids, in
    order; None for a stream.
    """
    facts = {**started, "processes": processes}
    for name, value in reference.items():
        if name != "precomputed":  # a folder
            facts[f"reference {name}"] = value
    if isinstance(model, PeftModel):
        config = model.peft_config[trained_adapter(model)].to_dict()
        # where it was loaded from, and what does nothing once it is there
        own = ("base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_version", "revision")
        facts |= {f"adapter {name}": value for name, value in config.items() if name not in own}
    facts[DATA] = data_hash(train_dataset) if isinstance(train_dataset, Dataset) else None
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    for name, dataset in evals.items():
        if isinstance(dataset, Dataset):
            facts[f"evaluation data {name}".rstrip()] = data_hash(dataset)[:12]
    return json.loads(json.dumps(facts, sort_keys=True, default=_plain))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name was ... and is ...` for each fact that both runs have and that differs, the data left out."""
    both = sorted(name for name in old.keys() & new.keys() if name != DATA)
    return [f"{name} was {_short(old[name])} and is {_short(new[name])}" for name in both if old[name] != new[name]]


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
