"""Preference losses: pure functions of per-sequence log-probs (nats), one loss per pair.

`LOSSES` is the one list of names; the command line, the table in docs and the tests read it. The same functions serve
log-probs of any origin, fused or not.
"""

from fastdpo.losses.catalogue import LOSSES, Loss
from fastdpo.losses.options import LossOptions
from fastdpo.losses.pairs import PairLogps, PreferenceOutput
from fastdpo.losses.preference import preference_loss
from fastdpo.losses.unpaired import UNPAIRED_LOSSES, UnpairedOptions, UnpairedOutput, kl_shift, unpaired_loss
from fastdpo.losses.weights import ld_mask_weights, ld_token_weights, wpo_pair_weights

__all__ = [
    "LOSSES",
    "Loss",
    "LossOptions",
    "PairLogps",
    "UNPAIRED_LOSSES",
    "PreferenceOutput",
    "UnpairedOptions",
    "UnpairedOutput",
    "kl_shift",
    "ld_mask_weights",
    "ld_token_weights",
    "preference_loss",
    "unpaired_loss",
    "wpo_pair_weights",
]
