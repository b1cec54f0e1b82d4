"""f-divergences in place of DPO's reverse KL (f-DPO, arXiv:2309.16240): what log(pi / pi_ref) becomes under each."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # exp of it is finite in fp32


class FDivergence(NamedTuple):
    """A name in `F_DIVERGENCES`, and the alpha of alpha_divergence; 1 is reverse_kl."""

    kind: str
    alpha: float


def score(u: Tensor, f_divergence: FDivergence) -> Tensor:
    """f'(pi / pi_ref) from u = log(pi / pi_ref), (B,) each: the paper's table 1, up to constants.

    reverse_kl gives u (DPO), forward_kl `1 - exp(-u)`, js_divergence `log 2 + log s(u)`, alpha_divergence
    `(exp((a - 1) u) - 1) / (a - 1)`, as in TRL 1.16. TRL before 0.29 had `(1 - exp(-b u)) / b`, the same with
    a = 1 - b, and b = 1 as default. Exponents end at 80, so that exp stays finite in fp32.
    """
    if f_divergence.kind == "forward_kl":
        return -torch.expm1((-u).clamp(max=LARGEST_EXPONENT))
    if f_divergence.kind == "js_divergence":
        return math.log(2) + F.logsigmoid(u)
    if f_divergence.kind == "alpha_divergence" and abs(f_divergence.alpha - 1) >= 1e-6:
        slope = f_divergence.alpha - 1
        return torch.expm1((slope * u).clamp(max=LARGEST_EXPONENT)) / slope
    return u
