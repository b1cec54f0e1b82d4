"""The tensors of a call, and hidden states and head as operands of a product, a block at a time."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.ops.gemm import widen
from fastdpo.ops.linear_logprob.plan import MAX_ROWS
from fastdpo.ops.linear_logprob.settings import Settings
from fastdpo.ops.numerics import blocks


class Operands(NamedTuple):
    """The tensors of a call: R hidden states, N labels, a LoRA of rank r on the head."""

    hidden: Tensor  # (R, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora_u: Tensor | None  # (R, r) u = s A h
    lora_b: Tensor | None  # (V, r) B
    labels: Tensor  # (N,) int64; negative ones are ignored
    rows: Tensor | None  # (N,) int64: each label's row of hidden; None where they line up

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """R, H, V, r."""
        rank = 0 if self.lora_b is None else self.lora_b.shape[1]
        return self.hidden.shape[0], self.hidden.shape[1], self.weight.shape[0], rank

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.hidden.dtype, self.weight.dtype


@dataclass(frozen=True)
class HeadOperands:
    """What hidden states are multiplied by: weight (V, H), bias (V,), and the dtypes of the work.

    `lora_b` (V, r) is B of a LoRA on the head; its product is made in `lora_compute`, which may be wider.
    """

    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype
    acc: torch.dtype
    lora_b: Tensor | None = None
    lora_compute: torch.dtype = torch.float32

    @staticmethod
    def of(operands: Operands, settings: Settings) -> "HeadOperands":
        dtypes = settings.compute, settings.acc
        return HeadOperands(operands.weight, operands.bias, *dtypes, operands.lora_b, settings.lora_compute)

    def space(self, columns: int, wide: bool = True) -> Tensor | None:
        """Memory for `block`'s copy of the weight, where it makes one; not `wide`: in the compute dtype everywhere."""
        device = self.weight.device
        dtype = self.acc if wide and device.type != "cuda" else self.compute
        if self.weight.dtype == self.compute == dtype:
            return None
        return torch.empty((columns, self.weight.shape[1]), dtype=dtype, device=device)

    def block(self, columns: slice, space: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (c, H) as an operand, and the bias (c,), of some columns of the logits."""
        weight = self.weight[columns]
        if space is not None:
            weight = space[: len(weight)].copy_(weight if space.dtype == self.compute else weight.to(self.compute))
        return weight, None if self.bias is None else self.bias[columns].to(self.acc).contiguous()

    def lora_block(self, columns: slice, wide: bool = True) -> Tensor | None:
        """The same columns (c, r) of the LoRA's B."""
        return None if self.lora_b is None else _operand(self.lora_b[columns], self.lora_compute, self.acc, wide)


@dataclass(frozen=True)
class TokenOperands:
    """The scored tokens: hidden (R, H), labels (N,) int64, and rows (N,), each label's row of hidden, or None.

    With `ignored`, negative labels are among them: they score 0, and nothing of their hidden states shows. `lora_u`
    (R, r) is u = s A h of a LoRA on the head.
    """

    hidden: Tensor
    labels: Tensor
    rows: Tensor | None
    ignored: bool = False
    lora_u: Tensor | None = None

    @staticmethod
    def of(operands: Operands, settings: Settings) -> "TokenOperands":
        return TokenOperands(operands.hidden, operands.labels, operands.rows, settings.ignored, operands.lora_u)

    def operand(self, block: slice, head: HeadOperands, wide: bool = True) -> Tensor:
        """Some tokens' hidden states as an operand; not `wide`: in the compute dtype everywhere."""
        return _operand(self.rounded(self.hidden, block, head.compute), head.compute, head.acc, wide)

    def lora_operand(self, block: slice, head: HeadOperands, wide: bool = True) -> Tensor | None:
        """The same tokens' rows of the LoRA's u."""
        if self.lora_u is None:
            return None
        return _operand(self.pick(self.lora_u, block), head.lora_compute, head.acc, wide)

    def pick(self, x: Tensor, block: slice) -> Tensor:
        """Some tokens' rows of `x` (R, k)."""
        chosen = x[block] if self.rows is None else x.index_select(0, self.rows[block])
        if self.ignored:
            # a masked-out position may hold NaN, and 0 * NaN is none of ours
            out = (self.labels[block] < 0)[:, None]
            chosen = chosen.masked_fill(out, 0.0) if self.rows is None else chosen.masked_fill_(out, 0.0)
        return chosen

    def rounded(self, x: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
        """`pick` in another dtype: where rows are many, the copy in x's own dtype exists for some of them at a time."""
        n = block.stop - block.start
        if x.dtype == dtype or n <= MAX_ROWS:
            return self.pick(x, block).to(dtype)
        picked = torch.empty((n, x.shape[1]), dtype=dtype, device=x.device)
        for part in blocks(n, MAX_ROWS):
            picked[part] = self.pick(x, slice(block.start + part.start, block.start + part.stop))
        return picked


def _operand(x: Tensor, compute: torch.dtype, acc: torch.dtype, wide: bool) -> Tensor:
    return widen(x, compute, acc) if wide else x.to(compute)
