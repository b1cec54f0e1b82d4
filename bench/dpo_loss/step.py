"""One step of an entry of `dpo_loss` on preference pairs, what is right, and the work that it is."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.ops.oracle import SAMPLE, Distribution, Outputs, Truth, evenly

from ..linear_logprob.cases import Growth
from ..linear_logprob.step import own_plan, own_work
from ..measure.bounds import Work, peer_work
from ..measure.comparison import Comparison
from ..measure.entries import Entry
from .cases import BETA, IGNORE, PairCase, PairInputs
from .peers import EAGER

GROWN_FROM = 4  # pairs that a growing input repeats


class LossComparison(Comparison):
    """One set of pairs, for both modes: the head frozen, and trained."""

    def __init__(self, pairs: PairInputs) -> None:
        self.pairs = pairs

    @staticmethod
    def of(case: PairCase | Growth, device: str) -> "LossComparison":
        if isinstance(case, Growth):
            assert case.length is not None
            case = PairCase(GROWN_FROM, case.length, case.h, case.v, case.dtype, case.mode)
        return LossComparison(PairInputs.of(case, device))

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        return self.pairs.hidden.flatten(0, 1), self.pairs.weight

    @property
    def tokens(self) -> int:
        return len(self.pairs.targets)

    def grown(self, size: int) -> "LossComparison":
        have = len(self.pairs.labels) // 2
        return LossComparison(self.pairs.take([i % have for i in range(size)]))

    def sample(self, outputs: Outputs) -> tuple["LossComparison", Outputs]:
        """The first and the last pair; their loss is that of their own rewards."""
        b = len(self.pairs.labels) // 2
        few = sorted({0, b - 1})
        both = torch.tensor(few + [i + b for i in few], device=self.pairs.labels.device)
        rewards = outputs["rewards"][both]
        chosen, rejected = rewards.chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean().view(1)
        # the loss is a mean over pairs
        dh = outputs["dh"].unflatten(0, (2 * b, -1))[both].flatten(0, 1) * (b / len(few))
        return LossComparison(self.pairs.take(few)), {"rewards": torch.cat((rewards, loss)), "dh": dh}

    def step(self, entry: Entry, mode: str) -> Outputs:
        """One forward and backward: rewards (the loss is the last of them), dh (2BT, H), dw."""
        hidden = self.pairs.hidden.detach().requires_grad_()
        weight = self.pairs.weight.detach().requires_grad_(mode == "trained")
        with entry.applied(), torch.enable_grad():
            loss, rewards = entry.run(self.pairs, hidden, weight)
            loss.backward()
        grads = self.gradients(dh=hidden, dw=weight)
        rewards = torch.cat((rewards.detach().float(), loss.detach().float().view(1)))
        return {"rewards": rewards, **grads, "dh": grads["dh"].view(-1, hidden.shape[-1])}

    def make_truth(self) -> Truth:
        b, labels, flat = len(self.pairs.labels) // 2, self.pairs.targets, self.pairs.hidden.flatten(0, 1)
        sequence = torch.repeat_interleave(torch.arange(2 * b, device=labels.device), self.pairs.offsets.diff())
        p = Distribution.of(flat[self.pairs.rows], self.pairs.weight)
        ref = Distribution.of(self.pairs.ref_hidden.flatten(0, 1)[self.pairs.rows], self.pairs.weight)
        gained = p.logp(labels) - ref.logp(labels)
        rewards = BETA * torch.zeros(2 * b, dtype=gained.dtype, device=gained.device).index_add(0, sequence, gained)
        margin = rewards[:b] - rewards[b:]
        pull = BETA * torch.sigmoid(-margin) / b
        upstream = torch.cat((-pull, pull))[sequence]

        few = evenly(len(labels), SAMPLE, labels.device)
        unscored = (self.pairs.labels.view(-1) == IGNORE).nonzero()[:, 0]
        unscored = unscored[evenly(len(unscored), SAMPLE // 4, labels.device)]
        d_scored = p.d_hidden(labels, upstream, few)
        d_hidden = torch.cat((d_scored, d_scored.new_zeros(len(unscored), d_scored.shape[1])))
        columns = torch.cat((labels[few[::2]], evenly(len(self.pairs.weight), SAMPLE // 2, labels.device))).unique()
        values = {
            "rewards": torch.cat((rewards, -F.logsigmoid(margin).mean().view(1))),
            "dh": d_hidden,
            "dw": p.d_weight(labels, upstream, columns),
        }
        return Truth(values, {"rewards": None, "dh": torch.cat((self.pairs.rows[few], unscored)), "dw": columns})

    def eager_outputs(self) -> Outputs:
        # pair by pair; the loss is a mean over pairs
        b = len(self.pairs.labels) // 2
        parts = [LossComparison(self.pairs.take([i])).step(EAGER, "trained") for i in range(b)]
        rewards = torch.stack([part["rewards"] for part in parts])
        dh = torch.stack([part["dh"].unflatten(0, (2, -1)) for part in parts], 1) / b
        dw = (torch.stack([part["dw"].float() for part in parts]).sum(0) / b).to(self.pairs.weight.dtype)
        chosen, rejected, loss = rewards.unbind(1)
        return {"rewards": torch.cat((chosen, rejected, loss.mean().view(1))), "dh": dh.flatten(0, 2), "dw": dw}

    def work(self, entry: Entry, mode: str) -> tuple[Work | None, float | None]:
        v, h = self.pairs.weight.shape
        positions, size = self.pairs.labels.numel(), self.pairs.weight.element_size()
        if not entry.name.startswith("fastdpo"):
            return peer_work(entry, mode, positions, h, v, size), None
        flat, labels, options = self.pairs.hidden, self.pairs.labels, {}
        # finding the ignored labels would wait for a GPU
        n = len(self.pairs.rows) if labels.device.type == "cpu" else positions
        if entry.name.startswith("fastdpo rows"):
            flat, labels, options = flat.flatten(0, 1), self.pairs.targets, {"rows": self.pairs.rows}
            n = len(labels)
        plans = []
        for pass_mode in (mode, "forward"):  # the policy's, and the reference's
            with entry.applied():
                plans.append(own_plan(flat, self.pairs.weight, labels, pass_mode, **options))
        policy, reference = (own_work(plan, n, v, size) for plan in plans)
        return policy + reference, None
