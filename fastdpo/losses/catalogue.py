"""The losses, one function each: formula, paper, and where practice departs from it.

Letters: u_w = log pi(y_w|x) - log pi_ref(y_w|x) (chosen), u_l (rejected), h = u_w - u_l, len = scored tokens, s the
sigmoid, and for the reference-free losses p_w = log pi(y_w|x), p_l. Under an f-divergence h is the difference of the
scores instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.divergences import LARGEST_EXPONENT, FDivergence
from fastdpo.losses.pairs import (
    PairLogps,
    chosen_logratio,
    margin,
    per_token,
    rejected_logratio,
    scores,
    smoothed,
    token_nll,
)

EXO_SMOOTHING = 1e-3  # what the EXO paper recommends; 0 has no logarithm


@dataclass(frozen=True)
class Loss:
    """A row of the catalogue.

    Attributes:
        function: PairLogps -> (B,). Takes beta, `options` and, if they apply, `f_divergence` by keyword.
        formula, paper: for the table in docs/losses.md.
        options: of `LossOptions`, those that `function` takes besides beta.
        reference: whether it reads the reference's log-probs.
        f_divergence: whether the f-divergences apply; elsewhere a term of log Z(x) would not cancel.
        averages: whether it divides log-probs by lengths; lengths: whether it cannot do without them.
        sorts: whether its (B,) is not in the order of the pairs.
        nll: whether it is a likelihood term: it takes neither beta nor `f_divergence`, and no weight of a pair and no
            label smoothing applies to it.
    """

    function: Callable[..., Tensor]
    formula: str
    paper: str
    options: tuple[str, ...] = ()
    reference: bool = True
    f_divergence: bool = False
    averages: bool = False
    lengths: bool = False
    sorts: bool = False
    nll: bool = False


def sigmoid(logps: PairLogps, *, beta: float, label_smoothing: float, f_divergence: FDivergence) -> Tensor:
    """DPO, eq. 7 of arXiv:2305.18290: `-log sigmoid(beta h)`.

    With `label_smoothing` e this is conservative DPO (cDPO, eq. 3 of the note by E. Mitchell, 2023):
    `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`, where e is the probability that a label is
    flipped. TRL 1.16 accepts the argument for this loss and ignores it; here it is applied.
    """
    return smoothed(beta * margin(logps, f_divergence), label_smoothing)


def hinge(logps: PairLogps, *, beta: float, f_divergence: FDivergence) -> Tensor:
    """SLiC / RSO, eq. 6 of arXiv:2309.06657: `max(0, 1 - beta h)`; beta is the reciprocal of the margin."""
    return torch.relu(1 - beta * margin(logps, f_divergence))


def ipo(logps: PairLogps, *, beta: float, f_divergence: FDivergence) -> Tensor:
    """IPO, eq. 17 of arXiv:2310.12036: `(h - 1 / (2 beta))^2`, beta being the paper's tau.

    The log-ratios are averaged over each completion's tokens, as in the authors' own runs and in TRL; the
    paper does not discuss it. Log-probs without lengths are taken as averages already.
    """
    chosen, rejected = scores(logps, f_divergence)
    h = per_token(chosen, logps.chosen_len) - per_token(rejected, logps.rejected_len)
    return (h - 1 / (2 * beta)) ** 2


def exo_pair(logps: PairLogps, *, beta: float, label_smoothing: float, f_divergence: FDivergence) -> Tensor:
    """EXO, eq. 16 of arXiv:2402.00856: the KL from the policy's preference to the label's, `(1 - e, e)`.

    `s(h) (log s(h) - log(1 - e)) + s(-h) (log s(-h) - log e)` with s = sigmoid, h scaled by beta. e is
    `label_smoothing`; 0 has no logarithm, so 1e-3 is taken, the paper's (TRL 1.16 raises, older ones did the same).
    """
    e = label_smoothing or EXO_SMOOTHING
    h = beta * margin(logps, f_divergence)
    chosen = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-e))
    return chosen + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(e))


def nca_pair(logps: PairLogps, *, beta: float) -> Tensor:
    """NCA for a pair, arXiv:2402.05369.

    `-log s(beta u_w) - 0.5 log s(-beta u_w) - 0.5 log s(-beta u_l)`: the likelihood itself counts, not only the margin.
    """
    chosen, rejected = beta * chosen_logratio(logps), beta * rejected_logratio(logps)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(logps: PairLogps, *, beta: float, label_smoothing: float, f_divergence: FDivergence) -> Tensor:
    """Robust DPO, arXiv:2403.00409: unbiased where a share e of the labels is flipped.

    `(-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)`; e is `label_smoothing`, 0 gives DPO.
    """
    e = label_smoothing
    h = beta * margin(logps, f_divergence)
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


def bco_pair(logps: PairLogps, *, beta: float) -> Tensor:
    """BCO on pairs, arXiv:2404.04656: `-log s(beta u_w) - log s(-beta u_l)`.

    Without the paper's running mean of the rewards as shift, as in TRL 1.16; TRL before 0.29 subtracted it.
    """
    chosen, rejected = beta * chosen_logratio(logps), beta * rejected_logratio(logps)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(logps: PairLogps, *, beta: float) -> Tensor:
    """SPPO, eq. 4.7 of arXiv:2405.00675 with win probabilities 1 and 0.

    `(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2`
    """
    half = 0.5 / beta
    return (chosen_logratio(logps) - half) ** 2 + (rejected_logratio(logps) + half) ** 2


def aot(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT, paired form, of arXiv:2406.05882: DPO between sorted policy and sorted reference margins.

    The margins `p_w - p_l` and `ref_w - ref_l` are sorted over the micro-batch, as in TRL, so the loss depends on how
    pairs are batched and entry i is no longer pair i. `label_smoothing` as for sigmoid.
    """
    policy = (logps.chosen - logps.rejected).sort().values
    reference = (logps.ref_chosen - logps.ref_rejected).sort().values
    return smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT, unpaired form, of arXiv:2406.05882: DPO between sorted u_w and sorted u_l of the micro-batch, as in TRL.

    TRL called it `aot_pair` up to 0.28; both names are known here.
    """
    chosen, rejected = chosen_logratio(logps).sort().values, rejected_logratio(logps).sort().values
    return smoothed(beta * (chosen - rejected), label_smoothing)


def apo_zero(logps: PairLogps, *, beta: float) -> Tensor:
    """APO-zero, eq. 7 of arXiv:2408.06266, for answers better than the model's: `1 - s(beta u_w) + s(beta u_l)`."""
    # 1 - s(x) = s(-x), without the cancellation
    return torch.sigmoid(-beta * chosen_logratio(logps)) + torch.sigmoid(beta * rejected_logratio(logps))


