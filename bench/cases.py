"""What is measured: shapes, dtypes and inputs that look like a trained model's."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("forward", "frozen", "trained")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """N scored tokens, hidden size H, vocabulary V; mode: no gradient, d hidden only, or d hidden and d weight."""

    n: int
    h: int
    v: int
    dtype: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.n}x{self.h}x{self.v} {self.dtype} {self.mode}"


# (N, H, V): a small head, and SmolLM2-135M's
CPU_SHAPES = [(512, 512, 32000), (1024, 576, 49152)]
# Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B heads
CUDA_SHAPES = [(4096, 896, 151936), (4096, 2048, 128256), (4096, 4096, 128256)]


def cases(device: str, quick: bool) -> list[Case]:
    shapes = CPU_SHAPES if device == "cpu" else CUDA_SHAPES
    return [
        Case(n, h, v, dtype, mode)
        for n, h, v in (shapes[:1] if quick else shapes)
        for dtype in ("fp32", "bf16")
        for mode in MODES
    ]


def peaked_inputs(n: int, h: int, v: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """hidden (N, H), weight (V, H), labels (N,), with W[y] mixed into h: random logits would be flat, and peers that
    skip small probabilities would look far too fast. The gap z_y - logsumexp(rest) runs over about -6 to 12 nats."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=generator) / math.sqrt(h)
    labels = torch.randint(0, v, (n,), generator=generator)
    hidden = torch.randn(n, h, generator=generator)
    strength = math.log(v) + torch.linspace(-6, 12, n)[torch.randperm(n, generator=generator)]
    hidden += strength[:, None] * weight[labels]
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)
