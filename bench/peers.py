"""Who is compared: each entry maps hidden (N, H), weight (V, H), labels (N,) to per-token log-probs (N,)."""

import functools
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

logger = logging.getLogger("fastdpo.bench")

Entry = Callable[[Tensor, Tensor, Tensor], Tensor]


def fastdpo_entry(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from fastdpo import linear_logprob

    return linear_logprob(hidden, weight, labels)


def eager_entry(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """matmul, log_softmax, gather: what a plain loop does, in the operands' dtype up to the logits."""
    logits = hidden @ weight.t()
    return torch.log_softmax(logits.float(), -1).gather(1, labels[:, None])[:, 0]


def trl_entry() -> Entry:
    """TRL's chunked op with its own chunk size; on a CPU it folds its tiles in eager torch."""
    from trl.trainer import utils

    function = getattr(utils, "_ChunkedLogProbFunction")  # noqa: B009  the name that its trainers use
    chunk = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE")  # noqa: B009

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, ())[0]

    return run


@functools.cache
def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def entries() -> dict[str, tuple[Entry, str]]:
    """name -> (entry, version); peers that are not installed are named in the log and left out."""
    found: dict[str, tuple[Entry, str]] = {
        "fastdpo": (fastdpo_entry, _own_version()),
        "eager": (eager_entry, f"torch {torch.__version__}"),
    }
    trl = installed("trl")
    if trl is None:
        logger.warning("trl is not installed: left out (pip install trl)")
    else:
        try:
            found["trl"] = (trl_entry(), f"trl {trl}")
        except AttributeError as reason:
            logger.warning("trl %s has no chunked log-prob op (1.16 has it): left out (%s)", trl, reason)
    return found


def _own_version() -> str:
    import fastdpo

    return f"fastdpo {fastdpo.__version__}"