def apo_down(logps: PairLogps, *, beta: float) -> Tensor:
    """APO-down, eq. 8 of arXiv:2408.06266, for answers worse than the model's: `s(beta u_w) + 1 - s(beta h)`."""
    chosen = chosen_logratio(logps)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected_logratio(logps)))


def discopop(logps: PairLogps, *, beta: float, discopop_tau: float, f_divergence: FDivergence) -> Tensor:
    """DiscoPOP, eq. 5 of arXiv:2406.08414 (log-ratio modulated loss).

    `(1 - m) (-log s(beta h)) + m exp(-beta h)`, m = s(beta h / discopop_tau). Exponents end at 80, so that fp32
    stays finite where m is 0.
    """
    h = beta * margin(logps, f_divergence)
    m = torch.sigmoid(h / discopop_tau)
    return (1 - m) * -F.logsigmoid(h) + m * torch.exp((-h).clamp(max=LARGEST_EXPONENT))


def sft(logps: PairLogps) -> Tensor:
    """The negative log-likelihood of the chosen completions, a mean over the tokens of the micro-batch as in TRL.

    Each of the (B,) entries is that mean: the term of MPO (arXiv:2411.10442) and RPO. LD-DPO's weights and WPO's do not
    apply to it (TRL 1.16 multiplies it by WPO's, which its own in-place product refuses for more than one pair).
    """
    return token_nll(logps).expand(len(logps.chosen))


def sigmoid_norm(logps: PairLogps, *, beta: float, f_divergence: FDivergence) -> Tensor:
    """Length-normalized DPO (arXiv:2411.15124): `-log s(beta (u_w / len_w - u_l / len_l))`."""
    chosen, rejected = scores(logps, f_divergence)
    h = per_token(chosen, logps.chosen_len) - per_token(rejected, logps.rejected_len)
    return -F.logsigmoid(beta * h)


