"""Per-token log-probs and the directions of their gradients, tile by tile: the algorithm.

For a block of rows and each block c of vocabulary columns, y being the row's target:

    z  = (h @ W_c^T + b_c) * logit_scale;  softcap;  / temperature        accumulator precision, never rounded
    m' = max(m, max of z over v != y);  e = exp(z - m'), e_y = 0           the target stays out
    s  = s exp(m - m') + sum e
    A  = A exp(m - m') + (e * dz/dlogit) @ W_c                             only where hidden needs a gradient

and at the end of a row, with d = (m + log s) - z_y:

    logp = -softplus(d),   1 - p_y = sigmoid(d) = q,   d logp / dh = q * (dz/dlogit_y W[y] - A / s)

No cancellation for confident tokens: `direction` = (...) and q are saved apart. The entropy follows from
T = sum e (z - m); its gradient needs a second accumulator B = sum e (z - m) dz/dlogit W.

A `TileOps` (tiles.py) is what touches a tile, in torch or in Triton. The loops, the GEMMs and everything of size N
are shared, and here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdpo.ops.gemm import mm_into, rounds_in_gemm, widen
from fastdpo.ops.linear_logprob.directions import Directions
from fastdpo.ops.linear_logprob.operands import HeadOperands, TokenOperands
from fastdpo.ops.linear_logprob.plan import Needs, Plan, aligned
from fastdpo.ops.linear_logprob.tiles import LogitSpec, RowState, TileOps
from fastdpo.ops.numerics import NEG, blocks, softplus

if TYPE_CHECKING:
    from fastdpo.ops.linear_logprob.fused_tiles import FusedRows


@dataclass
class SavedForBackward:
    """What forward leaves for backward, besides the arguments."""

    q: Tensor  # (N,) 1 - p_y
    direction: Tensor | None = None  # (N, H) d logp / dh / q, in the compute dtype
    entropy_direction: Tensor | None = None  # (N, H) d entropy / dh / q
    lora_direction: Tensor | None = None  # (N, r) d logp / du / q, in the LoRA's own dtype
    lora_entropy_direction: Tensor | None = None  # (N, r)
    m: Tensor | None = None  # (N,)
    s: Tensor | None = None  # (N,)
    zy: Tensor | None = None  # (N,) kept with a softcap only: the target's slope
    entropy: Tensor | None = None  # (N,)
    kept: Tensor | None = None  # (blocks, N, columns) exp(z - base) of each column block, in the compute dtype
    bases: Tensor | None = None  # (blocks, N) the base of each kept column block
    anchor: Tensor | None = None  # (0,) frozen head: joins a gradient to the graph, whose second derivative refuses


def forward(
    tiles: TileOps,
    tokens: TokenOperands,
    head: HeadOperands,
    spec: LogitSpec,
    plan: Plan,
    needs: Needs,
) -> tuple[dict[str, Tensor], SavedForBackward]:
    """Log-probs and statistics, each (N,) in accumulator precision, and what backward needs."""
    labels, v = tokens.labels, len(head.weight)
    n, device, acc = len(labels), tokens.hidden.device, head.acc
    whole = RowState.empty(n, acc, device, spec.stats)
    z_space, e_space = _tile_space(tiles, head, spec, plan, device)
    of_hidden, of_lora = _directions(n, head, plan, needs)
    directions = [x for x in (of_hidden, of_lora) if x is not None]
    kept = bases = None
    if plan.path == "kept":
        kept = torch.empty((-(-v // plan.cols), n, plan.cols), dtype=head.compute, device=device)
        bases = torch.empty((-(-v // plan.cols), n), dtype=acc, device=device)

    wide = not plan.fused
    w_space = head.space(plan.cols, wide)
    for block in blocks(n, plan.rows):
        size = block.stop - block.start
        operand, lora_u = tokens.operand(block, head, wide), tokens.lora_operand(block, head, wide)
        state, label = whole.part(block), labels[block]
        fused = _fused_rows(operand, lora_u, v, state, spec) if plan.fused else None
        for index, columns in enumerate(blocks(v, plan.cols)):
            width = columns.stop - columns.start
            weight, bias = head.block(columns, w_space)
            lora_b = head.lora_block(columns, wide)
            z, e = z_space[:size, :width], e_space[:size, :width]
            if fused is not None:
                e = e if kept is None else kept[index, block, :width]
                fused.fold(weight, label, bias, columns.start, None if plan.path == "stats" else e, lora_b)
                if bases is not None:
                    bases[index, block] = fused.offset
            else:
                products(z, operand, weight, lora_u, lora_b, head)
                tiles.fold(z, e, label - columns.start, bias, state, spec, write=plan.path != "stats")
                if kept is not None and bases is not None:
                    kept[index, block, :width] = e
                    bases[index, block] = torch.where(state.m > NEG / 2, state.m, 0.0)
                    if rounds_in_gemm(device, head.compute, head.compute):
                        e = kept[index, block, :width]  # the next product would round it to the same
            for direction in directions:
                matrix = direction.matrix
                rows_of = weight if matrix is head.weight else widen(matrix[columns], head.compute, acc)
                direction.add(tiles, e, z, columns, rows_of, state)
        if fused is not None:
            fused.finish()
        for direction in directions:
            direction.finish(block, state, state.m if fused is None else fused.offset, label, spec)
        del operand

    results = _finish(whole, spec, v)
    q = results.pop("q")
    saved = SavedForBackward(q, *_both(of_hidden), *_both(of_lora))
    if plan.path in ("kept", "recompute"):
        saved.m, saved.s = whole.m, whole.s
        saved.zy = whole.zy if spec.softcap else None
        saved.kept, saved.bases = kept, bases
        saved.entropy = results.get("entropy") if needs.entropy else None
    return results, saved


def products(
    z: Tensor, operand: Tensor, weight: Tensor, lora_u: Tensor | None, lora_b: Tensor | None, head: HeadOperands
) -> None:
    """z (n, c) = operand @ weight^T, and the LoRA's product on top."""
    mm_into(z, operand, weight.t(), head.compute)
    if lora_u is not None and lora_b is not None:
        mm_into(z, lora_u, lora_b.t(), head.lora_compute, add=True)


