"""What `linear_logprob` measures: the heads of real models, and shapes in order of importance."""

from dataclasses import dataclass

import torch

MODES = ("forward", "frozen", "trained")
UNIT = 16  # tokens that a trial of the largest N grows by
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class HeadShape:
    """Of a model's output head: hidden size H, vocabulary V (rows of its weight), and the softcap of its logits."""

    model: str
    h: int
    v: int
    softcap: float | None = None


# by model, the most important first
HEADS = {
    head.model: head
    for head in (
        HeadShape("Qwen2.5-0.5B", 896, 151936),
        HeadShape("Llama-3.2-1B", 2048, 128256),
        HeadShape("Qwen3-4B", 2560, 151936),
        HeadShape("Llama-3.1-8B", 4096, 128256),
        HeadShape("Gemma-2-2B", 2304, 256000, softcap=30.0),
        HeadShape("Qwen2.5-7B", 3584, 152064),
    )
}


@dataclass(frozen=True)
class LogprobCase:
    """N scored tokens, hidden size H, vocabulary V; mode: no gradient, d hidden only, or d hidden and d weight.

    `head` names the model whose head it is; `inputs` is "peaked" (made here) or "real" (a model's own activations);
    `sweep`: a point of a plot, in no summary.
    """

    n: int
    h: int
    v: int
    dtype: str
    mode: str
    head: str = ""
    softcap: float | None = None
    inputs: str = "peaked"
    sweep: bool = False

    @property
    def name(self) -> str:
        real = " real" if self.inputs == "real" else ""
        return f"{self.n}x{self.h}x{self.v} {self.dtype} {self.mode}{real}"


@dataclass(frozen=True)
class Growth:
    """How many scored tokens fit `budget_mib` MiB above the inputs; mode: d hidden only, or d hidden and d weight.

    A trial grows in units of `UNIT` tokens, or of one pair of `length` positions, up to `most` tokens or positions.
    """

    h: int
    v: int
    dtype: str
    mode: str
    budget_mib: float
    most: int
    length: int | None = None
    head: str = ""

    @property
    def name(self) -> str:
        pairs = "" if self.length is None else f", pairs of {self.length} positions"
        return f"largest N in {self.budget_mib:g} MiB, {self.h}x{self.v}{pairs} {self.dtype} {self.mode}"

    @property
    def most_units(self) -> int:
        return self.most // (UNIT if self.length is None else 2 * self.length)


@dataclass(frozen=True)
class Sweep:
    """The points of a plot: N varies at (H, V), V varies at (N, H)."""

    n: int
    h: int
    v: int
    ns: tuple[int, ...]
    vs: tuple[int, ...]
    head: str = ""

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(N, H, V), each once."""
        shapes = [(n, self.h, self.v) for n in self.ns] + [(self.n, self.h, v) for v in self.vs]
        return list(dict.fromkeys(shapes))


# (N, H, V): a small head, and SmolLM2-135M's
CPU_SHAPES = [(512, 512, 32000), (1024, 576, 49152)]
CPU_QUICK = (256, 256, 16384)
_LLAMA = HEADS["Llama-3.2-1B"]
# by device and whether the run is a quick one
MOST_TOKENS = {("cpu", True): 1 << 12, ("cpu", False): 1 << 14, ("cuda", True): 1 << 19, ("cuda", False): 1 << 19}
SWEEPS = {
    ("cpu", True): Sweep(128, 256, 8192, (32, 128, 512), (4096, 8192, 16384)),
    ("cpu", False): Sweep(512, 512, 32000, (128, 256, 512, 1024, 2048), (4000, 8000, 16000, 32000, 64000)),
    ("cuda", True): Sweep(
        4096, _LLAMA.h, _LLAMA.v, (1024, 4096, 16384), (_LLAMA.v // 4, _LLAMA.v // 2, _LLAMA.v), _LLAMA.model
    ),
    ("cuda", False): Sweep(
        4096,
        _LLAMA.h,
        _LLAMA.v,
        (256, 1024, 4096, 16384, 65536),
        (_LLAMA.v // 8, _LLAMA.v // 4, _LLAMA.v // 2, _LLAMA.v, 2 * _LLAMA.v),
        _LLAMA.model,
    ),
}


def logprob_cases(
    device: str, quick: bool, budget_mib: float = 0.0, sweep: bool = False, real: tuple[int, int, int] | None = None
) -> list[LogprobCase | Growth]:
    """What a run measures, the most important first.

    budget_mib: the largest N in it is looked for, unless it is 0. sweep: with the points of the plot. real: (N, H, V)
    of a model's own activations. These come after the first turn over the heads.
    """
    plain = _cpu_cases(quick) if device == "cpu" else _cuda_cases(quick)
    first = len(plain) if device == "cpu" else len(MODES) * (1 if quick else len(HEADS))
    more: list[LogprobCase | Growth] = []
    if real is not None:
        n, h, v = min(real[0], 1024 if device == "cpu" else 4096), *real[1:]
        more += [LogprobCase(n, h, v, "bf16", mode, head="real activations", inputs="real") for mode in MODES]
    if budget_mib:
        more += growth_cases(device, quick, budget_mib)
    if sweep:
        names = {case.name for case in plain}
        more += [case for case in sweep_cases(device, quick) if case.name not in names]
    return [*plain[:first], *more, *plain[first:]]


def sweep_cases(device: str, quick: bool) -> list[LogprobCase]:
    """The points of the plot."""
    sweep = SWEEPS[device, quick]
    return [LogprobCase(*shape, "bf16", mode, sweep.head, sweep=True) for shape in sweep.shapes for mode in MODES[1:]]


def growth_cases(device: str, quick: bool, budget_mib: float) -> list[Growth]:
    """How many tokens fit, at the plot's H and V."""
    sweep, most = SWEEPS[device, quick], MOST_TOKENS[device, quick]
    return [Growth(sweep.h, sweep.v, "bf16", mode, budget_mib, most, head=sweep.head) for mode in MODES[1:]]


def _cpu_cases(quick: bool) -> list[LogprobCase]:
    shapes = [CPU_QUICK] if quick else CPU_SHAPES
    return [LogprobCase(n, h, v, dtype, mode) for n, h, v in shapes for dtype in ("fp32", "bf16") for mode in MODES]


def _cuda_cases(quick: bool) -> list[LogprobCase]:
    heads = list(HEADS.values())
    groups = [(4096, "bf16", head) for head in heads]
    if quick:
        groups = groups[:1]
    else:
        groups += [(n, "bf16", head) for n in (1024, 16384) for head in heads]
        groups += [(4096, dtype, _LLAMA) for dtype in ("fp16", "fp32")]
    return [
        LogprobCase(n, head.h, head.v, dtype, mode, head.model, head.softcap)
        for n, dtype, head in groups
        for mode in MODES
    ]