def simpo(logps: PairLogps, *, beta: float, label_smoothing: float, simpo_gamma: float) -> Tensor:
    """SimPO, eq. 6 of arXiv:2405.14734: `-log s(beta (p_w / len_w - p_l / len_l) - gamma)`, gamma = `simpo_gamma`.

    gamma is the paper's target margin, in units of the reward (LLaMA-Factory and TRL's CPOTrainer mean the same).
    `label_smoothing` as for sigmoid.
    """
    chosen = per_token(logps.chosen, logps.chosen_len)
    rejected = per_token(logps.rejected, logps.rejected_len)
    return smoothed(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def orpo(logps: PairLogps, *, beta: float) -> Tensor:
    """ORPO, eq. 6 and 7 of arXiv:2403.07691: `-q_w - beta log s(log odds(q_w) - log odds(q_l))`, q = p / len.

    odds(q) = exp(q) / (1 - exp(q)), and beta is the paper's lambda. The likelihood term is a mean over each chosen
    completion, as in LLaMA-Factory; TRL's ORPOTrainer takes it over the tokens of the micro-batch, prompts included.
    """
    chosen = per_token(logps.chosen, logps.chosen_len)
    rejected = per_token(logps.rejected, logps.rejected_len)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; x ends one rounding step below 0, where the odds would be infinite."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.log(-torch.expm1(x))


def cpo(logps: PairLogps, *, beta: float, label_smoothing: float, cpo_alpha: float) -> Tensor:
    """CPO, arXiv:2401.08417: `-log s(beta (p_w - p_l)) + cpo_alpha NLL(y_w)`.

    The likelihood term is a mean over the chosen tokens of the micro-batch, as in TRL's CPOTrainer; WPO's weights apply
    to the whole. `label_smoothing` as for sigmoid.
    """
    return smoothed(beta * (logps.chosen - logps.rejected), label_smoothing) + cpo_alpha * token_nll(logps)


def kto_pair(logps: PairLogps, *, beta: float) -> Tensor:
    """KTO on pairs (eq. 7 of arXiv:2402.01306, in the paired form that LLaMA-Factory's `pref_loss` names).

    `0.5 (1 - s(beta (u_w - z_l))) + 0.5 (1 - s(beta (z_w - u_l)))`: z_w and z_l are the means of u_w and u_l over the
    micro-batch, no less than 0, each used for the other side. Half of each, since TRL (up to 0.9) averaged over 2B
    sequences. No gradient goes through z, as in the paper (TRL's paired form let it).
    """
    chosen, rejected = chosen_logratio(logps), rejected_logratio(logps)
    chosen_kl, rejected_kl = chosen.detach().mean().clamp(min=0), rejected.detach().mean().clamp(min=0)
    better = torch.sigmoid(-beta * (chosen - rejected_kl))
    worse = torch.sigmoid(-beta * (chosen_kl - rejected))
    return 0.5 * (better + worse)


_SMOOTHING = ("label_smoothing",)
LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, "-log s(beta h)", "arXiv:2305.18290", _SMOOTHING, f_divergence=True),
    "hinge": Loss(hinge, "max(0, 1 - beta h)", "arXiv:2309.06657", f_divergence=True),
    "ipo": Loss(
        ipo, "(u_w / len_w - u_l / len_l - 1 / (2 beta))^2", "arXiv:2310.12036", f_divergence=True, averages=True
    ),
    "exo_pair": Loss(
        exo_pair,
        "KL((s(beta h), s(-beta h)) to (1 - e, e)), e = label_smoothing or 1e-3",
        "arXiv:2402.00856",
        _SMOOTHING,
        f_divergence=True,
    ),
    "nca_pair": Loss(nca_pair, "-log s(beta u_w) - 0.5 log s(-beta u_w) - 0.5 log s(-beta u_l)", "arXiv:2402.05369"),
    "robust": Loss(
        robust,
        "(-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e), e = label_smoothing",
        "arXiv:2403.00409",
        _SMOOTHING,
        f_divergence=True,
    ),
    "bco_pair": Loss(bco_pair, "-log s(beta u_w) - log s(-beta u_l)", "arXiv:2404.04656"),
    "sppo_hard": Loss(sppo_hard, "(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2", "arXiv:2405.00675"),
    "aot": Loss(
        aot, "-log s(beta (sort(p_w - p_l) - sort(ref_w - ref_l)))", "arXiv:2406.05882", _SMOOTHING, sorts=True
    ),
    "aot_unpaired": Loss(
        aot_unpaired, "-log s(beta (sort(u_w) - sort(u_l)))", "arXiv:2406.05882", _SMOOTHING, sorts=True
    ),
    "apo_zero": Loss(apo_zero, "1 - s(beta u_w) + s(beta u_l)", "arXiv:2408.06266"),
    "apo_down": Loss(apo_down, "s(beta u_w) + 1 - s(beta h)", "arXiv:2408.06266"),
    "discopop": Loss(
        discopop,
        "-(1 - m) log s(beta h) + m exp(-beta h), m = s(beta h / discopop_tau)",
        "arXiv:2406.08414",
        ("discopop_tau",),
        f_divergence=True,
    ),
    "sft": Loss(
        sft,
        "-sum p_w / sum len_w over the micro-batch",
        "arXiv:2411.10442",
        reference=False,
        f_divergence=True,
        lengths=True,
        nll=True,
    ),
    "sigmoid_norm": Loss(
        sigmoid_norm, "-log s(beta (u_w / len_w - u_l / len_l))", "arXiv:2411.15124", f_divergence=True, averages=True
    ),
    "simpo": Loss(
        simpo,
        "-log s(beta (p_w / len_w - p_l / len_l) - simpo_gamma)",
        "arXiv:2405.14734",
        ("simpo_gamma", *_SMOOTHING),
        reference=False,
        averages=True,
    ),
    "orpo": Loss(
        orpo,
        "-q_w - beta log s(logit(e^q_w) - logit(e^q_l)), q = p / len",
        "arXiv:2403.07691",
        reference=False,
        averages=True,
    ),
    "cpo": Loss(
        cpo,
        "-log s(beta (p_w - p_l)) + cpo_alpha NLL(y_w)",
        "arXiv:2401.08417",
        ("cpo_alpha", *_SMOOTHING),
        reference=False,
        lengths=True,
    ),
    "kto_pair": Loss(
        kto_pair,
        "1 - 0.5 s(beta (u_w - max(0, mean u_l))) - 0.5 s(beta (max(0, mean u_w) - u_l))",
        "arXiv:2402.01306",
    ),
}
ALIASES = {"aot_pair": "aot_unpaired"}
