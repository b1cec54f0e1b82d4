"""Log-probabilities of chosen tokens from hidden states and the head's weight, without the logits.

`linear_logprob` is the operation; `linear_logprob_stats` adds statistics of each token's distribution. Both
check their arguments, choose path and tile (`fastdpo.ops.plan`), and run tile by tile (`fastdpo.ops.tiled`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from fastdpo.ops import reference, tiled
from fastdpo.ops.arguments import check_arguments
from fastdpo.ops.backend import choose_backend, logger
from fastdpo.ops.plan import Needs, Plan, Shape, make_plan

STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1", "lse")


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
) -> Tensor:
    """`log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature)[label]`, in nats.

    Accurate to fp32 whatever the operands' dtype (float64 in, float64 out), in bounded memory
    (FASTDPO_WORKSPACE_MB), bit-identical from run to run. Under autocast the operands are rounded to the autocast
    dtype, as `F.linear` would; nothing else is.

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
    unknown = sorted(set(stats) - set(STATS))
    if unknown:
        raise ValueError(f"stats: unknown name {unknown[0]!r}; choose from {', '.join(STATS)}.")
    call = _Call.of(
        hidden,
        weight,
        labels,
        bias,
        rows,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        shift,
        stats,
        entropy_grad,
    )
    found = call.run(hidden, weight, bias)
    return TokenStats(**{name: call.spread(x, labels) for name, x in found.items()})


