"""Gradients of the head: weight, bias and a LoRA's B, one block of the vocabulary at a time.

    dW_c = D_c^T @ h,  db_c = sum over rows of D_c,  D = d loss / d product

D is made again from the operands (recompute), or from the exponentials that forward kept: off the target it is a
row's number times an exponential, at the target another number.
"""

import torch
from torch import Tensor

from fastdpo.ops.gemm import mm_into, mm_rounded, rounds_in_gemm
from fastdpo.ops.linear_logprob.forward import SavedForBackward, products
from fastdpo.ops.linear_logprob.operands import HeadOperands, TokenOperands
from fastdpo.ops.linear_logprob.plan import Needs, Plan, aligned
from fastdpo.ops.linear_logprob.tiles import LogitSpec, RowGradient, TileOps
from fastdpo.ops.linear_logprob.torch_tiles import curve_of
from fastdpo.ops.numerics import NEG, blocks


def backward_head(
    tiles: TileOps,
    tokens: TokenOperands,
    head: HeadOperands,
    spec: LogitSpec,
    plan: Plan,
    needs: Needs,
    saved: SavedForBackward,
    upstream: Tensor,
    upstream_entropy: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d loss / d weight (V, H), d bias (V,) and d LoRA's B (V, r), each in its own dtype, each block written once."""
    row = _row_gradient(saved, upstream, upstream_entropy)
    db = torch.empty_like(head.bias) if needs.bias and head.bias is not None else None
    dw = _MatrixGradient(head.weight, tokens.hidden, tokens, head, plan) if needs.weight else None
    d_lora_b = None
    if needs.lora_b and head.lora_b is not None and tokens.lora_u is not None:
        d_lora_b = _MatrixGradient(head.lora_b, tokens.lora_u, tokens, head, plan)
    matrices = [x for x in (dw, d_lora_b) if x is not None]
    scaled = tokens.hidden.device.type == "cpu" and matrices and all(x.once for x in matrices)
    if scaled and saved.kept is not None and len(tokens.labels):
        _kept_products(matrices, db, tokens.labels, spec, plan, head, saved, row)
    else:
        _by_tiles(tiles, matrices, db, tokens, head, spec, plan, saved, row)
    return None if dw is None else dw.out, db, None if d_lora_b is None else d_lora_b.out


class _MatrixGradient:
    """The gradient (V, k) of a matrix whose product's other operand is x (R, k)."""

    def __init__(self, matrix: Tensor, x: Tensor, tokens: TokenOperands, head: HeadOperands, plan: Plan) -> None:
        n, device = len(tokens.labels), x.device
        self.out, self.x, self.tokens, self.head = torch.empty_like(matrix), x, tokens, head
        self.whole = n <= plan.back_rows
        # one row block: the block of the gradient is one product, rounded once, by the GEMM itself
        self.once = self.whole and n > 0 and rounds_in_gemm(device, head.compute, matrix.dtype)
        self.dtype = head.compute if self.once or device.type == "cuda" else head.acc
        self.all: Tensor | None = None
        sums = (0 if self.once else plan.back_cols, matrix.shape[1])
        self.sums = torch.zeros(sums, dtype=head.acc, device=device)

    def operand(self, block: slice) -> Tensor:
        """Rows of x in the dtype that the product takes; kept where they are all rows."""
        if self.all is not None:
            return self.all
        chosen = self.tokens.rounded(self.x, block, self.head.compute).to(self.dtype)
        self.all = chosen if self.whole else None
        return chosen

    def add(self, d: Tensor, block: slice, columns: slice, operand: Tensor | None) -> None:
        """Adds d^T @ x; `operand` holds these rows of x already, perhaps in another dtype."""
        x = operand if operand is not None and operand.dtype == self.dtype else self.operand(block)
        if self.once:
            mm_rounded(self.out[columns], d.to(self.head.compute).t(), x)
        else:
            mm_into(self.sums[: d.shape[1]], d.t(), x, self.head.compute, add=block.start > 0)

    def close(self, columns: slice) -> None:
        """After the last block of rows."""
        if not self.once:
            self.out[columns] = self.sums[: columns.stop - columns.start]


def _by_tiles(
    tiles: TileOps,
    matrices: list[_MatrixGradient],
    db: Tensor | None,
    tokens: TokenOperands,
    head: HeadOperands,
    spec: LogitSpec,
    plan: Plan,
    saved: SavedForBackward,
    row: RowGradient,
) -> None:
    labels, n, v, device, acc = tokens.labels, len(tokens.labels), len(head.weight), tokens.hidden.device, head.acc
    rows, cols, recompute = plan.back_rows, plan.back_cols, saved.kept is None
    d_dtype = head.compute if plan.fused else tiles.e_dtype(head.compute, acc)
    d_space = torch.empty((rows, aligned(cols) if plan.fused else cols), dtype=d_dtype, device=device)
    same = plan.fused or not recompute or (d_dtype == acc and row.entropy is None)
    z_space = d_space if same else torch.empty_like(d_space, dtype=acc)
    wide = not plan.fused
    w_space = head.space(cols, wide) if recompute else None
    operand = lora_u = weight = bias = lora_b = None
    for index, columns in enumerate(blocks(v, cols)):
        width = columns.stop - columns.start
        bias_sums = torch.zeros(width, dtype=acc, device=device) if db is not None else None
        if recompute:
            weight, bias = head.block(columns, w_space)
            lora_b = head.lora_block(columns, wide)
        for block in blocks(n, rows):
            size = block.stop - block.start
            d, label, part = d_space[:size, :width], labels[block] - columns.start, row.part(block)
            if weight is not None:
                if operand is None or n > rows:
                    operand = lora_u = None  # the last block's
                    operand, lora_u = tokens.operand(block, head, wide), tokens.lora_operand(block, head, wide)
                if plan.fused:
                    _fused_dlogits(operand, weight, lora_u, lora_b, label, bias, part, spec, d)
                else:
                    z = z_space[:size, :width]
                    products(z, operand, weight, lora_u, lora_b, head)
                    tiles.dlogits(z, d, label, bias, part, spec)
            else:
                assert saved.kept is not None
                scale = _kept_scale(saved, part, index, block, spec)
                target = _target_gradient(saved, part, block, spec)
                tiles.dlogits_kept(saved.kept[index, block, :width], d, label, scale, target)
            for matrix in matrices:
                matrix.add(d, block, columns, operand if matrix.x is tokens.hidden else lora_u)
            if bias_sums is not None:
                bias_sums += d.sum(0, dtype=acc)
        for matrix in matrices:
            matrix.close(columns)
        if db is not None and bias_sums is not None:
            db[columns] = bias_sums


def _fused_dlogits(
    operand: Tensor,
    weight: Tensor,
    lora_u: Tensor | None,
    lora_b: Tensor | None,
    label: Tensor,
    bias: Tensor | None,
    row: RowGradient,
    spec: LogitSpec,
    d: Tensor,
) -> None:
    from fastdpo.ops.linear_logprob.fused_tiles import dlogits  # triton

    dlogits(operand, weight, label, bias, row, spec, d, lora_u, lora_b)


def _target_gradient(saved: SavedForBackward, row: RowGradient, block: slice, spec: LogitSpec) -> Tensor:
    """d loss / d product at the target's column, (n,), from what is kept."""
    target = row.target * spec.slope
    return target if saved.zy is None else target * curve_of(saved.zy[block].clone(), spec)


def _kept_scale(saved: SavedForBackward, row: RowGradient, index: int, block: slice, spec: LogitSpec) -> Tensor:
    """What turns kept exponentials of one column block into d loss / d product off the target, (n,)."""
    assert saved.bases is not None
    # a base is a running maximum, so at most m; where a row had no maximum yet it is 0, and what is kept is 0 too
    return torch.exp((saved.bases[index, block] - row.m).clamp(max=0.0)) * row.others * spec.slope


def _kept_products(
    matrices: list[_MatrixGradient],
    db: Tensor | None,
    labels: Tensor,
    spec: LogitSpec,
    plan: Plan,
    head: HeadOperands,
    saved: SavedForBackward,
    row: RowGradient,
) -> None:
    """One row block on a CPU: kept^T @ (scaled operand), no pass over the kept tile, targets added."""
    assert saved.kept is not None
    everything, v = slice(0, len(labels)), len(head.weight)
    wide = [matrix.tokens.pick(matrix.x, everything).to(head.acc) for matrix in matrices]
    target = _target_gradient(saved, row, everything, spec)
    for index, columns in enumerate(blocks(v, plan.cols)):
        scale = _kept_scale(saved, row, index, everything, spec)
        kept = saved.kept[index, :, : columns.stop - columns.start].t()
        local = labels - columns.start
        hit = ((local >= 0) & (local < len(kept))).nonzero()[:, 0]
        # labels repeat: their terms are summed in fp32 and added once
        token, place = local[hit].unique(return_inverse=True)
        for matrix, x in zip(matrices, wide, strict=True):
            out = matrix.out
            torch.mm(kept, (x * scale[:, None]).to(head.compute), out=out[columns])
            terms = x.new_zeros((len(token), x.shape[1])).index_add_(0, place, x[hit] * target[hit, None])
            out[columns.start + token] = terms.add_(out[columns.start + token]).to(out.dtype)
        if db is not None:
            sums = torch.mv(kept, scale.to(head.compute)).to(head.acc)
            db[columns] = sums.index_add_(0, local[hit], target[hit])


def _row_gradient(saved: SavedForBackward, upstream: Tensor, upstream_entropy: Tensor | None) -> RowGradient:
    assert saved.m is not None
    assert saved.s is not None
    has_others = saved.s > 0
    s = torch.where(has_others, saved.s, 1.0)
    m = torch.where(saved.m > NEG / 2, saved.m, 0.0)
    q_over_s = saved.q / s
    row = RowGradient(m, -upstream * q_over_s, upstream * saved.q)
    if upstream_entropy is not None:
        # d ent / dz_v = -p_v (log p_v + ent); log p_v = (z_v - m) + log(q / s), and for the target log(1 - q)
        assert saved.entropy is not None
        row.entropy = -upstream_entropy * q_over_s
        # q may be 0: then so is the others' share, and any offset will do
        row.offset = torch.where(has_others & (saved.q > 0), saved.q.log() - s.log() + saved.entropy, 0.0)
        log_p = torch.log1p(-saved.q)
        term = torch.where(saved.q == 1, 0.0, (1 - saved.q) * (log_p + saved.entropy))
        row.target = row.target - upstream_entropy * term
    return row
