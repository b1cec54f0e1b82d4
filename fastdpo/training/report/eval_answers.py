"""`generate_during_eval`: what policy and reference answer to a few held-out prompts, at each evaluation."""

import json
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastdpo.models.adapters import evaluating, find_peft
from fastdpo.models.generate import generate_answer
from fastdpo.training.reference.base import FrozenModel, Reference
from fastdpo.training.reference.inside_policy import AdapterOff, OtherAdapter
from fastdpo.training.report.metric_files import FOLDER
from fastdpo.training.report.patient_files import PatientFiles

logger = logging.getLogger(__name__)

NAME = "answers.jsonl"
NEW_TOKENS = 128


def answers_of(trainer: Any, files: PatientFiles, sharded: bool) -> "list[EvaluationAnswers]":
    """The callback of a `DPOTrainer` whose arguments ask for answers. sharded: no process holds whole weights."""
    if not trainer.args.generate_during_eval:
        return []
    evals = trainer.eval_dataset
    dataset = next(iter(evals.values())) if isinstance(evals, dict) else evals
    if not isinstance(dataset, Dataset) or sharded:
        why = "FSDP and DeepSpeed split the weights" if sharded else "there is no whole eval_dataset"
        logger.warning(f"generate_during_eval is not used: {why}.")
        return []
    return [EvaluationAnswers(trainer.model, trainer.tokenizer, dataset, trainer._reference, files)]


class EvaluationAnswers(TrainerCallback):
    """Writes <output_dir>/dpo_metrics/answers.jsonl: "step", "prompt", "policy" and, where it can generate,
    "reference", for the first `per_device_eval_batch_size` prompts of the (first) evaluation set.

    Answers are greedy, of at most 128 tokens. TRL up to 0.28 sampled them and sent them to a tracker.
    """

    def __init__(
        self,
        policy: Any,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        reference: Reference,
        files: PatientFiles,
    ) -> None:
        self.policy, self.tokenizer, self.dataset, self.files = policy, tokenizer, dataset, files
        self.reference = _generating(policy, reference)
        if self.reference is None:
            logger.warning(f"generate_during_eval: the policy alone answers, the reference is {reference.description}.")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        prompts = self.dataset.select(range(min(args.per_device_eval_batch_size, len(self.dataset))))["prompt_ids"]
        rows = [self._answers(list(prompt), state.global_step) for prompt in prompts]
        path = Path(args.output_dir, FOLDER, NAME)
        # of a resumed run what came after its checkpoint is written again
        kept = [line for line in (self.files.read(path) or "").splitlines() if _step(line) < state.global_step]
        lines = [*kept, *(json.dumps(row, ensure_ascii=False) for row in rows)]
        self.files.write(path, "".join(f"{line}\n" for line in lines))

    def _answers(self, prompt: list[int], step: int) -> dict[str, Any]:
        row: dict[str, Any] = {"step": step, "prompt": self.tokenizer.decode(prompt)}
        devices = [self.policy.device] if self.policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices), evaluating(self.policy):
            row["policy"] = self._text(self.policy, prompt)
            if self.reference is not None:
                model, switched = self.reference
                with switched():
                    row["reference"] = self._text(model, prompt)
        return row

    def _text(self, model: Any, prompt: list[int]) -> str:
        answer = generate_answer(model, self.tokenizer, prompt, NEW_TOKENS, temperature=0.0, seed=0)
        return cast(str, self.tokenizer.decode(answer, skip_special_tokens=True))


def _generating(policy: Any, reference: Reference) -> tuple[Any, Callable[[], AbstractContextManager[Any]]] | None:
    """The model that answers for a reference, and the context in which it does; None where there is none."""
    if isinstance(reference, FrozenModel):
        return reference.model, nullcontext
    if isinstance(reference, AdapterOff | OtherAdapter):
        return policy, lambda: cast(Any, reference).switch(find_peft(policy))
    return None


def _step(line: str) -> float:
    """The step of a line that an earlier run wrote; of one that cannot be read infinity: it goes."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
