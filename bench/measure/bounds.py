"""What a path must do at least: FLOPs of its GEMMs and bytes of its tiles, and the time of both at measured rates.

Bytes for each element of N x V, with b the operands' bytes (bf16, fp16: 2; fp32: 4) and products in fp32 (4):

    fastdpo, products in cuBLAS     write z 4; the fold reads it twice (maximum, then sum) 8                    = 12
        with a gradient             + exponentials written b, read by the second GEMM b                         + 2b
        recompute, backward         z written 4, read 4, dlogits written b, read by dW's GEMM b                 + 8 + 2b
        kept, backward              exponentials read b, dlogits written b, read by dW's GEMM b                 + 3b
    fastdpo, products in Triton     z stays in registers                                                        = 0
        with a gradient; kept       as above                                                                + 2b; + 3b
        recompute, backward         dlogits written b, read by dW's GEMM b                                      + 2b
    TRL 1.16                        tile written b, read by the fold b                                          = 2b
        with a gradient             again b + b, dlogits over it b, read by dX's GEMM b                         + 4b
        trained                     read by dW's GEMM b                                                         + b
    eager                           logits written b, log_softmax reads 4 and writes 4                          = 8 + b
        in 16 bits                  + the copy in fp32: read b, written 4                                       + 4 + b
        with a gradient             gather's backward 4 (zeros) + 8, log_softmax's 12, dlogits read by dX's b   + 24 + b
        in 16 bits                  + the copy back: read 4, written b                                          + 4 + b
        trained                     read by dW's GEMM b                                                         + b

In bf16: fastdpo 12 / 16 / 28 (recompute) or 22 (kept), fused 0 / 4 / 8 or 10; TRL 4 / 12 / 14; eager 16 / 48 / 50.
Other peers' bytes are not counted here. On a CPU, where plain torch does the tiles' work and a tile may stay in the
cache, there is no such bound: `traffic.py` counts what the operators move. What is of size N x H or V x H is left
out, for all alike: with V in the hundred thousands and tiles of thousands of rows it is a few per cent. The
GEMMs' rate is that of one `torch.mm` of the very shape, which writes N x V itself, so the bound is not quite the least
possible: a path at 100 % of it has hidden nothing.
"""

from dataclasses import dataclass

from .entries import Entry


@dataclass(frozen=True)
class Work:
    """FLOPs of the GEMMs, bytes of tiles through device memory, and the path's name."""

    flops: float
    tile_bytes: float | None = None
    path: str = ""

    def __add__(self, other: "Work") -> "Work":
        known = self.tile_bytes is not None and other.tile_bytes is not None
        total = (self.tile_bytes or 0) + (other.tile_bytes or 0)
        return Work(self.flops + other.flops, total if known else None, f"{self.path} + {other.path}")

    def bound_ms(self, gemm_tflops: float | None, copy_gbs: float | None) -> float | None:
        """Milliseconds: FLOPs at the GEMM rate (TFLOP/s) plus tile bytes at the copy rate (GB/s, read and written)."""
        if self.tile_bytes is None or not gemm_tflops or not copy_gbs:
            return None
        return self.flops / gemm_tflops / 1e9 + self.tile_bytes / copy_gbs / 1e6


def own_bytes(path: str, fused: bool, operand: int) -> int:
    """Bytes per element of N x V of fastdpo's path: stats, one_pass, kept or recompute."""
    product = 0 if fused else 12
    if path == "stats":
        return product
    forward = product + 2 * operand
    if path == "one_pass":
        return forward
    if path == "kept":
        return forward + 3 * operand
    return forward + (0 if fused else 8) + 2 * operand


def trl_bytes(mode: str, operand: int) -> int:
    """Bytes per element of N x V of TRL 1.16's op."""
    return operand * {"forward": 2, "frozen": 6, "trained": 7}[mode]


def eager_bytes(mode: str, operand: int) -> int:
    """Bytes per element of N x V of matmul, log_softmax and gather (a test counts them operator by operator)."""
    copies = 4 + operand if operand < 4 else 0
    forward = 8 + operand + copies
    if mode == "forward":
        return forward
    return forward + 24 + operand + copies + (operand if mode == "trained" else 0)


def peer_work(
    entry: Entry, mode: str, n: int, h: int, v: int, operand: int, softcap: float | None = None
) -> Work | None:
    """The work of an entry that is not ours, with operands of that many bytes; None where it is not known.

    What eager moves for a softcap is not counted.
    """
    if entry.products is None:
        return None
    counted = entry.tile_bytes if softcap is None or entry.tile_bytes is not eager_bytes else None
    tile_bytes = None if counted is None else float(counted(mode, operand) * n * v)
    return Work(2.0 * n * h * v * entry.products[mode], tile_bytes)
