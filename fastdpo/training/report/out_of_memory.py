"""What to change where memory runs out: the shapes of the batch at work, and the arguments that make it smaller."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.wording import count

# where the sentence is found on the error
SENTENCE = "fastdpo_sentence"
# of a RuntimeError: CUDA, MPS, XPU; the CPU's allocator, twice; cuBLAS; accelerate, whose smallest batch did not fit
_MESSAGES = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "No executable batch size found",
)
# work on a batch, and what else may be going on
_BATCHES = {
    "training": "a training batch",
    "evaluation": "an evaluation batch",
    "precomputing": "a batch of the reference's log-probs",
}
_ELSEWHERE = {
    "start": "before the first step",
    "update": "in the optimizer's step",
    "rest": "between two steps",
}
# what is read of a batch
_SHAPES = ("input_ids", "offsets", "lengths", "attention_mask", "label")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the device's or the host's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def explains_loading(init: Callable[..., None]) -> Callable[..., None]:
    """For a trainer's constructor: the same for memory that runs out before there is any batch."""

    @functools.wraps(init)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            init(*args, **kwargs)
        except Exception as error:
            _explain(error, lambda error: f"{_out_of_memory(error)} {_LOADING}")
            raise

    return call


_LOADING = (
    "while model and reference are loaded: train an adapter in place of all weights (peft_config, --use_peft), "
    "quantize the model under it (quantization_config, --load_in_4bit), or drop the reference with "
    "precompute_ref_log_probs=True"
)


def _out_of_memory(error: BaseException) -> str:
    size = re.search(r"tried to allocate ([\d.,]+ \w+)", str(error), re.IGNORECASE)
    return f"out of memory (tried to allocate {size[1]})" if size else "out of memory"


def _explain(error: Exception, sentence: Callable[[Exception], str]) -> None:
    if not is_out_of_memory(error) or hasattr(error, SENTENCE):
        return
    text = sentence(error)
    setattr(error, SENTENCE, text)
    if hasattr(error, "add_note"):
        error.add_note(text)  # pyright: ignore[reportAttributeAccessIssue] from Python 3.11 on
    else:
        error.args = ("\n".join([*map(str, error.args), text]),)


class MemoryWatch:
    """Knows which batch is at work, and says it where memory runs out.

    adapter: whether only an adapter is trained.
    """

    def __init__(self, args: DPOConfig, adapter: bool) -> None:
        self.args, self.adapter = args, adapter
        self._work = "start"
        self._batch: Mapping[str, Any] = {}

    def at(self, work: str, batch: Mapping[str, Any], collator: Any) -> None:
        """`work` ("training", "evaluation" or "precomputing") on a batch begins. Neither copies nor waits.

        collator: made the batch.
        """
        self._layout = getattr(collator, "layout", "padded")
        self._work, self._batch = work, {name: batch[name] for name in _SHAPES if name in batch}

    def at_rest(self) -> None:
        """Between two steps: metrics, checkpoints."""
        self._work = "rest"

    def at_update(self) -> None:
        """The gradients are there: clipping, the optimizer's step."""
        self._work = "update"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of memory gets the sentence as a note, in Python 3.10 at the end of its message; and as `SENTENCE`.

        It stays the error that it is, for whoever catches it.
        """
        try:
            yield
        except Exception as error:
            _explain(error, self.sentence)
            raise

    def sentence(self, error: BaseException) -> str:
        """What was computed when memory ran out, and what needs less."""
        where = _out_of_memory(error)
        less = [] if self.adapter else ["an adapter in place of all weights (peft_config, --use_peft)"]
        if self._work not in _BATCHES:
            less.append("optim='sgd'" if "adafactor" in str(self.args.optim) else "optim='adafactor'")
            return f"{where} {_ELSEWHERE[self._work]}: {' or '.join(less)} needs less"
        half = self._halving()[:2]
        fixes = [f"{' or '.join(half)} about halves that"] if half else []
        if len(half) < 2 and less:
            fixes.append(f"{less[0]} needs less")
        return f"{where} in {_BATCHES[self._work]} of {self._shapes()}: {'; '.join(fixes)}"

    def _shapes(self) -> str:
        """`4 pairs (8 sequences, the longest of 512 tokens; layout padded: 8 x 512 tokens)`."""
        pairs, longest, noun = self._pairs(), self._longest(), self.args.rows_are[:-1]
        rows = " x ".join(f"{size:,}" for size in self._batch["input_ids"].shape)
        return (
            f"{count(pairs, noun)} ({len(self._batch['offsets']) - 1:,} sequences, the longest of {longest:,} tokens; "
            f"layout {self._layout}: {rows} tokens)"
        )

    def _pairs(self) -> int:
        return (len(self._batch["offsets"]) - 1) // (1 if "label" in self._batch else 2)

    def _longest(self) -> int:
        lengths: Tensor = self._batch["lengths"] if "lengths" in self._batch else self._batch["attention_mask"]
        lengths = lengths.cpu()  # the device has no room
        return int((lengths if lengths.dim() == 1 else lengths.sum(1)).max())

    def _halving(self) -> list[str]:
        """Arguments that about halve a batch's memory, those that change the training least first."""
        args, several, fixes = self.args, self._pairs() > 1, list[str]()
        if self._work != "training":
            name = "per_device_eval_batch_size" if self._work == "evaluation" else "precompute_ref_batch_size"
            fixes += [f"{name}={_halved(self._pairs())[0]}"] if several else []
        else:
            fixes += [] if args.gradient_checkpointing else ["gradient_checkpointing=True"]
            if several and args.max_tokens_per_batch is not None:
                fixes.append(f"max_tokens_per_batch={max(args.max_tokens_per_batch // 2, 2)}")
            elif several:
                size, parts = _halved(args.per_device_train_batch_size)
                accumulated = args.gradient_accumulation_steps * parts
                fixes.append(f"per_device_train_batch_size={size} with gradient_accumulation_steps={accumulated}")
        longest = self._longest()
        return [*fixes, f"max_length={longest // 2}"] if longest > 3 else fixes


def _halved(size: int) -> tuple[int, int]:
    """The largest divisor of at most half of it, and how many of those make it up."""
    if size <= 1:
        return 1, 1
    best = next(part for part in range(size // 2, 0, -1) if size % part == 0)
    return best, size // best
