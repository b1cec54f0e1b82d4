"""Log-probabilities of chosen tokens from hidden states and the head's weight, without the logits.

`linear_logprob` is the operation; `linear_logprob_stats` adds statistics of each token's distribution. Both check their
arguments (arguments.py), prepare one call of the operator (prepare.py, settings.py) and run it (operator.py), tile by
tile (forward.py).
"""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from fastdpo.ops.linear_logprob.plan import Plan
from fastdpo.ops.linear_logprob.prepare import PreparedCall, copies_when_flat
from fastdpo.ops.linear_logprob.settings import STATS


class TokenStats(NamedTuple):
    """Per-token results, each of the labels' shape; fields not asked for are None, ignored tokens are 0.

    Attributes:
        logprob: log p(label), nats, differentiable.
        entropy: of the token's distribution, nats; differentiable unless `entropy_grad=False`.
        log_sum_sq_probs: log sum_v p_v^2 (the WPO weight's normalizer), detached.
        mean_logit: mean over the vocabulary of the scaled logits, detached.
        is_top1: bool, no other column has a larger logit, detached.
        lse: log sum_v exp(z_v), detached.
    """

    logprob: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    lse: Tensor | None = None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    lora: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature)[label]`, in nats.

    Accurate to fp32 whatever the operands' dtype (float64 in, float64 out), in bounded memory
    (FASTDPO_WORKSPACE_MB, if a tile of 16 x 128 fits; a head trained on `rows` or under autocast takes one copy of the
    scored hidden states on top), bit-identical from run to run. Under autocast hidden and weight are rounded to the
    autocast dtype, as `F.linear` would; nothing else is.

    Args:
        hidden: (..., H), the final hidden states; float32, bfloat16, float16 or float64.
        weight: (V, H), the head, of hidden's dtype (any of them under autocast).
        labels: (...), int64: the token that each hidden state predicts, aligned with `hidden`.
        bias: (V,).
        rows: (M,) int64 with labels (M,): label i is predicted by row rows[i] of hidden flattened to (R, H). Two
            labels may share a row. This is how prompt tokens and padding are skipped without a copy.
        temperature, logit_scale, softcap: see the formula; softcap is `softcap * tanh(z / softcap)`.
        ignore_index: labels of this value give 0 and no gradient. On a CPU they cost nothing; on a GPU finding
            them would need a host synchronization, so pass `rows` and compacted labels to skip their work.
        shift: labels are unshifted, as Hugging Face models take them: the state at t predicts labels[..., t + 1].
            The last position is 0.
        lora: a LoRA on the head, as (u, B): u (..., r) = scaling * dropout(hidden) @ A.T and B (V, r). Its product is
            added to hidden @ weight.T; W + B A is never formed, and no copy of W is made. The gradient of A is that
            of u. Both may be float32 beside 16-bit hidden states and weight.

    Returns:
        float32 (float64 for float64 operands), the shape of labels.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or (on a CPU, or anywhere with
            FASTDPO_CHECK=1) a label outside [0, V) that is not ignore_index.
    """
    return linear_logprob_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        rows=rows,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        shift=shift,
        lora=lora,
        stats=(),
    ).logprob


def linear_logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    lora: tuple[Tensor, Tensor] | None = None,
    stats: Collection[str] = ("entropy", "is_top1"),
    entropy_grad: bool = True,
) -> TokenStats:
    """`linear_logprob` together with statistics of each token's distribution, each computed only if named.

    Args:
        stats: names among entropy, log_sum_sq_probs, mean_logit, is_top1, lse.
        entropy_grad: False where the entropy is only logged: its gradient costs 2NHV more, and the tensor is then
            detached.

    Other arguments, and errors: see `linear_logprob`.
    """
    stats = (stats,) if isinstance(stats, str) else stats
    unknown = sorted(set(stats) - set(STATS))
    if unknown:
        raise ValueError(f"stats: unknown name {unknown[0]!r}; choose from {', '.join(STATS)}.")
    call = PreparedCall.of(
        hidden,
        weight,
        labels,
        bias=bias,
        rows=rows,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        shift=shift,
        lora=lora,
        stats=stats,
        entropy_grad=entropy_grad,
    )
    return TokenStats(**{name: call.scatter_back(result, labels) for name, result in call.run().items()})


def linear_logprob_plan(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    lora: tuple[Tensor, Tensor] | None = None,
    stats: Collection[str] = (),
    entropy_grad: bool = True,
) -> Plan:
    """The path, tile, FLOPs and peak bytes that `linear_logprob_stats` would take with these arguments."""
    call = PreparedCall.of(
        hidden,
        weight,
        labels,
        bias=bias,
        rows=rows,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        shift=shift,
        lora=lora,
        stats=stats,
        entropy_grad=entropy_grad,
    )
    return call.plan(flattened=copies_when_flat(hidden))
