"""Which path a call takes and how it is tiled: pure functions of shapes, dtypes and budgets.

Letters: N scored tokens, H hidden size, V vocabulary. The path follows from what needs a gradient (FLOPs in
units of NHV; one GEMM is 2):

    stats      no gradient needed                       forward 2
    one_pass   hidden needs one, the head is frozen     forward 4, backward 0 (a row scale)
    kept       the head is trained, exp tile is kept    forward 4, backward 2
    recompute  the head is trained, it is not kept      forward 4, backward 4

(forward 2 instead of 4 where hidden needs no gradient; + 2 where the entropy's gradient is needed.) The tile
depends on shapes, dtypes and the budget only, never on the path: the reference pass folds the same tiles in the
same order as the policy's, so equal inputs give equal bits.
"""

from dataclasses import dataclass, replace

from fastdpo.ops.switches import MIB

MAX_ROWS = 1024  # a multiple of every GEMM tile; W is streamed once per row block
MAX_COLS = 8192
MAX_COLS_CPU = 4096  # narrower tiles pay a fixed cost per product in oneDNN, wider ones leave the cache
MAX_COLS_FUSED = 32768  # no fp32 tile: what is stored is the exponentials alone
MIN_COLS_ONCE = 512  # a product with fewer columns of dW at a time is not worth making it over all rows
COL_QUANTUM = 128
ONEDNN_SCRATCH = 128 << 10  # what a bf16 product allocates beyond the copies of its operands


