"""Who is compared in `dpo_loss`: pairs, hidden (2B, T, H), weight (V, H) -> loss, rewards (2B,)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measure.bounds import eager_bytes
from ..measure.entries import Entry, Factory, installed, own_version
from .cases import BETA, IGNORE, PairInputs

# with the reference's forward, on every position; Liger makes its gradients in the forward
PRODUCTS = {"frozen": 3, "trained": 4}


def fastdpo(pairs: PairInputs, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The module, with labels of every position."""
    from fastdpo import FusedLinearDPOLoss

    loss_fn = FusedLinearDPOLoss(beta=BETA, ignore_index=IGNORE)
    loss, out = loss_fn(weight, hidden, pairs.labels, ref_hidden=pairs.ref_hidden, ref_weight=pairs.weight)
    return loss, torch.cat((out.chosen_rewards, out.rejected_rewards))


def fastdpo_rows(pairs: PairInputs, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As the trainer does it: scored tokens named by their rows, so that the others cost nothing."""
    from fastdpo import DPOLoss, linear_logprob
    from fastdpo.ops.sequence import segment_sum

    def sums(states: Tensor, head: Tensor) -> Tensor:
        return segment_sum(linear_logprob(states, head, pairs.targets, rows=pairs.rows), pairs.offsets)

    with torch.no_grad():
        ref = sums(pairs.ref_hidden, pairs.weight)
    loss, out = DPOLoss(beta=BETA)(sums(hidden, weight), ref)
    return loss, torch.cat((out.chosen_rewards, out.rejected_rewards))


def eager(pairs: PairInputs, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, log_softmax, gather, sum, logsigmoid."""
    scored = pairs.labels != IGNORE
    labels = pairs.labels.where(scored, 0)

    def sums(states: Tensor, head: Tensor) -> Tensor:
        logp = torch.log_softmax((states @ head.t()).float(), -1).gather(-1, labels[..., None])[..., 0]
        return (logp * scored).sum(-1)

    with torch.no_grad():
        ref = sums(pairs.ref_hidden, pairs.weight)
    rewards = BETA * (sums(hidden, weight) - ref)
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean(), rewards


def _eager_bytes(mode: str, operand: int) -> int:
    return eager_bytes(mode, operand) + eager_bytes("forward", operand)


EAGER = Entry("eager", f"torch {torch.__version__}", eager, products=PRODUCTS, tile_bytes=_eager_bytes)


def _own(name: str) -> Entry:
    form = name.partition("rows ")[2]
    run = fastdpo_rows if "rows" in name else fastdpo
    return Entry(name, own_version(), run, {"FASTDPO_GEMM": form} if form else {})


def _liger(name: str) -> Entry:
    """Liger's loss, compiled as by default, or not ("liger eager")."""
    package = installed("liger-kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # pyright: ignore[reportMissingImports]

    loss_fn = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, compiled=name == "liger")

    def run(pairs: PairInputs, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss, (*_, chosen, rejected) = loss_fn(
            weight, hidden, pairs.labels, ref_input=pairs.ref_hidden, ref_weight=pairs.weight
        )
        return loss, torch.cat((chosen, rejected))

    return Entry(name, package, run, products=PRODUCTS)


FACTORIES = (
    Factory("fastdpo", _own),
    Factory("fastdpo rows", _own),
    Factory("fastdpo rows cublas", _own, ("cuda",)),
    Factory("fastdpo rows triton", _own, ("cuda",)),
    Factory("eager", lambda _: EAGER),
    Factory("liger", _liger, ("cuda",)),
    Factory("liger eager", _liger),
)
