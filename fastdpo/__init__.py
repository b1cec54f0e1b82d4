"""fastdpo: exact, memory-bounded log-probabilities from hidden states, and DPO on top of them.

Every name is imported when it is first used, so that `import fastdpo` stays cheap and a command's
`--help` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdpo.versions import __version__

_HOME = {
    "linear_logprob": "fastdpo.ops.linear_logprob.api",
    "linear_logprob_stats": "fastdpo.ops.linear_logprob.api",
    "TokenStats": "fastdpo.ops.linear_logprob.api",
    "logprob": "fastdpo.ops.logprob",
    "sequence_logprob": "fastdpo.ops.sequence",
    "segment_sum": "fastdpo.ops.sequence",
    "PairLogps": "fastdpo.losses",
    "PreferenceOutput": "fastdpo.losses",
    "LOSSES": "fastdpo.losses",
    "LossOptions": "fastdpo.losses",
    "preference_loss": "fastdpo.losses",
    "DPOLoss": "fastdpo.losses.modules",
    "FusedLinearDPOLoss": "fastdpo.losses.modules",
    "patch_trl": "fastdpo.integrations.trl",
    "DPOConfig": "fastdpo.config.dpo_config",
    "DPOTrainer": "fastdpo.training.trainer",
    "DataCollatorForPreference": "fastdpo.data.collate",
}

__all__ = [
    "__version__",
    "linear_logprob",
    "linear_logprob_stats",
    "TokenStats",
    "logprob",
    "sequence_logprob",
    "segment_sum",
    "PairLogps",
    "PreferenceOutput",
    "LOSSES",
    "LossOptions",
    "preference_loss",
    "DPOLoss",
    "FusedLinearDPOLoss",
    "patch_trl",
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForPreference",
]

if TYPE_CHECKING:
    from fastdpo.config.dpo_config import DPOConfig
    from fastdpo.data.collate import DataCollatorForPreference
    from fastdpo.integrations.trl import patch_trl
    from fastdpo.losses import LOSSES, LossOptions, PairLogps, PreferenceOutput, preference_loss
    from fastdpo.losses.modules import DPOLoss, FusedLinearDPOLoss
    from fastdpo.ops.linear_logprob.api import TokenStats, linear_logprob, linear_logprob_stats
    from fastdpo.ops.logprob import logprob
    from fastdpo.ops.sequence import segment_sum, sequence_logprob
    from fastdpo.training.trainer import DPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
