"""Which path the op would take for a shape, and why: from the plan alone, so the device need not be there."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdpo.cli.errors import UsageError
from fastdpo.ops.linear_logprob.plan import Needs, Plan, Shape, make_plan
from fastdpo.ops.switches import (
    MIB,
    backend_choice,
    choose_backend,
    fuses,
    gemm_choice,
    keep_bytes,
    workspace_bytes,
)
from fastdpo.wording import one_sentence

NEEDS = {"none": Needs(), "lora": Needs(hidden=True), "head": Needs(hidden=True, weight=True)}
WHY = {
    "stats": "nothing is differentiated",
    "one_pass": "the head is frozen, so its gradient direction is made in the forward",
    "kept": "the head is trained, and the exponentials fit FASTDPO_KEEP_MB={keep}",
    "recompute": "the head is trained, and the exponentials ({size:.0f} MiB) exceed FASTDPO_KEEP_MB={keep}",
    "eager": "FASTDPO_BACKEND=reference builds the logits",
}
# where --device cuda is asked for on a machine without one
ASSUMED_ARCH = "sm_90"


class Question(NamedTuple):
    """N scored tokens, hidden size H, vocabulary V; what the head does to its logits; where it runs."""

    n: int
    h: int
    v: int
    dtype: str
    device: str  # "cpu" or "cuda"
    arch: str | None = None  # of a GPU that is not this machine's
    softcap: float | None = None
    logit_scale: float = 1.0


def read_model(name: str) -> dict[str, Any]:
    """h, v, dtype, softcap and logit_scale of a model's config.json; `obstacle`: why it cannot be trained, or None.

    Raises:
        UsageError: its config.json cannot be read, or does not say.
    """
    from fastdpo.models.logit_transform import logit_transform
    from fastdpo.models.size import checked_config

    folder = Path(name).expanduser()
    try:
        config = checked_config(str(folder) if folder.is_dir() else name)
    except ImportError:
        raise
    except Exception as error:  # transformers raises no narrower class for a config.json that does not fit
        raise UsageError(f"the config.json of {name} cannot be read: {one_sentence(error).split('. ')[0]}") from error
    text = config.get_text_config()
    sizes = {"h": getattr(text, "hidden_size", None), "v": getattr(text, "vocab_size", None)}
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise UsageError(
            f"the config.json of {name} names no hidden_size and vocab_size; give both on the command line"
        )
    scale, softcap = logit_transform(text)
    obstacle = None
    if config.is_encoder_decoder:
        obstacle = f"{name} is an encoder-decoder model; fastdpo trains causal language models"
    elif text is not config:
        obstacle = f"{name} is a multimodal model, which fastdpo does not train yet"
    dtype = str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
    return {**sizes, "dtype": dtype, "softcap": softcap, "logit_scale": scale, "obstacle": obstacle}


def answer(question: Question, train: str) -> dict[str, Any]:
    """Backend, path, products, tile, FLOPs and peak bytes of one call, each choice with its reason.

    train: a key of `NEEDS`: no gradient, d hidden only (a LoRA below the head), or d hidden and d head.

    Raises:
        ValueError, RuntimeError: a FASTDPO_ variable is not valid, or asks for what cannot run.
    """
    device, dtype = torch.device(question.device), getattr(torch, question.dtype)
    backend = choose_backend(device, dtype)
    fused, why_gemm, block_cols, tile = _products(question, backend, device, dtype)
    acc = max(dtype.itemsize, 4)
    shape = Shape(
        n=question.n,
        h=question.h,
        v=question.v,
        source_rows=question.n,
        gathered=True,  # as the trainer calls it, with rows
        compute=dtype.itemsize,
        acc=acc,
        hidden=dtype.itemsize,
        weight=dtype.itemsize,
        widened=device.type != "cuda" and not fused,
        extra_tiles=int(question.softcap is not None),
        curved=question.softcap is not None,
        fused=fused,
        block_cols=block_cols,
    )
    needs = NEEDS[train]
    plan = make_plan(shape, needs, workspace_bytes(), keep_bytes())
    eager = backend == "reference"
    logits = _eager_bytes(question, dtype.itemsize, acc, differentiated=train != "none")
    path = "eager" if eager else plan.path
    exponentials = question.n * question.v * dtype.itemsize / MIB
    return {
        "train": train,
        "backend": backend,
        "why_backend": _why_backend(backend, device, dtype),
        "path": path,
        "why_path": WHY[path].format(keep=keep_bytes() // MIB, size=exponentials),
        "gemm": _library(device, question.arch) if not fused else "fused",
        "why_gemm": why_gemm,
        "kernel_tile": tile,
        "tile": None if eager else [plan.rows, plan.cols],
        "back_tile": [plan.back_rows, plan.back_cols] if plan.path == "recompute" and not eager else None,
        "tflop": _flops(question, needs, plan, eager) / 1e12,
        "peak_mib": None if eager else plan.peak_bytes / MIB,
        "gradients_mib": _gradient_bytes(question, needs, dtype.itemsize) / MIB,
        "eager_mib": logits["bytes"] / MIB,
        "eager_formula": logits["formula"],
    }


def _products(
    question: Question, backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[bool, str, int, str | None]:
    """Whether product and fold are one kernel, why, the columns of its partial results, and its tile in words."""
    switch = gemm_choice()
    # meta: asks for everything but the architecture, whose GPU may not be here
    fused = fuses(backend, torch.device("meta"), dtype, question.h, entropy_grad=False)
    refused = "FASTDPO_GEMM=triton is not taken: " if switch == "triton" else ""
    if backend != "triton":
        return False, f"{refused}the backend is {backend}", 0, None
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"{refused}the operands are {question.dtype}, and the fused kernels take 16-bit ones", 0, None
    from fastdpo.ops.linear_logprob.fused_tiles import configs

    arch = arch_of(question)
    if switch == "auto":
        fused = configs.fused_by_default(arch, dtype, question.h)
    if not fused:
        unmeasured = f"no run on {arch} is in kernels/configs.py: FASTDPO_GEMM=triton tries the fused kernels"
        return False, unmeasured if switch == "auto" else f"FASTDPO_GEMM={switch}", 0, None
    why = f"FASTDPO_GEMM={switch}"
    if switch == "auto":
        rows = (row for row in configs.MEASURED if (row.arch, row.dtype) == (arch, dtype))
        row = next(row for row in rows if question.h in row.hidden_sizes)
        why = f"measured on {row.gpu}, {row.date}: {row.command}"
    config = configs.fold_config(arch, question.softcap is not None)
    tile = (
        f"{config.block_rows} x {config.block_cols} x {config.block_k}, {config.warps} warps, "
        f"{config.stages} stages, {'TMA' if config.tma else 'pointers'}"
    )
    return True, why, config.block_cols, tile


def arch_of(question: Question) -> str:
    """The architecture that is planned for: the one asked for, this machine's, or `ASSUMED_ARCH`. Needs triton."""
    from fastdpo.ops.linear_logprob.fused_tiles import configs

    if question.arch is not None:
        return question.arch
    if question.device == "cuda" and not torch.cuda.is_available():
        return ASSUMED_ARCH
    return configs.arch_of(torch.device(question.device))


