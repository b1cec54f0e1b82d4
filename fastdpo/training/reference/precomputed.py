"""The precomputed reference: log-probs that come with the batches."""

import gc
import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import KL_BATCH, REFERENCE_COLUMNS, UNPAIRED_REFERENCE_COLUMNS
from fastdpo.losses.from_tokens import SequenceLogps
from fastdpo.models.forward import model_call
from fastdpo.models.load import on_device
from fastdpo.ops.sequence import segment_sum
from fastdpo.training.pair_datasets import by_name
from fastdpo.training.reference.base import FrozenModel, Reference
from fastdpo.training.reference.fingerprints import reference_settings
from fastdpo.training.reference.inside_policy import StartingPolicy
from fastdpo.training.reference.logp_store import Pass, with_reference_logps

logger = logging.getLogger(__name__)

SUMS, TAILS = REFERENCE_COLUMNS[:2], REFERENCE_COLUMNS[2:]
Datasets = dict[str, Dataset]


def sum_columns(args: DPOConfig) -> tuple[str, ...]:
    """The columns of the reference's sums that a run reads: of pairs, or of single answers, for KTO under the prompts
    of others too."""
    if not args.unpaired:
        return SUMS
    return UNPAIRED_REFERENCE_COLUMNS if args.estimates_kl else UNPAIRED_REFERENCE_COLUMNS[:1]


class PrecomputedReference(Reference):
    """Log-probs that the batches bring along; `source` answers batches that bring none, as long as it exists."""

    def __init__(
        self, description: str, source: Reference | None, origin: Mapping[str, Any], columns: tuple[str, ...] = SUMS
    ) -> None:
        self.description, self.columns = description, columns
        self.source = source
        self.origin = origin
        self._said = False

    def __call__(self, policy: nn.Module, inputs: dict[str, Tensor]) -> Tensor | None:
        if self.source is None:
            raise ValueError(
                "a batch has no precomputed reference log-probs, and the reference that they come from is not in "
                "memory any more; give the dataset to the trainer as eval_dataset, keep the columns "
                f"{' and '.join(self.columns)} in a data collator of your own, or leave precompute_ref_log_probs out."
            )
        if not self._said:
            self._said = True
            logger.warning(f"batches without precomputed log-probs: the reference is run ({self.source.description}).")
        return self.source(policy, inputs)

    def policy_moves(self) -> None:
        if isinstance(self.source, StartingPolicy):
            self.source = None


def stored_logps(batch: Mapping[str, Tensor]) -> SequenceLogps | None:
    """The reference's sums in a batch; None where it has none. Tails are 0 where only the sums were given."""
    if not all(name in batch for name in SUMS):
        return None
    total = torch.cat([batch[name] for name in SUMS])
    if not all(name in batch for name in TAILS):
        return SequenceLogps(total, torch.zeros_like(total))
    return SequenceLogps(total, torch.cat([batch[name] for name in TAILS]))


def precompute(
    reference: Reference,
    policy: nn.Module,
    datasets: Datasets,
    args: DPOConfig,
    accelerator: Accelerator,
    logps: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    collator: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PrecomputedReference, Datasets]:
    """The reference without its model, and the datasets ("train", "eval", "eval-a", ...) with its log-probs.

    logps: rows -> the reference's columns, and the lengths of the completions (see `columns_of_rows`). Datasets that
    have log-probs in their columns already (`ref_chosen_logps`, `ref_rejected_logps`) keep them; all or none must.

    Raises:
        ValueError, StaleLogpsError: one sentence, see `given_logps` and `with_reference_logps`.
    """
    sums = sum_columns(args)
    if given_logps(datasets, args):
        description = f"log-probs given with the dataset ({', '.join(sums)})"
        return PrecomputedReference(description, None, {"kind": "columns"}, sums), datasets
    root = Path(args.precompute_ref_dir or Path(str(args.output_dir), "ref_logps"))
    own = type(collator)
    settings = {
        **reference_settings(reference, policy),
        "max_length": getattr(collator, "max_length", args.max_length),
        "truncation_mode": getattr(collator, "truncation_mode", args.truncation_mode),
        "collator": f"{own.__module__}.{own.__qualname__}",
        "autocast": accelerator.mixed_precision,
    }
    template = tokenizer.chat_template
    notes = {
        "reference": reference.description,
        "tokenizer": tokenizer.name_or_path,
        "chat_template": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
    }
    done = {}
    for name, dataset in datasets.items():
        usual = args.per_device_train_batch_size if name == "train" else args.per_device_eval_batch_size
        work = Pass(
            logps=logps,
            columns=sums if args.unpaired else REFERENCE_COLUMNS,
            lengths=_LENGTHS[-1:] if args.unpaired else _LENGTHS[:-1],
            settings=settings,
            notes=notes,
            batch_size=args.precompute_ref_batch_size or usual,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
            quiet=bool(args.disable_tqdm),
        )
        with on_device(policy, args.device):
            done[name] = with_reference_logps(dataset, root / _folder_name(name), work)
    description = f"log-probs precomputed in {root} from {reference.description}"
    source = None if isinstance(reference, FrozenModel) else reference
    return PrecomputedReference(description, source, {**reference.origin, "precomputed": str(root)}, sums), done


