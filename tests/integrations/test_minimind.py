"""`fastdpo.integrations.minimind` beside the formulas of minimind's DPO loop, written anew, and inside that loop."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.integrations.minimind import dpo_loss, hidden_to_log_probs, logits_to_log_probs

ROWS, LENGTH, HIDDEN, VOCAB = 6, 9, 8, 40


def their_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(2).gather(2, labels[..., None])[..., 0]


def their_loss(reference: Tensor, policy: Tensor, mask: Tensor, beta: float, aggregate: str = "mean") -> Tensor:
    lengths = mask.sum(1).clamp_min(1e-8) if aggregate == "mean" else 1
    policy, reference = (policy * mask).sum(1) / lengths, (reference * mask).sum(1) / lengths
    half = len(policy) // 2
    margin = (policy[:half] - policy[half:]) - (reference[:half] - reference[half:])
    return -F.logsigmoid(beta * margin).mean()


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels padded with 0, and a mask of 1 on completions of other lengths."""
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    labels, mask = torch.randint(1, VOCAB, (ROWS, LENGTH)), torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    for row, (start, end) in enumerate(((2, 9), (3, 5), (1, 8), (2, 4), (4, 9), (3, 6))):
        mask[row, start:end] = 1
        labels[row, end:] = 0
    return hidden, weight, labels, mask


def test_log_probs_are_the_formulas():
    hidden, weight, labels, _ = batch()
    logits = (hidden @ weight.T).detach().requires_grad_()
    mine, theirs = logits_to_log_probs(logits, labels), their_log_probs(logits, labels)
    assert mine.shape == (ROWS, LENGTH)
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(mine)
    torch.testing.assert_close(
        torch.autograd.grad(mine, logits, upstream), torch.autograd.grad(theirs, logits, upstream)
    )
    assert logits_to_log_probs(logits.detach().bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_loss_is_the_formula(kind: torch.dtype, aggregate: str):
    *_, mask = batch()
    reference = -torch.rand(ROWS, LENGTH, dtype=torch.float64) * 5
    policy = (-torch.rand(ROWS, LENGTH, dtype=torch.float64) * 5).requires_grad_()
    # the mean is what the function does unless told otherwise
    mine = dpo_loss(reference, policy, mask.to(kind), 0.3, *(() if aggregate == "mean" else (aggregate,)))
    theirs = their_loss(reference, policy, mask.to(kind), 0.3, aggregate)
    assert mine.shape == ()
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, policy), torch.autograd.grad(theirs, policy))


def test_a_row_without_a_scored_token_counts_as_zero():
    hidden, weight, labels, mask = batch()
    mask[1] = 0
    policy = hidden_to_log_probs(hidden, weight, labels, mask)
    reference = torch.rand_like(policy)
    loss = dpo_loss(reference, policy, mask, 0.5)
    torch.testing.assert_close(loss, their_loss(reference, policy, mask, 0.5))
    (grad,) = torch.autograd.grad(loss, hidden)
    assert bool((grad[1] == 0).all())
    assert bool((grad[4] != 0).any())

    nothing = dpo_loss(reference, hidden_to_log_probs(hidden, weight, labels, mask * 0), mask * 0, 0.5)
    assert float(nothing.detach()) == pytest.approx(math.log(2))
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(nothing, (hidden, weight)))


