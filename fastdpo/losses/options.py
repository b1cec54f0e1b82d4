"""The options of a preference loss, checked once."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fastdpo.losses.catalogue import ALIASES, EXO_SMOOTHING, LOSSES, Loss
from fastdpo.losses.divergences import F_DIVERGENCES, FDivergence
from fastdpo.wording import LOSSES_ELSEWHERE, closest

logger = logging.getLogger(__name__)

AGGREGATES = ("sum", "mean")


def canonical_name(name: str) -> str:
    """The name in `LOSSES`, for an older one too.

    Raises:
        ValueError: unknown name; the message lists the names and the closest one.
    """
    name = ALIASES.get(name, name)
    if name in LOSSES:
        return name
    near = closest(str(name), LOSSES)
    hint = f" Did you mean {near!r}?" if near else ""
    if str(name).lower() in LOSSES_ELSEWHERE:
        hint = f" Here it is {LOSSES_ELSEWHERE[str(name).lower()]}."
    raise ValueError(f"unknown loss {name!r}; choose from {', '.join(LOSSES)}.{hint}")


@dataclass(frozen=True)
class LossOptions:
    """What is minimized. The names are those of TRL and LLaMA-Factory.

    Attributes:
        loss_type: a name in `LOSSES`, or several, which are added with `loss_weights` (MPO, arXiv:2411.10442).
        beta: strength of the pull to the reference, > 0; as it goes to 0 the reference is ignored. `ipo`: the paper's
            tau; `orpo`: its lambda.
        label_smoothing: probability that a label is flipped, in [0, 0.5), for the losses that have it.
        loss_weights: one for each loss, >= 0; 1 each by default.
        f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence (arXiv:2309.16240).
        f_alpha_divergence_coef: alpha of the latter; 1 is reverse_kl.
        discopop_tau: temperature of `discopop`'s modulation, > 0.
        simpo_gamma: target margin of `simpo`, >= 0.
        cpo_alpha: weight of `cpo`'s likelihood term, >= 0.
        rpo_alpha: weight of an added NLL of the chosen completions, a mean over the tokens of the micro-batch (RPO,
            arXiv:2404.19733, as in TRL 0.10 to 0.28; the same as a loss "sft" of that weight).
        pref_ftx: weight of an added NLL that is averaged over each completion first (LLaMA-Factory's).
        use_weighting: WPO (arXiv:2406.11827, eq. 2): pairs count by their probability under the policy; not with `aot`.
        ld_alpha: LD-DPO (arXiv:2409.06411): the weight in [0, 1] of the tokens beyond the shorter completion's length.
        reference_free: take the reference's log-probs as 0.
        aggregate: "sum" of a completion's log-probs, or their "mean".

    Raises:
        ValueError: one sentence: an unknown name, a number outside its range, label smoothing for a loss that has
            none, an f-divergence or WPO with a loss that it does not apply to, weights and losses of other number.
    """

    loss_type: str | Sequence[str] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    loss_weights: Sequence[float] | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    rpo_alpha: float | None = None
    pref_ftx: float = 0.0
    use_weighting: bool = False
    ld_alpha: float | None = None
    reference_free: bool = False
    aggregate: str = "sum"

    def __post_init__(self) -> None:
        if not isinstance(self.loss_type, (str, list, tuple)):
            raise ValueError(f"loss_type must be a name or a list of names, got {self.loss_type!r}.")
        if not all(isinstance(name, str) for name in self.loss_type):
            raise ValueError(f"loss_type must be a name or a list of names, got {self.loss_type!r}.")
        if not self.names:
            raise ValueError(f"loss_type is empty; choose from {', '.join(LOSSES)}.")
        self._check_numbers()
        self._check_weights()
        self._check_combinations()

    def _check_numbers(self) -> None:
        check_beta(self.beta)
        if not (is_number(self.label_smoothing) and 0 <= self.label_smoothing < 0.5):
            raise ValueError(
                f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}; it is the share of flipped labels."
            )
        if not (is_number(self.discopop_tau) and self.discopop_tau > 0):
            raise ValueError(f"discopop_tau must be a number > 0, got {self.discopop_tau!r}.")
        if not is_number(self.f_alpha_divergence_coef):
            raise ValueError(f"f_alpha_divergence_coef must be a number, got {self.f_alpha_divergence_coef!r}.")
        for name in ("simpo_gamma", "cpo_alpha", "rpo_alpha", "pref_ftx"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0) and not (value is None and name == "rpo_alpha"):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}.")
        for name in ("use_weighting", "reference_free"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.ld_alpha is not None and not (is_number(self.ld_alpha) and 0 <= self.ld_alpha <= 1):
            raise ValueError(
                f"ld_alpha must be in [0, 1], got {self.ld_alpha!r}; 1 is plain DPO, unset leaves LD-DPO out."
            )
        for name, choices in (("f_divergence_type", F_DIVERGENCES), ("aggregate", AGGREGATES)):
            value = getattr(self, name)
            if value not in choices:
                near = closest(str(value), choices)
                hint = f" Did you mean {near!r}?" if near else ""
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{hint}")

    def _check_weights(self) -> None:
        weights = self.loss_weights
        if weights is None:
            return
        if not isinstance(weights, (list, tuple)) or not all(is_number(w) and w >= 0 for w in weights):
            raise ValueError(f"loss_weights must be a list of numbers >= 0, one for each loss, got {weights!r}.")
        if len(weights) != len(self.names):
            raise ValueError(
                f"loss_weights has {len(weights)} numbers for {len(self.names)} losses ({', '.join(self.names)}); "
                "give one each."
            )

    def _check_combinations(self) -> None:
        for name in self.names:
            loss = LOSSES[name]
            if self.label_smoothing and "label_smoothing" not in loss.options and not loss.nll:
                applicable = [n for n, other in LOSSES.items() if "label_smoothing" in other.options]
                raise ValueError(
                    f"loss {name!r} has no label smoothing, got label_smoothing={self.label_smoothing}; "
                    f"it applies to {', '.join(applicable)}."
                )
            if self.f_divergence_type != "reverse_kl" and not loss.f_divergence:
                applicable = [n for n, other in LOSSES.items() if other.f_divergence]
                raise ValueError(
                    f"f_divergence_type={self.f_divergence_type!r} does not apply to the loss {name!r}, but to "
                    f"{', '.join(applicable)}; leave it out for {name!r}."
                )
            if self.use_weighting and loss.sorts:
                raise ValueError(
                    f"use_weighting (WPO) weighs pairs, and the loss {name!r} sorts them; use one without the other."
                )
        if "exo_pair" in self.names and not self.label_smoothing:
            _say_exo_smoothing()

    @property
    def names(self) -> tuple[str, ...]:
        """The losses' names in `LOSSES`."""
        names = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        return tuple(canonical_name(name) for name in names)

    @property
    def terms(self) -> list[tuple[Loss, float]]:
        """Losses and weights."""
        weights = [1.0] * len(self.names) if self.loss_weights is None else self.loss_weights
        return [(LOSSES[name], weight) for name, weight in zip(self.names, weights, strict=True)]

    @property
    def f_divergence(self) -> FDivergence:
        """What stands in the place of the log-ratios."""
        return FDivergence(self.f_divergence_type, self.f_alpha_divergence_coef)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the reference's log-probs."""
        return not self.reference_free and any(LOSSES[name].reference for name in self.names)

    @property
    def needs_lengths(self) -> bool:
        """Whether a loss cannot do without the numbers of scored tokens."""
        return self.rpo_alpha is not None or any(LOSSES[name].lengths for name in self.names)


@cache
def _say_exo_smoothing() -> None:
    logger.warning(f"exo_pair with label_smoothing 0: {EXO_SMOOTHING} is used, as its paper recommends.")


def check_beta(beta: object) -> None:
    """Raise `ValueError` unless it is a number above 0."""
    if not (isinstance(beta, (int, float)) and is_number(beta) and beta > 0):
        raise ValueError(f"beta must be a number > 0, got {beta!r}; 0.1 is the usual start.")


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no bool."""
    # compared, since the compiler does not trace math.isfinite
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
