"""The fused route: products, logits and fold in one Triton kernel, for 16-bit operands.

It takes the place of a GEMM and `TileOps` inside the loops of forward.py. Exponentials are relative to a row's `offset`
(kernels/fused_fold.py), not to its running maximum, and the row's numbers are merged once, from the partial results of
all column blocks: they are the same bits whatever the tile was, and whether anything was written.
"""

import torch
from torch import Tensor

from fastdpo.kernels import configs, fused_offsets
from fastdpo.kernels.fused_dlogits import fused_dlogits
from fastdpo.kernels.fused_fold import fused_fold
from fastdpo.ops.linear_logprob.tiles import LogitSpec, RowGradient, RowState
from fastdpo.ops.numerics import NEG

# nats by which an exponential may exceed its offset: e^60 fits bf16 and leaves fp32 sums room, e^8 fits fp16
WINDOW = {torch.bfloat16: 60.0, torch.float16: 8.0}


class FusedRows:
    """One block of rows on its way through the vocabulary."""

    def __init__(self, operand: Tensor, lora_u: Tensor | None, columns: int, state: RowState, spec: LogitSpec) -> None:
        self.config = configs.fold_config(configs.arch_of(operand.device), bool(spec.softcap))
        self.operand, self.lora_u = _unit_stride(operand), None if lora_u is None else _unit_stride(lora_u)
        self.state, self.spec = state, spec
        self.window = WINDOW[operand.dtype]
        n, blocks = len(operand), -(-columns // self.config.block_cols)
        names = ("m", "s", *(name for name in ("t", "sq", "zsum") if getattr(state, name) is not None))
        space = torch.empty((len(names), blocks, n), dtype=torch.float32, device=operand.device)
        self.partials = dict(zip(names, space, strict=True))
        self.offset = torch.full((n,), NEG, dtype=torch.float32, device=operand.device)
        self.before = torch.empty_like(self.offset)

    def fold(
        self,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        start: int,
        e: Tensor | None,
        lora_b: Tensor | None = None,
    ) -> None:
        """Folds the columns from `start` on; leaves their exponentials, relative to `offset`, in e (n, c).

        state.ratio (n,) is then exp(the offset before - the offset now).
        """
        weight = _unit_stride(weight)
        lora = _pair(self.lora_u, lora_b)
        first, width = start // self.config.block_cols, self.config.block_cols
        part = {name: x[first : first - (-len(weight) // width)] for name, x in self.partials.items()}
        options = {"scale": self.spec.scale, "softcap": self.spec.softcap, "cap": self.spec.cap}
        local = labels - start
        if e is None:
            fused_fold(self.operand, weight, local, bias, lora, part, self.state.zy, self.config, **options)
            return
        if start == 0:
            # a first guess at the offset: the maximum over one block, which is then done again
            head = (self.operand, weight[:width], local, None if bias is None else bias[:width])
            few = None if lora is None else (lora[0], lora[1][:width])
            fused_fold(*head, few, {k: x[:1] for k, x in part.items()}, self.state.zy, self.config, **options)
            self.offset.copy_(part["m"][0])
        self.offset, self.before = self.before, self.offset
        fused_fold(
            self.operand,
            weight,
            local,
            bias,
            lora,
            part,
            self.state.zy,
            self.config,
            e=e,
            offset=self.before,
            window=self.window,
            **options,
        )
        fused_offsets.advance(part["m"], self.before, self.offset, self.state.ratio, self.window)
        fused_offsets.rebase(e, part["m"], self.before, self.offset, width, self.window)

    def finish(self) -> None:
        """Merges the partial results into the rows' state."""
        fused_offsets.merge(self.partials, {name: getattr(self.state, name) for name in self.partials})


def dlogits(
    operand: Tensor,
    weight: Tensor,
    local: Tensor,
    bias: Tensor | None,
    row: RowGradient,
    spec: LogitSpec,
    d: Tensor,
    lora_u: Tensor | None = None,
    lora_b: Tensor | None = None,
) -> None:
    """d (n, c) = d loss / d product of the columns of `weight` (c, H), made again from the operands."""
    config = configs.dlogits_config(configs.arch_of(operand.device))
    numbers = {"m": row.m, "others": row.others, "target": row.target}
    scales = {"scale": spec.scale, "softcap": spec.softcap, "cap": spec.cap, "slope": spec.slope}
    lora = _pair(lora_u, lora_b)
    fused_dlogits(_unit_stride(operand), _unit_stride(weight), local, bias, lora, d, config, **numbers, **scales)


def _pair(lora_u: Tensor | None, lora_b: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """A LoRA as the kernels' launchers take it."""
    return None if lora_u is None or lora_b is None else (_unit_stride(lora_u), _unit_stride(lora_b))


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read rows as they lie in memory."""
    return x if x.stride(1) == 1 else x.contiguous()
