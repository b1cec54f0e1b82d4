"""What is measured: the heads of real models, shapes in order of importance, and inputs like a trained model's."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("forward", "frozen", "trained")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Head:
    """A model's output head: hidden size H, vocabulary V (rows of its weight), and the softcap of its logits."""

    model: str
    h: int
    v: int
    softcap: float | None = None


HEADS = (
    Head("Qwen2.5-0.5B", 896, 151936),
    Head("Llama-3.2-1B", 2048, 128256),
    Head("Qwen3-4B", 2560, 151936),
    Head("Llama-3.1-8B", 4096, 128256),
    Head("Gemma-2-2B", 2304, 256000, softcap=30.0),
    Head("Qwen2.5-7B", 3584, 152064),
)


@dataclass(frozen=True)
class Case:
    """N scored tokens, hidden size H, vocabulary V; mode: no gradient, d hidden only, or d hidden and d weight.

    `head` names the model whose head it is; `inputs` is "peaked" (made here) or "real" (a model's own activations).
    """

    n: int
    h: int
    v: int
    dtype: str
    mode: str
    head: str = ""
    softcap: float | None = None
    inputs: str = "peaked"

    @property
    def name(self) -> str:
        real = " real" if self.inputs == "real" else ""
        return f"{self.n}x{self.h}x{self.v} {self.dtype} {self.mode}{real}"


# (N, H, V): a small head, and SmolLM2-135M's
CPU_SHAPES = [(512, 512, 32000), (1024, 576, 49152)]


def cases(device: str, quick: bool, real: tuple[int, int, int] | None = None) -> list[Case]:
    """What a run measures, the most important first. `real` is (N, H, V) of activations that are present."""
    found = _cpu_cases(quick) if device == "cpu" else _cuda_cases(quick)
    if real is None:
        return found
    n, h, v = min(real[0], 1024 if device == "cpu" else 4096), *real[1:]
    extra = [Case(n, h, v, "bf16", mode, head="real activations", inputs="real") for mode in MODES]
    # after the first sweep over the heads
    at = len(found) if device == "cpu" else len(MODES) * (1 if quick else len(HEADS))
    return found[:at] + extra + found[at:]


def _cpu_cases(quick: bool) -> list[Case]:
    shapes = CPU_SHAPES[:1] if quick else CPU_SHAPES
    return [Case(n, h, v, dtype, mode) for n, h, v in shapes for dtype in ("fp32", "bf16") for mode in MODES]


def _cuda_cases(quick: bool) -> list[Case]:
    groups = [(4096, "bf16", head) for head in HEADS]
    if quick:
        groups = groups[:1]
    else:
        groups += [(n, "bf16", head) for n in (1024, 16384) for head in HEADS]
        groups += [(4096, dtype, HEADS[1]) for dtype in ("fp16", "fp32")]
    return [
        Case(n, head.h, head.v, dtype, mode, head.model, head.softcap) for n, dtype, head in groups for mode in MODES
    ]


def peaked_inputs(
    n: int, h: int, v: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), labels (N,), with W[y] mixed into h: random logits would be flat, and peers that
    skip small probabilities would look far too fast. The gap z_y - logsumexp(rest) runs over about -6 to 12 nats."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = randn(v, h).div_(math.sqrt(h))
    labels = torch.randint(0, v, (n,), generator=generator, device=device)
    hidden = randn(n, h)
    gaps = torch.linspace(-6, 12, n, device=device)[torch.randperm(n, generator=generator, device=device)]
    hidden += (math.log(v) + gaps)[:, None] * weight[labels]
    return hidden.to(dtype), weight.to(dtype), labels