def test_an_impossible_token_that_is_not_scored_does_no_harm():
    *_, mask = batch()
    policy = torch.randn(ROWS, LENGTH, dtype=torch.float64)
    clean, wild = policy.clone().requires_grad_(), policy.masked_fill(mask == 0, -math.inf).requires_grad_()
    reference = torch.randn_like(policy)
    losses = [dpo_loss(reference, x, mask, 0.5) for x in (clean, wild)]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (clean, wild), strict=True)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_fused_is_unfused(rows: bool, bias: bool):
    hidden, weight, labels, mask = batch()
    shift = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True) if bias else None
    leaves = [hidden, weight, *([shift] if shift is not None else [])]
    reference = torch.randn(ROWS, LENGTH, dtype=torch.float64)
    options = {"rows": mask.flatten().nonzero()[:, 0]} if rows else {}

    fused = hidden_to_log_probs(hidden, weight, labels, mask, bias=shift, **options)
    unfused = logits_to_log_probs(F.linear(hidden, weight, shift), labels)
    torch.testing.assert_close(fused, unfused * mask)
    losses = [dpo_loss(reference, x, mask, 0.3) for x in (fused, unfused)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


def test_positions_outside_the_mask_are_not_projected():
    hidden, weight, labels, mask = batch()
    clean = hidden_to_log_probs(hidden, weight, labels, mask)
    poisoned = hidden.detach().masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
    logps = hidden_to_log_probs(poisoned, weight, labels, mask)
    assert torch.equal(logps, clean)
    assert torch.equal(*(torch.autograd.grad(x.sum(), h)[0] for x, h in ((logps, poisoned), (clean, hidden))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: dpo_loss(x, x[:, :4], x, 0.1),
            r"ref_log_probs must be \(4, 4\) like policy_log_probs, got \(4, 5\)",
        ),
        (lambda x: dpo_loss(x, x, x[0], 0.1), r"mask must be \(4, 5\) like policy_log_probs, got \(5,\)"),
        (lambda x: dpo_loss(x[:3], x[:3], x[:3], 0.1), r"chosen rows then rejected rows, got \(3, 5\)"),
        (lambda x: dpo_loss(x[0], x[0], x[0], 0.1), r"must be \(2B, T\), chosen rows then rejected rows, got \(5,\)"),
        (lambda x: dpo_loss(x, x, x, 0.1, "median"), "aggregate must be 'sum' or 'mean', got 'median'"),
        (lambda x: dpo_loss(x, x, x, 0), "beta must be a number > 0, got 0"),
        (lambda x: logits_to_log_probs(x, x.long()), r"labels must be \(4,\) to match logits \(4, 5\), got \(4, 5\)"),
        (
            lambda x: hidden_to_log_probs(x[None], x, x.long(), x),
            r"hidden must be \(B, T, H\) and labels \(B, T\), got \(1, 4, 5\) and \(4, 5\)",
        ),
        (
            lambda x: hidden_to_log_probs(x[None], x, torch.zeros(1, 4, dtype=torch.int64), x),
            r"hidden must be \(B, T, H\) and mask \(B, T\), got \(1, 4, 5\) and \(4, 5\)",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Tensor], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.zeros(4, 5))
    assert "\n" not in str(caught.value)


class Output(NamedTuple):
    logits: Tensor
    hidden_states: Tensor
    aux_loss: Tensor


class TinyMind(nn.Module):
    """A causal model with minimind's outputs: tied head, and an auxiliary loss that is added to DPO's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.mix = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> Output:
        hidden = self.norm(self.mix(self.embed_tokens(input_ids))[0])
        return Output(self.lm_head(hidden[:, -logits_to_keep:]), hidden, 1e-3 * hidden.square().mean())


def loader() -> Iterator[dict[str, Tensor]]:
    """Batches with minimind's keys: x and the y that it predicts, 0 after the end, and the completion's mask."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        parts = {}
        for side in ("chosen", "rejected"):
            ids = torch.randint(1, VOCAB, (2, LENGTH + 1), generator=generator)
            mask = torch.zeros(2, LENGTH, dtype=torch.int64)
            for row, end in enumerate(torch.randint(5, LENGTH + 1, (2,), generator=generator)):
                mask[row, 3:end] = 1
                ids[row, end + 1 :] = 0
            parts |= {f"x_{side}": ids[:, :-1], f"y_{side}": ids[:, 1:], f"mask_{side}": mask}
        yield parts


Step = Callable[[nn.Module, nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def train(step: Step, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The documented loop, two epochs: losses, and the weights at its end."""
    torch.manual_seed(0)
    model, reference = TinyMind().to(dtype), TinyMind().to(dtype)
    reference.load_state_dict(model.state_dict())
    reference.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for at in range(2):
        for number, parts in enumerate(loader()):
            x, y, mask = (
                torch.cat([parts[f"{name}_chosen"], parts[f"{name}_rejected"]]) for name in ("x", "y", "mask")
            )
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 + 2.5e-3 * (1 + math.cos(math.pi * (3 * at + number) / 6))
            dpo, aux = step(model, reference, x, y, mask)
            losses.append(dpo.detach())
            (dpo + aux).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses), [p.detach() for p in model.parameters()]


def theirs(log_probs: Any, loss: Any) -> Step:
    def step(model: nn.Module, reference: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ref_logits = reference(x).logits
        ref_log_probs = log_probs(ref_logits, y)
        outputs = model(x)
        return loss(ref_log_probs, log_probs(outputs.logits, y), mask, beta=0.5), outputs.aux_loss

    return step


def fused(model: Any, reference: Any, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        ref_hidden = reference(x, logits_to_keep=1).hidden_states
    ref_log_probs = hidden_to_log_probs(ref_hidden, reference.lm_head.weight, y, mask)
    outputs = model(x, logits_to_keep=1)
    log_probs = hidden_to_log_probs(outputs.hidden_states, model.lm_head.weight, y, mask)
    return dpo_loss(ref_log_probs, log_probs, mask, beta=0.5), outputs.aux_loss


@pytest.mark.parametrize("mine", [theirs(logits_to_log_probs, dpo_loss), fused], ids=["logits", "fused"])
def test_the_loop_trains_the_same(mine: Step):
    expected, weights = train(theirs(their_log_probs, their_loss), torch.float64)
    assert float(expected[0]) == pytest.approx(math.log(2))
    assert float(expected[-3:].mean()) < 0.66  # it learns, so that a wrong gradient would show
    losses, mine_weights = train(mine, torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mine_weights, weights, rtol=1e-7, atol=1e-9)
    single, _ = train(mine, torch.float32)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_with_rows_nothing_waits_for_the_device():
    hidden, weight, labels, mask = batch(torch.float32)
    rows = mask.flatten().nonzero()[:, 0]
    expected = hidden_to_log_probs(hidden, weight, labels, mask)
    on_device = [x.cuda() for x in (hidden, weight, labels, mask, rows)]
    *operands, there = on_device
    hidden_to_log_probs(*operands, rows=there)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        logps = hidden_to_log_probs(*operands, rows=there)
        dpo_loss(logps.detach(), logps, operands[-1], 0.1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(logps.cpu(), expected, rtol=1e-4, atol=1e-4)
