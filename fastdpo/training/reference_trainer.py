"""A Trainer with a reference policy: chosen once, precomputed or moved where asked for, kept in checkpoints."""

import logging
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import REFERENCE_COLUMNS
from fastdpo.losses.from_tokens import SequenceLogps
from fastdpo.models.forward import LogprobForward
from fastdpo.training.adapter_trainer import AdapterTrainer
from fastdpo.training.checkpoints import folders
from fastdpo.training.checkpoints.run_facts import DATA, TRAINED, differences, facts_at_start, run_facts
from fastdpo.training.reference.base import NoReference, Reference
from fastdpo.training.reference.precomputed import PrecomputedReference, as_datasets, precompute
from fastdpo.training.reference.synced import SyncCallback, SyncedAdapter, SyncedModel
from fastdpo.training.report.out_of_memory import MemoryWatch

logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel
# what a batch has beside the model's inputs
_NOT_INPUTS = ("rows", "targets", "offsets", "lengths", *REFERENCE_COLUMNS)


class ReferenceTrainer(AdapterTrainer):
    """A subclass makes the model and its log-prob forward, and then calls `_set_reference`.

    Attributes:
        reference_description: one line that says what the reference is.
        reference_origin: the same for a program, see `Reference`.
    """

    args: DPOConfig
    tokenizer: PreTrainedTokenizerBase
    _logprob_forward: LogprobForward
    # of the run as it began
    _at_start: dict[str, Any] | None = None
    _facts: dict[str, Any] | None = None

    def _set_reference(self, reference: Reference) -> None:
        args, policy = self.args, cast(Model, self.model)
        self._memory = MemoryWatch(
            args, lambda: getattr(self.data_collator, "layout", "padded"), lambda: isinstance(policy, PeftModel)
        )
        if isinstance(reference, SyncedModel | SyncedAdapter):
            self.add_callback(SyncCallback(reference, policy))
        if args.precompute_ref_log_probs and not isinstance(reference, NoReference):
            datasets = as_datasets(self.train_dataset, self.eval_dataset)
            reference, datasets = precompute(
                reference,
                policy,
                datasets,
                args,
                self.accelerator,
                self._sums_of_rows,
                self.data_collator,
                self.tokenizer,
            )
            self.train_dataset = datasets.pop("train", None)
            several = isinstance(self.eval_dataset, dict)
            evals = {name.removeprefix("eval-"): dataset for name, dataset in datasets.items()}
            self.eval_dataset = cast(Any, evals if several else evals.get("eval"))
        self._reference = reference
        self.reference_description = reference.description
        self.reference_origin = dict(reference.origin)
        if args.should_log:
            logger.warning(f"reference: {self.reference_description}.")

    def _sums_of_rows(self, reference: Reference, rows: list[dict[str, Any]]) -> tuple[SequenceLogps, Tensor]:
        """The reference's sums over the completions of rows, and their scored tokens, (2B,) each."""
        inputs = cast(dict, self._prepare_inputs(self.data_collator(rows)))
        self._memory.at("precomputing", inputs)
        with self._memory.explained(), self._logprob_forward.installed(), self.accelerator.autocast():
            tokens = cast(Tensor, reference(cast(Model, self.model), model_call(inputs)))
        offsets = inputs["offsets"].to(tokens.device)
        return SequenceLogps.of(tokens, offsets), offsets.diff()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; after it the policy is no starting policy any more."""
        if isinstance(self._reference, PrecomputedReference):
            self._reference.policy_moves()
        # Trainer changes some of them while it trains
        self._facts, self._at_start = None, facts_at_start(self.args.to_dict(), self._plain_model())
        return super().train(*args, **kwargs)

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "run": self._run_facts()}

    def load_extra_state(self, state: dict[str, Any] | None) -> None:
        if state is not None and isinstance(state.get("run"), dict):
            self._compare_runs(state["run"], self._run_facts())
        super().load_extra_state(state)

    def _run_facts(self) -> dict[str, Any]:
        if self._facts is None:
            model = self._plain_model()
            self._facts = run_facts(
                self._at_start or facts_at_start(self.args.to_dict(), model),
                self.args.world_size,
                model,
                self.train_dataset,
                self.eval_dataset,
                self.reference_origin,
            )
        return self._facts

    def _plain_model(self) -> Any:
        return self.accelerator.unwrap_model(cast(Any, self.model), keep_torch_compile=False)

    def _compare_runs(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        other_data = None not in (old.get(DATA), new[DATA]) and old[DATA] != new[DATA]
        if other_data and not self.args.resume_with_other_data:
            raise folders.CheckpointError(
                "cannot resume: the checkpoint's run trained on other rows (their token ids differ, or their order), "
                "so that the steps done and to do would be of two data sets; give the data that it began with, or set "
                "resume_with_other_data."
            )
        if TRAINED in old and old[TRAINED] != new[TRAINED]:
            raise folders.CheckpointError(
                f"cannot resume: the checkpoint's run trained other weights ({old[TRAINED]} where this run has "
                f"{new[TRAINED]}), and an optimizer's state goes by their order; train the same, or start from the "
                "model in the checkpoint without resuming."
            )
        optimizers = [str(facts.get("optim")) for facts in (old, new)]
        if optimizers[0] != optimizers[1] and not all(name.startswith("adamw_torch") for name in optimizers):
            raise folders.CheckpointError(
                f"cannot resume: the checkpoint has the state of optim {optimizers[0]}, and this run has "
                f"{optimizers[1]}; go on with the same, or start from the model in the checkpoint without resuming."
            )
        differ = differences(old, new)
        if self.args.should_log and (differ or other_data):
            data = ["the rows are others"] if other_data else []
            logger.warning(f"resume: this run differs from the checkpoint's: {'; '.join([*data, *differ])}.")

    def save_extra_files(self, folder: Path) -> None:
        folders.save_reference(folder, self._reference.state())

    def extra_file_size(self) -> int:
        return sum(tensor.nbytes for tensor in self._reference.state().values())

    def load_extra_files(self, folder: Path) -> None:
        state = folders.load_reference(folder, wanted=bool(self._reference.state()))
        try:
            self._reference.load_state(state)
        except ValueError as error:
            raise folders.CheckpointError(f"cannot resume from {folder}: {error}.") from error


def model_call(inputs: dict[str, Any]) -> dict[str, Any]:
    call = {name: value for name, value in inputs.items() if name not in _NOT_INPUTS}
    return call | {"logprob_rows": inputs["rows"], "logprob_targets": inputs["targets"]}
