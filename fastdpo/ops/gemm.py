"""Matrix products whose result is never rounded to the operands' dtype."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

# the precision switches below are global to the process
_SWITCH = threading.Lock()


def widen(x: Tensor, compute: torch.dtype, acc: torch.dtype) -> Tensor:
    """`x` as an operand of `mm_into`: rounded to `compute` (as autocast would), then, except on CUDA, widened to `acc`.

    A CPU product of bf16 operands has a bf16 result; bf16 numbers in fp32 have exact products.
    """
    x = x.to(compute)
    return x if x.device.type == "cuda" else x.to(acc)


def mm_into(out: Tensor, a: Tensor, b: Tensor, compute: torch.dtype, *, add: bool = False) -> Tensor:
    """`out = a @ b`, or `out += a @ b` with `add`; out is fp32 (fp64 for fp64 operands), (n, m).

    Args:
        a, b: (n, k) and (k, m), from `widen` or a tile's work.
        compute: the dtype that the operands were rounded to.
    """
    entering = compute if a.device.type == "cuda" else out.dtype
    a, b = a.to(entering), b.to(entering)
    if entering == out.dtype:
        with _precision(a.device, compute):
            return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    with _full_accumulation(compute, reductions=False):
        if add and not adds_in_gemm():
            return out.add_(torch.mm(a, b, out_dtype=out.dtype))
        if add:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)


def mm_rounded(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`out = a @ b` in one 16-bit dtype, accumulated in fp32 and rounded once (see `rounds_in_gemm`)."""
    with _full_accumulation(a.dtype, reductions=True) if a.device.type == "cuda" else nullcontext():
        return torch.mm(a, b, out=out)


@cache
def adds_in_gemm() -> bool:
    """torch.addmm adds a product of 16-bit operands to an fp32 tensor: on CUDA from 2.10 on."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 10)


def mm_sum(out: Tensor, a: Tensor, wide: Tensor, stored: Tensor, compute: torch.dtype, *, add: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b` with `add`, where `b` is `stored` as it is, or `wide` from `widen`.

    On a CPU with bf16 units a product with a bf16 result takes half the time of one that keeps fp32 throughout. It
    is used for sums of many terms only: one rounding of the block's sum, the size of each term's own.
    """
    if a.device.type == "cpu" and compute == torch.bfloat16 and _has_bf16_units():
        product = torch.mm(a.to(compute), stored.to(compute))
        if add:
            out.add_(product)
        else:
            out.copy_(product)
    else:
        mm_into(out, a, wide, compute, add=add)


def rounds_in_gemm(device: torch.device, compute: torch.dtype, wanted: torch.dtype) -> bool:
    """A product of `compute` operands can be had in that dtype, accumulated in fp32 and rounded once, at full speed."""
    if compute != wanted or compute not in (torch.bfloat16, torch.float16):
        return False
    return device.type == "cuda" or (compute == torch.bfloat16 and _has_bf16_units())


@cache
def _has_bf16_units() -> bool:
    """The CPU multiplies bf16, and oneDNN may be told to round fp32 operands to bf16 (exact here: they hold bf16).

    With AMX such a product runs at bf16 speed; with AVX512_BF16 alone oneDNN 3.12 does it in fp32, still 1.2 times
    faster than torch's default fp32 product.
    """
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if switch is None or not hasattr(switch, "fp32_precision") or not torch.backends.mkldnn.is_available():
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _precision(device: torch.device, compute: torch.dtype) -> AbstractContextManager[None]:
    if device.type == "cpu":
        return _cpu_precision(compute)
    return _cuda_full_fp32() if device.type == "cuda" else nullcontext()


@contextmanager
def _cpu_precision(compute: torch.dtype) -> Iterator[None]:
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if switch is None or not hasattr(switch, "fp32_precision"):
        yield
        return
    wanted = "bf16" if compute == torch.bfloat16 and _has_bf16_units() else "ieee"
    with _fp32_precision(switch, wanted):
        yield


@contextmanager
def _fp32_precision(switch: Any, wanted: str) -> Iterator[None]:
    with _SWITCH:
        before = switch.fp32_precision
        # "none" is full precision too; the switch is left alone then, for any other thread's sake
        changes = before != wanted and not (wanted == "ieee" and before == "none")
        if changes:
            switch.fp32_precision = wanted
        try:
            yield
        finally:
            if changes:
                switch.fp32_precision = "none"  # reads as the parent's from now on
                if switch.fp32_precision != before:
                    switch.fp32_precision = before


def _cuda_full_fp32() -> AbstractContextManager[None]:
    """fp32 in means fp32: no TF32, whatever `set_float32_matmul_precision` says."""
    switch = torch.backends.cuda.matmul
    if hasattr(switch, "fp32_precision"):
        return _fp32_precision(switch, "ieee")
    return _without(("allow_tf32",))


def _full_accumulation(compute: torch.dtype, reductions: bool) -> AbstractContextManager[None]:
    """cuBLAS sums in fp32: no fp16 accumulators and, with `reductions`, no split sums rounded to the result's dtype."""
    names = ()
    if compute == torch.float16:
        names = ("allow_fp16_accumulation", *["allow_fp16_reduced_precision_reduction"] * reductions)
    elif reductions:
        names = ("allow_bf16_reduced_precision_reduction",)
    return _without(names) if names else nullcontext()


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Some of `torch.backends.cuda.matmul`'s permissions are withdrawn meanwhile."""
    switch = torch.backends.cuda.matmul
    with _SWITCH:
        given = [name for name in names if getattr(switch, name, False)]
        before = {}
        for name in given:
            split = getattr(switch, f"{name}_split_k", None)
            before[name] = True if split is None else (True, split)
            setattr(switch, name, False if split is None else (False, split))
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(switch, name, value)
