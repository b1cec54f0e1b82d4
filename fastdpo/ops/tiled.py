"""Per-token log-probs and their gradients, tile by tile: the algorithm, with the tile work in plain torch.

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

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.ops.gemm import mm_into, mm_sum, rounds_in_gemm, widen
from fastdpo.ops.plan import Needs, Plan
from fastdpo.ops.tiles import NEG, Logits, RowGradient, RowState, TileOps, curve_of, softplus


@dataclass
class Saved:
    """What forward leaves for backward, besides the arguments."""

    q: Tensor  # (N,) 1 - p_y
    direction: Tensor | None = None  # (N, H) d logp / dh / q, in the compute dtype
    entropy_direction: Tensor | None = None  # (N, H) d entropy / dh / q
    m: Tensor | None = None  # (N,)
    s: Tensor | None = None  # (N,)
    zy: Tensor | None = None  # (N,) kept with a softcap only: the target's slope
    entropy: Tensor | None = None  # (N,)
    kept: Tensor | None = None  # (blocks, N, columns) exp(z - base) of each column block, in the compute dtype
    bases: Tensor | None = None  # (blocks, N) the base of each kept column block


def blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


@dataclass(frozen=True)
class Head:
    """The arguments that are not the hidden states: weight (V, H), bias (V,), and the dtypes of the work."""

    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype
    acc: torch.dtype

    def space(self, columns: int) -> Tensor | None:
        """Memory for `block`'s copy of the weight, where it makes one."""
        if self.weight.device.type == "cuda" or self.weight.dtype == self.compute == self.acc:
            return None
        return torch.empty((columns, self.weight.shape[1]), dtype=self.acc, device=self.weight.device)

    def block(self, columns: slice, space: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (c, H) as an operand, and the bias (c,), of some columns of the logits."""
        weight = self.weight[columns].to(self.compute)
        if space is not None:
            weight = space[: len(weight)].copy_(weight)
        return weight, None if self.bias is None else self.bias[columns].to(self.acc).contiguous()


@dataclass(frozen=True)
class Tokens:
    """The scored tokens: hidden (R, H), labels (N,) int64, and rows (N,), each label's row of hidden, or None.

    With `ignored`, negative labels are among them: they score 0, and nothing of their hidden states shows.
    """

    hidden: Tensor
    labels: Tensor
    rows: Tensor | None
    ignored: bool = False

    def operand(self, block: slice, head: Head, wide: bool = True) -> Tensor:
        """Some tokens' hidden states as an operand; not `wide`: in the compute dtype everywhere."""
        chosen = self.hidden[block] if self.rows is None else self.hidden.index_select(0, self.rows[block])
        if self.ignored:
            # a masked-out position may hold NaN, and 0 * NaN is none of ours
            chosen = chosen.masked_fill((self.labels[block] < 0)[:, None], 0.0)
        return widen(chosen, head.compute, head.acc) if wide else chosen.to(head.compute)


def forward(
    tiles: TileOps,
    tokens: Tokens,
    head: Head,
    how: Logits,
    plan: Plan,
    needs: Needs,
) -> tuple[dict[str, Tensor], Saved]:
    """Log-probs and statistics, each (N,) in accumulator precision, and what backward needs."""
    labels, h, v = tokens.labels, tokens.hidden.shape[1], len(head.weight)
    n, device, acc = len(labels), tokens.hidden.device, head.acc
    whole = RowState.empty(n, acc, device, how.stats)
    z_space = torch.empty((plan.rows, plan.cols), dtype=acc, device=device)
    e_dtype = tiles.e_dtype(head.compute, acc)
    same = e_dtype == acc and "entropy" not in how.stats
    e_space = z_space if same else torch.empty_like(z_space, dtype=e_dtype)
    directions = [torch.empty((n, h), dtype=head.compute, device=device) for _ in range(needs.directions)]
    sums = [torch.empty((plan.rows, h), dtype=acc, device=device) for _ in range(needs.directions)]
    kept = bases = None
    if plan.path == "kept":
        kept = torch.empty((-(-v // plan.cols), n, plan.cols), dtype=head.compute, device=device)
        bases = torch.empty((-(-v // plan.cols), n), dtype=acc, device=device)

    w_space = head.space(plan.cols)
    for block in blocks(n, plan.rows):
        size = block.stop - block.start
        operand = tokens.operand(block, head)
        state = whole.part(block)
        label = labels[block]
        for index, columns in enumerate(blocks(v, plan.cols)):
            width = columns.stop - columns.start
            weight, bias = head.block(columns, w_space)
            z, e = z_space[:size, :width], e_space[:size, :width]
            mm_into(z, operand, weight.t(), head.compute)
            tiles.fold(z, e, label - columns.start, bias, state, how, write=plan.path != "stats")
            if kept is not None and bases is not None:
                kept[index, block, :width] = e
                bases[index, block] = torch.where(state.m > NEG / 2, state.m, 0.0)
                if rounds_in_gemm(device, head.compute, head.compute):
                    e = kept[index, block, :width]  # the next product would round it to the same
            if directions:
                _accumulate(sums, size, index == 0, e, z, weight, state, head, columns)
        if directions:
            _finish_directions(directions, sums, block, size, state, label, head, how)
        del operand

    results = _finish(whole, how, v)
    q = results.pop("q")
    saved = Saved(q, *directions)
    if plan.path in ("kept", "recompute"):
        saved.m, saved.s = whole.m, whole.s
        saved.zy = whole.zy if how.softcap else None
        saved.kept, saved.bases = kept, bases
        saved.entropy = results.get("entropy") if needs.entropy else None
    return results, saved


def _accumulate(
    sums: list[Tensor],
    size: int,
    first: bool,
    e: Tensor,
    z: Tensor,
    weight: Tensor,
    state: RowState,
    head: Head,
    columns: slice,
) -> None:
    a, stored = sums[0][:size], head.weight[columns]
    if len(sums) > 1:
        b = sums[1][:size]
        if not first:
            b.addcmul_(a, state.drop[:, None]).mul_(state.ratio[:, None])
        mm_sum(b, z, weight, stored, head.compute, add=not first)
    if not first:
        a.mul_(state.ratio[:, None])
    mm_sum(a, e, weight, stored, head.compute, add=not first)


def _finish_directions(
    directions: list[Tensor],
    sums: list[Tensor],
    block: slice,
    size: int,
    state: RowState,
    label: Tensor,
    head: Head,
    how: Logits,
) -> None:
    # no column but the target's: A is 0, and so is the gradient
    s = torch.where(state.s > 0, state.s, 1.0)
    target = head.weight.index_select(0, label.clamp(min=0)).to(head.compute).to(head.acc)
    if how.softcap:
        target.mul_(curve_of(state.zy.clone(), how)[:, None])
    a = sums[0][:size]
    if len(sums) > 1:
        # d ent / dh = -q [(B - E A) / s + p_y (z_y - E_rest) W_y], z relative to m, E the mean of z over all v and
        # E_rest over v != y; z_y - E = q (z_y - E_rest) took q out of the target's term
        assert state.t is not None
        b, rest = sums[1][:size], state.t / s
        gap = torch.where(state.s > 0, state.zy - state.m, 0.0) - rest
        p = torch.sigmoid(state.zy - state.m - s.log())
        pull = torch.where(p == 0, 0.0, p * gap)  # gap is -inf for a target that cannot occur
        b.addcmul_(a, (rest + pull)[:, None], value=-1).div_(s[:, None])
        b.addcmul_(target, pull[:, None]).mul_(-how.slope)
        directions[1][block] = b
    a.div_(s[:, None]).sub_(target).mul_(-how.slope)
    directions[0][block] = a


def _finish(state: RowState, how: Logits, columns: int) -> dict[str, Tensor]:
    log_s = state.s.log()
    d = (state.m - state.zy) + log_s
    up, down = softplus(d), softplus(-d)
    out = {"logprob": -up, "q": torch.exp(-down)}
    if "lse" in how.stats:
        # from the larger of both: zy + up cancels where the target is far below the rest
        out["lse"] = torch.maximum(state.zy, state.m + log_s) + torch.log1p(torch.exp(-d.abs()))
    if "is_top1" in how.stats:
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


def backward_head(
    tiles: TileOps,
    tokens: Tokens,
    head: Head,
    how: Logits,
    plan: Plan,
    needs: Needs,
    saved: Saved,
    upstream: Tensor,
    upstream_entropy: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """d loss / d weight (V, H) and d bias (V,) in the weight's dtype, each vocabulary block written once."""
    assert saved.m is not None
    assert saved.s is not None
    labels, h, v = tokens.labels, tokens.hidden.shape[1], len(head.weight)
    n, device, acc = len(labels), tokens.hidden.device, head.acc
    row = _row_gradient(saved, upstream, upstream_entropy)
    dw = torch.empty_like(head.weight) if needs.weight else None
    db = torch.empty_like(head.bias) if needs.bias and head.bias is not None else None
    # one row block: the block of dW is one product, rounded once, by the GEMM itself
    once = dw is not None and n <= plan.rows and rounds_in_gemm(device, head.compute, dw.dtype)
    if dw is not None and once and n and saved.kept is not None and device.type == "cpu":
        _kept_products(dw, db, tokens, how, plan, head, saved, row)
        return dw, db
    e_dtype = tiles.e_dtype(head.compute, acc)
    e_space = torch.empty((plan.rows, plan.cols), dtype=e_dtype, device=device)
    recompute = saved.kept is None
    same = e_dtype == acc and row.entropy is None
    z_space = e_space if same or not recompute else torch.empty_like(e_space, dtype=acc)
    narrow = tokens.operand(slice(0, n), head, wide=False) if once else None
    w_space = head.space(plan.cols) if recompute else None
    dw_space = torch.empty((0 if once else plan.cols, h), dtype=acc, device=device)

    for index, columns in enumerate(blocks(v, plan.cols)):
        width = columns.stop - columns.start
        weight, bias = head.block(columns, w_space) if recompute else (None, None)
        sums = dw_space[:width]
        bias_sums = torch.zeros(width, dtype=acc, device=device) if db is not None else None
        for block in blocks(n, plan.rows):
            size = block.stop - block.start
            e, label = e_space[:size, :width], labels[block] - columns.start
            part = row.part(block)
            operand = None if once and not recompute else tokens.operand(block, head)
            if weight is not None and operand is not None:
                z = z_space[:size, :width]
                mm_into(z, operand, weight.t(), head.compute)
                tiles.dlogits(z, e, label, bias, part, how)
            else:
                assert saved.kept is not None
                assert saved.bases is not None
                scale = _kept_scale(saved, part, index, block, how)
                target = _target_gradient(saved, part, block, how)
                tiles.dlogits_kept(saved.kept[index, block, :width], e, label, scale, target)
            if dw is not None and narrow is not None:
                torch.mm(e.to(head.compute).t(), narrow, out=dw[columns])
            elif dw is not None and operand is not None:
                mm_into(sums, e.t(), operand, head.compute, add=block.start > 0)
            if bias_sums is not None:
                bias_sums += e.sum(0, dtype=acc)
            del operand
        if dw is not None and not (once and n):
            dw[columns] = sums if n else 0
        if db is not None and bias_sums is not None:
            db[columns] = bias_sums
    return dw, db


def _target_gradient(saved: Saved, row: RowGradient, block: slice, how: Logits) -> Tensor:
    """d loss / d product at the target's column, (n,), from what is kept."""
    target = row.target * how.slope
    return target if saved.zy is None else target * curve_of(saved.zy[block].clone(), how)


def _kept_scale(saved: Saved, row: RowGradient, index: int, block: slice, how: Logits) -> Tensor:
    """What turns kept exponentials of one column block into d loss / d product off the target, (n,)."""
    assert saved.bases is not None
    # a base is a running maximum, so at most m; where a row had no maximum yet it is 0, and what is kept is 0 too
    return torch.exp((saved.bases[index, block] - row.m).clamp(max=0.0)) * row.others * how.slope


def _kept_products(
    dw: Tensor,
    db: Tensor | None,
    tokens: Tokens,
    how: Logits,
    plan: Plan,
    head: Head,
    saved: Saved,
    row: RowGradient,
) -> None:
    """dW (and db) of one row block on a CPU: kept^T @ (scaled hidden), no pass over the kept tile, targets added."""
    assert saved.kept is not None
    labels, everything = tokens.labels, slice(0, len(tokens.labels))
    wide = tokens.operand(everything, head)
    target = _target_gradient(saved, row, everything, how)
    for index, columns in enumerate(blocks(len(dw), plan.cols)):
        scale = _kept_scale(saved, row, index, everything, how)
        kept = saved.kept[index, :, : columns.stop - columns.start].t()
        torch.mm(kept, (wide * scale[:, None]).to(head.compute), out=dw[columns])
        local = labels - columns.start
        hit = ((local >= 0) & (local < len(kept))).nonzero()[:, 0]
        # labels repeat: their terms are summed in fp32 and added once
        token, place = local[hit].unique(return_inverse=True)
        terms = wide.new_zeros((len(token), wide.shape[1])).index_add_(0, place, wide[hit] * target[hit, None])
        dw[columns.start + token] = terms.add_(dw[columns.start + token]).to(dw.dtype)
        if db is not None:
            sums = torch.mv(kept, scale.to(head.compute)).to(head.acc)
            db[columns] = sums.index_add_(0, local[hit], target[hit])


def _row_gradient(saved: Saved, upstream: Tensor, upstream_entropy: Tensor | None) -> RowGradient:
    assert saved.m is not None
    assert saved.s is not None
    some = saved.s > 0
    s = torch.where(some, saved.s, 1.0)
    m = torch.where(saved.m > NEG / 2, saved.m, 0.0)
    rest = saved.q / s
    row = RowGradient(m, -upstream * rest, upstream * saved.q)
    if upstream_entropy is not None:
        # d ent / dz_v = -p_v (log p_v + ent); log p_v = (z_v - m) + log(q / s), and for the target log(1 - q)
        assert saved.entropy is not None
        row.entropy = -upstream_entropy * rest
        # q may be 0: then so is the others' share, and any offset will do
        row.offset = torch.where(some & (saved.q > 0), saved.q.log() - s.log() + saved.entropy, 0.0)
        log_p = torch.log1p(-saved.q)
        term = torch.where(saved.q == 1, 0.0, (1 - saved.q) * (log_p + saved.entropy))
        row.target = row.target - upstream_entropy * term
    return row


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