def linear_logprob_plan(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Plan:
    """The path, tile, FLOPs and peak bytes that `linear_logprob(hidden, weight, labels, **options)` would take."""
    defaults: dict[str, Any] = {
        "bias": None,
        "rows": None,
        "temperature": 1.0,
        "logit_scale": 1.0,
        "softcap": None,
        "ignore_index": -100,
        "shift": False,
        "stats": (),
        "entropy_grad": True,
    }
    return _Call.of(hidden, weight, labels, *{**defaults, **options}.values()).plan


@dataclass(frozen=True)
class _Call:
    """One checked call: everything about it that is not differentiated."""

    labels: Tensor  # (N,), compacted where that is free
    rows: Tensor | None  # (N,)
    unique_rows: bool
    scored: Tensor | None  # (N,) bool, where ignored labels are still among `labels`
    places: Tensor | None  # (N,) int64, where each result goes in the flattened labels
    how: tiled.Logits
    needs: Needs
    plan: Plan
    compute: torch.dtype
    acc: torch.dtype
    backend: str
    wants_mean: bool

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        ignore_index: int,
        shift: bool,
        stats: Collection[str],
        entropy_grad: bool,
    ) -> "_Call":
        compute = check_arguments(
            hidden, weight, labels, bias, rows, temperature, logit_scale, softcap, ignore_index, shift
        )
        acc = torch.promote_types(compute, torch.float32)
        grad = torch.is_grad_enabled()
        needs = Needs(
            hidden=grad and hidden.requires_grad,
            weight=grad and weight.requires_grad,
            bias=grad and bias is not None and bias.requires_grad,
            entropy=grad and entropy_grad and "entropy" in stats,
        )
        if shift:
            labels = torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)), -1)
        flat, unique = labels.reshape(-1), rows is None
        scored = flat != ignore_index
        places = None
        if flat.device.type == "cpu":
            if not bool(scored.all()):
                places = scored.nonzero()[:, 0]
                flat = flat[places]
                rows = places if rows is None else rows[places]
            scored = None
        on_cpu = hidden.device.type == "cpu"
        # without a softcap the mean logit needs no tile: it is h @ mean(W)
        in_tile = frozenset(s for s in stats if s != "mean_logit" or softcap)
        how = tiled.Logits(float(temperature), float(logit_scale), softcap, in_tile)
        shape = Shape(
            n=len(flat),
            h=hidden.shape[-1],
            v=weight.shape[0],
            source_rows=hidden.shape[:-1].numel(),
            compute=compute.itemsize,
            acc=acc.itemsize,
            hidden=hidden.element_size(),
            weight=weight.element_size(),
            on_cpu=on_cpu,
            extra_tiles=("entropy" in in_tile) + bool(softcap),
        )
        backend = choose_backend(hidden.device, compute)
        plan = make_plan(shape, needs)
        logger.debug("linear_logprob: %s backend, %s", backend, plan)
        return _Call(
            flat,
            rows,
            unique,
            scored,
            places,
            how,
            needs,
            plan,
            compute,
            acc,
            backend,
            "mean_logit" in stats and not softcap,
        )

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        with torch.autocast(flat.device.type, enabled=False):
            if self.backend == "reference":
                return self._eager(flat, weight, bias)
            names = ("logprob", *(s for s in STATS if s in self.how.stats))
            found = dict(zip(names, _LinearLogprob.apply(flat, weight, bias, self, names), strict=True))
            if self.wants_mean:
                found["mean_logit"] = self._mean_logit(flat, weight, bias)
            return found

    def spread(self, found: Tensor, labels: Tensor) -> Tensor:
        """Results back in the labels' shape, 0 where ignored."""
        if self.places is not None:
            found = found.new_zeros(labels.numel()).index_copy(0, self.places, found)
        elif self.scored is not None:
            found = found.where(self.scored, found.new_zeros(()))
        return found.view(labels.shape)

    def _eager(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        z = reference.logits(
            hidden.to(self.compute),
            weight.to(self.compute),
            bias,
            temperature=self.how.temperature,
            logit_scale=self.how.logit_scale,
            softcap=self.how.softcap,
        )
        z = z if self.rows is None else z[self.rows]
        labels = self.labels if self.scored is None else self.labels.where(self.scored, 0)
        stats = reference.token_stats(z, labels)
        if not self.needs.entropy:
            stats["entropy"] = stats["entropy"].detach()
        wanted = self.how.stats | ({"mean_logit"} if self.wants_mean else set())
        out = {k: x if k == "entropy" else x.detach() for k, x in stats.items() if k in wanted}
        return {"logprob": reference.logprob(z, labels), **out}

    def _mean_logit(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Without a softcap the mean over v needs no tile: it is h @ mean(W) + mean(b)."""
        with torch.no_grad():
            column = _mean_column(weight, self)
            mean = column.new_empty(len(self.labels))
            head = tiled.Head(weight, bias, self.compute, self.acc)
            for block in tiled.blocks(len(mean), self.plan.rows):
                mean[block] = tiled.take_rows(hidden, self.rows, block, head).to(self.acc) @ column
            if bias is not None:
                mean += bias.to(self.acc).mean()
            return mean.mul_(self.how.slope)


# the mean row of a frozen head, with the version of the weight that it was taken from
_MEANS = WeakTensorKeyDictionary()


def _mean_column(weight: Tensor, call: _Call) -> Tensor:
    entry = _MEANS.get(weight)
    if entry is not None and entry[0] == (weight._version, call.compute):
        return entry[1]
    total = torch.zeros(weight.shape[1], dtype=call.acc, device=weight.device)
    for block in tiled.blocks(len(weight), call.plan.cols):
        total += weight[block].to(call.compute).to(call.acc).sum(0)
    mean = total.div_(len(weight))
    if not weight.requires_grad:
        _MEANS[weight] = ((weight._version, call.compute), mean)
    return mean


def _tiles(backend: str) -> tiled.TileOps:
    if backend == "triton":
        from fastdpo.ops.triton_tiles import TritonTiles

        return TritonTiles()
    return tiled.TorchTiles()


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        head = tiled.Head(weight, bias, call.compute, call.acc)
        tiles = _tiles(call.backend)
        labels = call.labels if call.scored is None else call.labels.where(call.scored, -1)
        found, saved = tiled.forward(tiles, hidden, head, labels, call.rows, call.how, call.plan, call.needs)
        if call.scored is not None:
            saved.q = saved.q.where(call.scored, 0.0)
        ctx.call = call
        ctx.names = names
        ctx.saved_names = [name for name, x in vars(saved).items() if x is not None]
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        arguments = (hidden, weight, bias, labels, call.rows) if call.needs.head else (None,) * 5
        ctx.save_for_backward(*arguments, *(getattr(saved, name) for name in ctx.saved_names))
        fixed = [x for name, x in found.items() if name != "logprob" and not (name == "entropy" and call.needs.entropy)]
        ctx.mark_non_differentiable(*fixed)
        return tuple(found[name] for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        wanted = dict(zip(ctx.names, upstream, strict=True))
        hidden, weight, bias, labels, rows, *rest = ctx.saved_tensors
        saved = tiled.Saved(**dict(zip(ctx.saved_names, rest, strict=True)))
        up, up_entropy = wanted["logprob"], wanted.get("entropy") if call.needs.entropy else None
        if up is None and up_entropy is None:
            return (None,) * 5
        up = torch.zeros_like(saved.q) if up is None else up.to(call.acc)
        up_entropy = None if up_entropy is None else up_entropy.to(call.acc)
        if up_entropy is not None and call.scored is not None:
            up_entropy = up_entropy.where(call.scored, 0.0)
        d_hidden = d_weight = d_bias = None
        if call.needs.hidden:
            d_hidden = _scaled_directions(saved, up, up_entropy, ctx.hidden_dtype, call)
            d_hidden = tiled.scatter_rows(d_hidden, call.rows, ctx.hidden_shape[0], call.unique_rows)
        if call.needs.head:
            head = tiled.Head(weight, bias, call.compute, call.acc)
            d_weight, d_bias = tiled.backward_head(
                _tiles(call.backend),
                hidden,
                head,
                labels,
                rows,
                call.how,
                call.plan,
                call.needs,
                saved,
                up,
                up_entropy,
            )
        return d_hidden, d_weight, d_bias, None, None


def _scaled_directions(
    saved: tiled.Saved, up: Tensor, up_entropy: Tensor | None, dtype: torch.dtype, call: _Call
) -> Tensor:
    """(N, H) in hidden's dtype: direction * q * upstream, a block of rows at a time (no fp32 copy of it all)."""
    assert saved.direction is not None
    out = torch.empty_like(saved.direction, dtype=dtype)
    for block in tiled.blocks(len(out), call.plan.rows):
        part = saved.direction[block] * (saved.q[block] * up[block])[:, None]
        if up_entropy is not None and saved.entropy_direction is not None:
            part.addcmul_(saved.entropy_direction[block].to(part.dtype), (saved.q[block] * up_entropy[block])[:, None])
        out[block] = part
    return out
