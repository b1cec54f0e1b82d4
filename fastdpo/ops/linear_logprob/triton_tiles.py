"""`TileOps` in Triton: hands a tile to the kernels of `fastdpo.kernels.fold`."""

import torch
from torch import Tensor

from fastdpo.kernels import fused_offsets
from fastdpo.kernels.fold import dlogits_tile, fold_tile
from fastdpo.ops.linear_logprob.tiles import LogitSpec, RowGradient, RowState


class TritonTiles:
    def e_dtype(self, compute: torch.dtype, acc: torch.dtype) -> torch.dtype:
        return compute

    def fold(
        self,
        z: Tensor,
        e: Tensor,
        local: Tensor,
        bias: Tensor | None,
        state: RowState,
        spec: LogitSpec,
        write: bool,
    ) -> None:
        fold_tile(z, e, local, bias, **vars(state), scale=spec.scale, softcap=spec.softcap, cap=spec.cap, write=write)

    def dlogits(
        self, z: Tensor, e: Tensor, local: Tensor, bias: Tensor | None, row: RowGradient, spec: LogitSpec
    ) -> None:
        options = {"scale": spec.scale, "softcap": spec.softcap, "cap": spec.cap, "slope": spec.slope}
        dlogits_tile(z, e, local, bias, **vars(row), **options)

    def dlogits_kept(self, kept: Tensor, e: Tensor, local: Tensor, scale: Tensor, target: Tensor) -> None:
        dlogits_tile(kept, e, local, others=scale, target=target)

    def rescale(self, sums: Tensor, ratio: Tensor) -> None:
        fused_offsets.rescale(sums, ratio)