def given_logps(datasets: Datasets, args: DPOConfig) -> bool:
    """Whether the datasets have reference log-probs in their columns.

    Raises:
        ValueError: some have and some have not; one is no finite number; LD-DPO, which needs their tails too.
    """
    sums = sum_columns(args)
    having = [name for name, dataset in datasets.items() if set(sums) <= set(dataset.column_names)]
    if not having:
        return False
    lacking = sorted(datasets.keys() - having)
    if lacking:
        raise ValueError(
            f"{having[0]} has reference log-probs in its columns and {lacking[0]} has none; give both or neither."
        )
    for name in having:
        dataset = datasets[name]
        if args.ld_alpha is not None and not set(TAILS) <= set(dataset.column_names):
            raise ValueError(
                f"ld_alpha (LD-DPO) weighs tokens of the reference too, and {name} has sums only ({', '.join(SUMS)}); "
                "remove these columns, so that they are computed here."
            )
        for column in sums if args.ld_alpha is None else REFERENCE_COLUMNS:
            values = np.asarray(dataset.with_format("numpy")[column][:], dtype=object)
            bad = [row for row, value in enumerate(values) if value is None or not np.isfinite(float(value))]
            if bad:
                raise ValueError(f"{name}[{bad[0]}].{column} is {values[bad[0]]}; wanted a finite log-prob.")
    return True


def _folder_name(name: str) -> str:
    plain = re.sub(r"[^\w.-]", "_", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def free_memory() -> None:
    """Give back what a reference model occupied that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def precompute_for(trainer: Any, reference: Reference, policy: nn.Module) -> PrecomputedReference:
    """The reference's log-probs become columns of a `DPOTrainer`'s datasets, and its model goes."""
    several = isinstance(trainer.eval_dataset, dict)
    precomputed, datasets = precompute(
        reference,
        policy,
        by_name(trainer.train_dataset, trainer.eval_dataset),
        trainer.args,
        trainer.accelerator,
        lambda rows: columns_of_rows(trainer, reference, rows),
        trainer.data_collator,
        trainer.tokenizer,
    )
    trainer.train_dataset = datasets.pop("train", None)
    evals = {name.removeprefix("eval-"): dataset for name, dataset in datasets.items()}
    trainer.eval_dataset = evals if several else evals.get("eval")
    return precomputed


# the scored tokens of completions: of pairs, and of single answers
_LENGTHS = ("chosen_tokens", "rejected_tokens", "completion_tokens")


def columns_of_rows(trainer: Any, reference: Reference, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The reference's log-probs over the completions of B rows, and their scored tokens, (B,) each by name."""
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer._memory.at("precomputing", inputs, trainer.data_collator)

    def run(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        tokens = cast(Tensor, reference(trainer.model, model_call(batch)))
        return tokens, batch["offsets"].to(tokens.device)

    with trainer._memory.explained(), trainer._logprob_forward.installed(), trainer.accelerator.autocast():
        if not trainer.args.unpaired:
            tokens, offsets = run(inputs)
            halves = [
                half for values in (*SequenceLogps.of(tokens, offsets), offsets.diff()) for half in values.chunk(2)
            ]
            return dict(zip((*REFERENCE_COLUMNS, *_LENGTHS[:2]), halves, strict=True))
        columns = {}
        for name, batch in zip(sum_columns(trainer.args), (inputs, inputs.get(KL_BATCH)), strict=False):
            tokens, offsets = run(batch)
            columns[name] = segment_sum(tokens, offsets)
            columns.setdefault(_LENGTHS[2], offsets.diff())
        return columns
