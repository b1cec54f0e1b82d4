"""The op as an autograd Function: what is saved, and a backward that is a row scale where the head is frozen."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.ops import tiled
from fastdpo.ops.tiles import TileOps, TorchTiles

if TYPE_CHECKING:
    from fastdpo.ops.call import Call


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: "Call", names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        head = tiled.Head(weight, bias, call.compute, call.acc)
        tiles = _tiles(call.backend)
        labels = call.labels if call.scored is None else call.labels.where(call.scored, -1)
        tokens = tiled.Tokens(hidden, labels, call.rows, ignored=call.scored is not None)
        found, saved = tiled.forward(tiles, tokens, head, call.how, call.plan, call.needs)
        if call.scored is not None:
            saved.q = saved.q.where(call.scored, 0.0)
        ctx.call = call
        ctx.names = names
        ctx.saved_names = [name for name, x in vars(saved).items() if x is not None]
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        # rows are saved in any case: autograd then notices a change in place
        arguments = (*((hidden, weight, bias, labels) if call.needs.head else (None,) * 4), call.rows)
        ctx.save_for_backward(*arguments, *(getattr(saved, name) for name in ctx.saved_names))
        fixed = [x for name, x in found.items() if name != "logprob" and not (name == "entropy" and call.needs.entropy)]
        ctx.mark_non_differentiable(*fixed)
        return tuple(found[name] for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
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
            d_hidden = tiled.scatter_rows(d_hidden, rows, ctx.hidden_shape[0], call.unique_rows)
        if call.needs.head:
            head = tiled.Head(weight, bias, call.compute, call.acc)
            d_weight, d_bias = tiled.backward_head(
                _tiles(call.backend),
                tiled.Tokens(hidden, labels, rows, ignored=call.scored is not None),
                head,
                call.how,
                call.plan,
                call.needs,
                saved,
                up,
                up_entropy,
            )
        return d_hidden, d_weight, d_bias, None, None


def _scaled_directions(
    saved: tiled.Saved, up: Tensor, up_entropy: Tensor | None, dtype: torch.dtype, call: "Call"
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


def _tiles(backend: str) -> TileOps:
    if backend == "triton":
        from fastdpo.ops.triton_tiles import TritonTiles

        return TritonTiles()
    return TorchTiles()