def _directions(n: int, head: HeadOperands, plan: Plan, needs: Needs) -> tuple[Directions | None, Directions | None]:
    """For the hidden states, and for a LoRA's."""

    def of(matrix: Tensor, dtype: torch.dtype) -> Directions:
        return Directions(matrix, n, plan.rows, 1 + needs.entropy, dtype, head.compute, head.acc)

    return (
        of(head.weight, head.compute) if needs.hidden else None,
        of(head.lora_b, head.lora_compute) if needs.lora_u and head.lora_b is not None else None,
    )


def _both(directions: Directions | None) -> list[Tensor | None]:
    """d logp and d entropy, those that were summed."""
    return [*(directions.results if directions else ()), None, None][:2]


def _tile_space(
    tiles: TileOps, head: HeadOperands, spec: LogitSpec, plan: Plan, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Memory for a tile of products and one of exponentials; both may be one."""
    rows = 0 if plan.fused else plan.rows  # the products stay in registers
    z_space = torch.empty((rows, plan.cols), dtype=head.acc, device=device)
    if plan.fused:
        rows = 0 if plan.path in ("stats", "kept") else plan.rows
        return z_space, torch.empty((rows, aligned(plan.cols)), dtype=head.compute, device=device)
    e_dtype = tiles.e_dtype(head.compute, head.acc)
    same = e_dtype == head.acc and "entropy" not in spec.stats
    return z_space, z_space if same else torch.empty_like(z_space, dtype=e_dtype)


def _fused_rows(operand: Tensor, lora_u: Tensor | None, columns: int, state: RowState, spec: LogitSpec) -> "FusedRows":
    from fastdpo.ops.linear_logprob.fused_tiles import FusedRows  # triton

    return FusedRows(operand, lora_u, columns, state, spec)


def _finish(state: RowState, spec: LogitSpec, columns: int) -> dict[str, Tensor]:
    log_s = state.s.log()
    d = (state.m - state.zy) + log_s
    up, down = softplus(d), softplus(-d)
    out = {"logprob": -up, "q": torch.exp(-down)}
    if "lse" in spec.stats:
        # from the larger of both: zy + up cancels where the target is far below the rest
        out["lse"] = torch.maximum(state.zy, state.m + log_s) + torch.log1p(torch.exp(-d.abs()))
    if "is_top1" in spec.stats:
        out["is_top1"] = state.zy >= state.m
    s = torch.where(state.s > 0, state.s, 1.0)
    if state.t is not None:
        # H = p_y (-log p_y) + q (entropy of the others + -log q); 0 * inf is 0, and NaN stays
        target = torch.where(up == torch.inf, 0.0, torch.exp(-up) * up)
        others = torch.where(down == torch.inf, 0.0, out["q"] * (s.log() - state.t / s + down))
        out["entropy"] = target + others
    if state.sq is not None:
        out["log_sum_sq_probs"] = torch.logaddexp(-2 * up, -2 * down + state.sq.log() - 2 * s.log())
    if state.zsum is not None:
        out["mean_logit"] = state.zsum / columns
    return out


def scatter_rows(grad: Tensor, rows: Tensor | None, total: int, unique: bool) -> Tensor:
    """(total, H): sums grad's rows (N, H) into their source rows, in a fixed order."""
    if rows is None:
        return grad
    out = grad.new_zeros((total, grad.shape[1]))
    if unique:
        return out.index_copy_(0, rows, grad)
    if grad.device.type == "cpu":
        return out.index_add_(0, rows, grad)  # sequential on a CPU
    return out.index_put_((rows,), grad, accumulate=True)  # sorts first: no atomics
