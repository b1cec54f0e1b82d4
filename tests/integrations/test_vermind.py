"""`fastdpo.integrations.vermind` beside the formulas of vermind's DPO loop, written anew here, and inside that loop."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.integrations.vermind import dpo_loss, hidden_to_log_probs, logits_to_log_probs

ROWS, LENGTH, HIDDEN, VOCAB = 6, 9, 8, 40


def their_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(2).gather(2, labels[..., None])[..., 0]


def their_loss(
    reference: Tensor, policy: Tensor, mask: Tensor, beta: float = 0.1, aggregate: str = "sum"
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = mask.sum(1).clamp_min(1e-8) if aggregate == "mean" else 1
    policy, reference = (policy * mask).sum(1) / lengths, (reference * mask).sum(1) / lengths
    half = len(policy) // 2
    margin = (policy[:half] - policy[half:]) - (reference[:half] - reference[half:])
    rewards = beta * (policy - reference).detach()
    return -F.logsigmoid(beta * margin).mean(), rewards[:half].mean(), rewards[half:].mean()


def masks(*ends: int) -> Tensor:
    """1 from position 2 to each row's end."""
    place = torch.arange(LENGTH)
    return torch.stack([(place >= 2) & (place < end) for end in ends]).float()


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_loss_and_rewards_are_the_formulas(aggregate: str):
    mask = masks(9, 5, 8, 3, 2, 6)  # the fifth row has no scored token
    reference = torch.randn(ROWS, LENGTH, dtype=torch.float64)
    policy = torch.randn(ROWS, LENGTH, dtype=torch.float64, requires_grad=True)
    # the sum and a beta of 0.1 are what the function does unless told otherwise
    options = {} if aggregate == "sum" else {"beta": 0.3, "aggregate": aggregate}
    mine, theirs = (f(reference, policy, mask, **options) for f in (dpo_loss, their_loss))
    assert isinstance(mine, tuple)
    torch.testing.assert_close(mine, theirs)
    assert [x.requires_grad for x in mine] == [True, False, False]
    torch.testing.assert_close(torch.autograd.grad(mine[0], policy), torch.autograd.grad(theirs[0], policy))


def test_nothing_scored_is_log_two():
    policy = torch.randn(ROWS, LENGTH, requires_grad=True)
    for aggregate in ("sum", "mean"):
        loss, *rewards = dpo_loss(torch.randn(ROWS, LENGTH), policy, torch.zeros(ROWS, LENGTH), aggregate=aggregate)
        (grad,) = torch.autograd.grad(loss, policy)
        assert float(loss.detach()) == pytest.approx(math.log(2))
        assert rewards == [0, 0]
        assert bool((grad == 0).all())


@pytest.mark.parametrize("rows", [False, True])
def test_fused_is_unfused(rows: bool):
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    labels, mask = torch.randint(VOCAB, (ROWS, LENGTH)), masks(9, 5, 8, 3, 2, 6)
    reference = torch.randn(ROWS, LENGTH, dtype=torch.float64)
    unfused = logits_to_log_probs(hidden @ weight.T, labels)
    torch.testing.assert_close(unfused, their_log_probs(hidden @ weight.T, labels))
    # vermind's data set writes -100 where it does not score
    options = {"rows": mask.flatten().nonzero()[:, 0]} if rows else {}
    fused = hidden_to_log_probs(hidden, weight, labels.where(mask != 0, -100), mask, **options)
    results = [dpo_loss(reference, x, mask, aggregate="mean") for x in (fused, unfused)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (hidden, weight)) for loss, *_ in results))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dpo_loss(x, x[:, :4], x), r"ref_log_probs must be \(4, 4\) like policy_log_probs, got \(4, 5\)"),
        (lambda x: dpo_loss(x, x, x[:2]), r"mask must be \(4, 5\) like policy_log_probs, got \(2, 5\)"),
        (lambda x: dpo_loss(x[:3], x[:3], x[:3]), r"chosen rows then rejected rows, got \(3, 5\)"),
        (lambda x: dpo_loss(x, x, x, aggregate="avg"), "aggregate must be 'sum' or 'mean', got 'avg'"),
        (lambda x: dpo_loss(x, x, x, -1.0), "beta must be a number > 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.zeros(4, 5))
    assert "\n" not in str(caught.value)


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.mix = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        return self.mix(self.embed(x))[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


def by_logits(log_probs: Any) -> Callable[[TinyModel, Tensor, Tensor, Tensor], Tensor]:
    return lambda model, x, y, mask: log_probs(model(x), y)


def by_hidden(model: TinyModel, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return hidden_to_log_probs(model.hidden(x), model.head.weight, y, mask)


def train(score: Any, loss_function: Any, aggregate: str, beta: float) -> tuple[Tensor, list[Tensor]]:
    """The documented loop, 6 steps: loss and rewards of each, and the weights at its end."""
    torch.manual_seed(0)
    model, reference = TinyModel().double(), TinyModel().double()
    reference.load_state_dict(model.state_dict())
    reference.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    logged = []
    for _ in range(6):
        ids, mask = torch.randint(VOCAB, (4, LENGTH + 1)), masks(9, 6, 5, 8)
        x, y = ids[:, :-1], ids[:, 1:]
        with torch.no_grad():
            ref_log_probs = score(reference, x, y, mask)
        loss, *rewards = loss_function(ref_log_probs, score(model, x, y, mask), mask, beta=beta, aggregate=aggregate)
        logged.append(torch.stack([loss.detach(), *rewards]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(logged), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("score", [by_logits(logits_to_log_probs), by_hidden], ids=["logits", "fused"])
def test_the_loop_trains_the_same(score: Any, aggregate: str):
    expected, weights = train(by_logits(their_log_probs), their_loss, aggregate, beta=0.5)
    assert float(expected[0, 0]) == pytest.approx(math.log(2))
    assert float(expected[1:, 1:].abs().min()) > 0  # the policy has left the reference
    steps, mine = train(score, dpo_loss, aggregate, beta=0.5)
    torch.testing.assert_close(steps, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mine, weights, rtol=1e-7, atol=1e-9)