def is_here(question: Question) -> bool:
    """Whether the plan is for this machine's own device."""
    if question.device == "cpu":
        return True
    if not torch.cuda.is_available() or question.arch is None:
        return torch.cuda.is_available()
    return find_spec("triton") is not None and question.arch == arch_of(question._replace(arch=None))


def _why_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    switch = backend_choice()
    if switch != "auto":
        return f"FASTDPO_BACKEND={switch}"
    if device.type == "cpu":
        return "plain torch on a CPU"
    if backend == "triton":
        return "a GPU, and triton is installed"
    return "the Triton kernels take no float64" if dtype == torch.float64 else "triton is not installed"


def _library(device: torch.device, arch: str | None) -> str:
    if device.type != "cuda":
        return "torch.mm"
    return "hipBLAS" if torch.version.hip or (arch or "").startswith("gfx") else "cuBLAS"


def _flops(question: Question, needs: Needs, plan: Plan, eager: bool) -> int:
    products = 1 + needs.hidden + needs.weight
    return 2 * question.n * question.h * question.v * products if eager else plan.flops


def _gradient_bytes(question: Question, needs: Needs, size: int) -> int:
    return size * question.h * (question.n * needs.hidden + question.v * needs.weight)


def _eager_bytes(question: Question, size: int, acc: int, differentiated: bool) -> dict[str, Any]:
    """What a plain loop holds at once: logits, their log-softmax in fp32, and that one's gradient."""
    parts = [(size, f"{question.dtype} logits"), (acc, f"{'fp64' if acc == 8 else 'fp32'} log-softmax")]
    if differentiated:
        parts.append((acc, "its gradient"))
    total = sum(part for part, _ in parts)
    formula = f"N*V*({' + '.join(str(part) for part, _ in parts)}) bytes: {', '.join(name for _, name in parts)}"
    return {"bytes": question.n * question.v * total, "formula": formula}