@dataclass(frozen=True)
class Needs:
    """What the caller will differentiate."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_u: bool = False
    lora_b: bool = False
    entropy: bool = False  # the entropy's own gradient, in addition to the log-prob's

    @property
    def operands(self) -> list[str]:
        """The names of the operands that need a gradient, in the order of `Operands`."""
        return [name for name, need in vars(self).items() if need and name != "entropy"]

    @property
    def head(self) -> bool:
        return self.weight or self.bias or self.lora_b

    @property
    def directions(self) -> int:
        """Accumulators of gradient directions per token: d logp / dh, and d entropy / dh."""
        return (1 + self.entropy) * self.hidden

    @property
    def lora_directions(self) -> int:
        return (1 + self.entropy) * self.lora_u


@dataclass(frozen=True)
class Shape:
    """Sizes and bytes per element of one call.

    Attributes:
        n, h, v: scored tokens, hidden size, vocabulary.
        source_rows: rows of `hidden` (its gradient's rows); n where tokens and rows coincide.
        compute: bytes of the dtype in which the operands enter the GEMMs.
        acc: bytes of the accumulators (4, or 8 for float64).
        hidden, weight: bytes per element of the arguments themselves.
        widened: the GEMMs take accumulator-typed copies of the operands (only CUDA has an fp32 product of bf16
            operands).
        gathered: tokens are picked from `hidden` by rows; flattened: `hidden` is a view that must be copied first.
        extra_tiles: tiles beside the logits': one for the exponentials where the entropy is asked for, one for
            the softcap's slope (torch only).
        curved: there is a softcap.
        fused: product and fold are one kernel, which leaves `partials` numbers per row and `block_cols` columns.
        rank: of a LoRA on the head, 0 without one.
        spare: a product is made before it is added (see `gemm.adds_in_gemm`).
    """

    n: int
    h: int
    v: int
    source_rows: int
    compute: int
    acc: int
    hidden: int
    weight: int
    widened: bool
    extra_tiles: int = 0
    curved: bool = False
    gathered: bool = False
    flattened: bool = False
    fused: bool = False
    block_cols: int = COL_QUANTUM
    partials: int = 2
    rank: int = 0
    spare: bool = False


@dataclass(frozen=True)
class Plan:
    """The path, its tile, and what it will cost."""

    path: str  # "stats" | "one_pass" | "kept" | "recompute"
    rows: int  # rows of a tile; blocks are balanced, so the last one is at most as long
    cols: int
    back_rows: int  # the same of the tiles of which dW is made
    back_cols: int
    fused: bool  # product and fold are one kernel
    flops: int  # of the GEMMs, forward and backward
    workspace: int  # bytes, freed when forward (or backward) returns
    peak_bytes: int  # above the arguments, over forward and backward, results and gradients included

    def __str__(self) -> str:
        return (
            f"{self.path}{' (fused)' if self.fused else ''}: tiles of {self.rows} x {self.cols}, "
            f"{self.flops / 1e12:.3f} TFLOP, "
            f"peak {self.peak_bytes / MIB:.1f} MiB above the arguments"
        )


def make_plan(shape: Shape, needs: Needs, workspace: int, keep: int) -> Plan:
    """Chooses path and tile for a call and predicts its peak bytes and FLOPs.

    Args:
        shape, needs: sizes, and which gradients are needed.
        workspace, keep: budgets in bytes, of a tile's work and of kept exponentials.
    """
    path, rows, cols = route(shape, needs, workspace, keep)
    kept_size = _kept_bytes(shape, cols)
    back_rows, back_cols = rows, cols
    if path == "recompute":
        back_rows, back_cols = back_tile(shape, workspace, rows, cols)
    again = path == "recompute"
    main = 1 + needs.directions + again + needs.weight
    lora = 1 + needs.lora_directions + again + needs.lora_b
    flops = 2 * shape.n * shape.v * (shape.h * main + shape.rank * lora)

    writes = path != "stats" and path != "kept" if shape.fused else True
    directions = max(needs.directions, int(needs.lora_directions > 0))  # a LoRA's u takes the same copies
    forward = forward_workspace(shape, rows, cols, directions, writes) + _lora_workspace(shape, rows, cols)
    scale = 2 * rows * shape.h * shape.acc if needs.hidden else 0  # a block of scaled directions
    backward = scale
    if needs.head:
        again_at = (shape, back_rows, back_cols)
        backward = max(scale, backward_workspace(*again_at) + _lora_workspace(*again_at))
    # results, what is saved of size N, and compacted labels and rows
    vectors = shape.n * (16 * shape.acc + 4 * 8)
    saved = needs.directions * shape.n * shape.h * shape.compute + (kept_size if path == "kept" else 0)
    saved += needs.lora_directions * shape.n * shape.rank * shape.acc
    scattered = shape.n if shape.gathered else 0
    gradients = needs.hidden * shape.hidden * shape.h * (shape.source_rows + scattered)
    gradients += needs.weight * shape.v * shape.h * shape.weight + needs.bias * shape.v * shape.weight
    gradients += needs.lora_u * shape.acc * shape.rank * (shape.source_rows + scattered)
    gradients += needs.lora_b * shape.v * shape.rank * shape.acc
    flat = shape.flattened * shape.source_rows * shape.h * shape.hidden
    peak = flat + vectors + saved + max(forward, gradients + backward)
    return Plan(path, rows, cols, back_rows, back_cols, shape.fused, flops, max(forward, backward), peak)


def route(shape: Shape, needs: Needs, workspace: int, keep: int) -> tuple[str, int, int]:
    """(path, rows, cols) of a plan: all that the shapes of what is saved depend on, so it takes symbolic sizes too."""
    rows, cols = _fused_tile(shape, workspace, needs) if shape.fused else tile(shape, workspace)
    if not needs.head:
        path = "one_pass" if needs.hidden or needs.lora_u else "stats"
    else:
        path = "kept" if not needs.entropy and _kept_bytes(shape, cols) <= keep else "recompute"
    return path, rows, cols


def _kept_bytes(shape: Shape, cols: int) -> int:
    return shape.n * _cdiv(shape.v, cols) * (cols * shape.compute + shape.acc)


def tile(shape: Shape, workspace: int) -> tuple[int, int]:
    """(rows, cols) of a tile whose workspace fits the budget: balanced row blocks, wide columns."""
    # as if every statistic were asked for: what is asked for must not change the tile, and so the bits
    shape = replace(shape, extra_tiles=1 + shape.curved)
    n, v = max(shape.n, 1), max(shape.v, 1)
    per_row = 3 * shape.h * shape.acc  # accumulator, gathered target rows, widened hidden rows
    most = max(16, min(MAX_ROWS, workspace // 2 // per_row))
    rows = _cdiv(n, _cdiv(n, most))
    cap = MAX_COLS_CPU if shape.widened else MAX_COLS
    fixed = forward_workspace(shape, rows, 0, 1)
    per_col = max(
        forward_workspace(shape, rows, 1, 1) - fixed,
        backward_workspace(shape, rows, 1) - backward_workspace(shape, rows, 0),
    )
    cols = min(cap, (workspace - fixed) // per_col) // COL_QUANTUM * COL_QUANTUM
    return rows, min(v, max(COL_QUANTUM, cols))


def _fused_tile(shape: Shape, workspace: int, needs: Needs) -> tuple[int, int]:
    """(rows, cols) for the fused kernel, whose bits do not depend on it: half the budget is the exponentials'."""
    n, v = max(shape.n, 1), max(shape.v, 1)
    partials = _cdiv(v, shape.block_cols) * shape.partials * shape.acc
    per_row = partials + (3 * shape.h * shape.acc if needs.directions else 0) + _casts(shape, 1, 0)
    rows = _cdiv(n, _cdiv(n, max(16, min(MAX_ROWS, workspace // 2 // per_row))))
    writes = needs.hidden or needs.head
    per_col = rows * shape.compute * int(writes) + _casts(shape, 0, 1)
    fixed = forward_workspace(shape, rows, 0, needs.directions)
    most = min(MAX_COLS_FUSED, (workspace - fixed) // per_col) if per_col else v
    quantum = max(COL_QUANTUM, shape.block_cols)
    return rows, v if most >= v else max(quantum, most // quantum * quantum)


def back_tile(shape: Shape, workspace: int, rows: int, cols: int) -> tuple[int, int]:
    """(rows, cols) of the tiles that are made again for dW: all rows at once where enough columns fit the budget.

    Then a block of dW is one product, summed in fp32 inside it and rounded once.
    """
    if shape.widened:
        return rows, cols
    n = max(shape.n, 1)
    per_col = backward_workspace(shape, n, 1) - backward_workspace(shape, n, 0)
    # a copy of picked hidden rows comes on top: it is as large as what is saved for backward
    most = min(MAX_COLS_FUSED, (workspace - n * 32 * shape.acc) // per_col) // COL_QUANTUM * COL_QUANTUM
    if most < min(MIN_COLS_ONCE, shape.v):
        return rows, cols
    return n, min(shape.v, most)


def forward_workspace(shape: Shape, rows: int, cols: int, directions: int, writes: bool = True) -> int:
    """Bytes of a forward tile, its operands' copies and the accumulators."""
    if shape.fused:
        partials = rows * _cdiv(shape.v, shape.block_cols) * shape.partials * shape.acc
        size = partials + rows * aligned(cols) * shape.compute * int(writes)
    else:
        size = rows * cols * shape.acc * (1 + shape.extra_tiles)
    if shape.widened:
        size += _copies(shape) * ((rows + cols) * shape.h * shape.acc + max(rows, 64) * shape.h * 2 + ONEDNN_SCRATCH)
        if directions:
            size += _copies(shape) * rows * cols * 2  # the exponentials in bf16
    elif shape.compute != shape.acc and not shape.fused:
        size += rows * cols * shape.compute  # the exponentials in the operands' dtype
    size += _casts(shape, rows, cols)
    size += directions * rows * shape.h * shape.acc
    if directions:
        # the target's row of W: as stored, rounded, widened
        size += rows * shape.h * (shape.acc + shape.weight + shape.compute)
        size += rows * shape.h * shape.acc * shape.spare
    return size + rows * 32 * shape.acc


def backward_workspace(shape: Shape, rows: int, cols: int) -> int:
    """Bytes of a backward tile, its operands' copies and, where rows come in blocks, one vocabulary block of dW."""
    size = 0 if shape.fused else rows * cols * shape.acc * (1 + shape.extra_tiles)
    if shape.widened or rows < shape.n:
        size += cols * shape.h * shape.acc * (1 + shape.spare)
    if shape.widened:
        size += _copies(shape) * (rows + cols) * shape.h * shape.acc
        # oneDNN's own bf16 copies of the operands of tile^T @ hidden
        size += _copies(shape) * (rows * cols * 2 + max(rows, 64) * shape.h * 4 + ONEDNN_SCRATCH)
    elif shape.compute != shape.acc:
        size += rows * (aligned(cols) if shape.fused else cols) * shape.compute
    return size + _casts(shape, rows, cols) + rows * 32 * shape.acc + cols * 2 * shape.acc


def _copies(shape: Shape) -> int:
    return int(shape.compute != shape.acc or shape.hidden != shape.acc or shape.weight != shape.acc)


def _lora_workspace(shape: Shape, rows: int, cols: int) -> int:
    """Operands, sums and target rows of a LoRA on the head, of which no tile depends."""
    again = rows * cols * shape.acc if shape.spare and shape.rank and not shape.fused else 0
    return shape.rank * (2 * cols + 6 * rows) * shape.acc + again


def _casts(shape: Shape, rows: int, cols: int) -> int:
    """Gathered hidden rows, and operands rounded to the compute dtype first (autocast over fp32 weights)."""
    rounded = shape.hidden != shape.compute
    # rounded rows are picked a few at a time
    size = (min(rows, MAX_ROWS) if rounded else rows) * shape.h * shape.hidden if shape.gathered else 0
    if rounded:
        size += rows * shape.h * shape.compute
    if shape.weight != shape.compute:
        size += cols * shape.h * shape.compute
    return size


def aligned(columns: int) -> int:
    """Columns of a 16-bit tile whose rows start at multiples of 16 bytes, as TMA wants them."""
    return _cdiv(columns, 8) * 8


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
