"""The op against float64 on this machine: every backend that runs on a device, each path, in seconds.

The bounds are absolute, since an op that rounds its logits would pass a comparison with eager PyTorch: 1e-4 nats and a
thousandth of each log-prob, and a relative error of each row of d hidden, on rows whose gaps z_y - logsumexp(rest) run
from unlikely to confident tokens. Gradients of weight and bias stay within twice eager's own error (+ 1e-6).
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan
from fastdpo.ops.oracle import (
    RELATIVE_LIMIT,
    ROW_LIMIT,
    TOKEN_LIMIT,
    eager_limit,
    largest_error,
    planted_inputs,
    worst_row,
)
from fastdpo.wording import one_sentence

N, H, V = 192, 328, 2051
IGNORED = 7  # of so many labels one is ignored
GAPS = (-8.0, 16.0)  # nats
CASES: dict[str, dict[str, float]] = {"plain": {}, "bias, rows, softcap": {"softcap": 30.0, "logit_scale": 1.1}}
# path -> (hidden and head need gradients, FASTDPO_KEEP_MB)
PATHS = {
    "stats": ((False, False), "0"),
    "one_pass": ((True, False), "0"),
    "kept": ((True, True), "64"),
    "recompute": ((True, True), "0"),
}


class Problem(NamedTuple):
    """One dtype's operands on the device, and what is right, in fp64 on the CPU."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    rows: Tensor | None  # of hidden, by label
    options: dict[str, float]
    upstream: Tensor
    truth: dict[str, Tensor]
    eager: dict[str, float]  # eager PyTorch's own errors


def self_test(device: torch.device) -> dict[str, Any]:
    """Sizes, seconds, and one row for each backend and dtype: worst errors over all cases and paths, and failures."""
    start = time.perf_counter()
    rows = []
    for dtype in _dtypes(device):
        problems = {name: _problem(dtype, device, options) for name, options in CASES.items()}
        for backend in _backends(device, dtype):
            rows.append(_row(backend, dtype, problems))
    return {
        "device": str(device),
        "shape": {"n": N, "h": H, "v": _columns(device)},
        "seconds": time.perf_counter() - start,
        "limits": {"logp": TOKEN_LIMIT, "relative": RELATIVE_LIMIT, "dw": 1.0, "db": 1.0},
        "rows": rows,
        "passed": not any(row["failures"] for row in rows),
    }


def _columns(device: torch.device) -> int:
    """The vocabulary: several tiles of it, and the fused kernels' are wider."""
    return V if device.type == "cpu" else 3 * V


def _dtypes(device: torch.device) -> list[torch.dtype]:
    if device.type != "cuda":
        return [torch.float32, torch.bfloat16]
    bf16 = [torch.bfloat16] if torch.cuda.is_bf16_supported(including_emulation=False) else []
    return [torch.float32, *bf16, torch.float16]


def _backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """`fused` is triton with its own products. Interpreted kernels say nothing of the device, and take minutes."""
    if device.type != "cuda" or find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return ["tiled"]
    return ["tiled", "triton", *(["fused"] if dtype != torch.float32 else [])]


def _row(backend: str, dtype: torch.dtype, problems: dict[str, Problem]) -> dict[str, Any]:
    worst: dict[str, float] = {}
    failures: list[str] = []
    for case, problem in problems.items():
        try:
            errors, wrong = _check(backend, dtype, problem)
        except Exception as error:  # a kernel may fail to compile or to launch in any way
            errors, wrong = {}, [f"{type(error).__name__}: {one_sentence(error)[:300]}"]
        failures += [f"{case}: {text}" for text in wrong]
        for name, value in errors.items():
            worst[name] = value if math.isnan(value) else max(worst.get(name, 0.0), value)
    row = {"backend": backend, "dtype": str(dtype).removeprefix("torch."), "row_limit": ROW_LIMIT[dtype]}
    return {**row, "errors": worst, "failures": failures}


def _check(backend: str, dtype: torch.dtype, problem: Problem) -> tuple[dict[str, float], list[str]]:
    """Worst errors over the paths, by name, and what is wrong in words. dw and db are shares of their limits."""
    errors: dict[str, float] = {}
    wrong: list[str] = []
    bits: dict[str, Tensor] = {}

    def hold(path: str, name: str, value: float, limit: float) -> None:
        errors[name] = value if math.isnan(value) else max(errors.get(name, 0.0), value)
        if not value <= limit:
            wrong.append(f"{path}: {NAMES[name]} {value:.2e}, limit {limit:.1e}")

    for path, (needs, keep) in PATHS.items():
        with _settings(backend, keep):
            plan = _plan(problem, needs)
            if (plan.path, plan.fused) != (path, backend == "fused"):
                wrong.append(f"{path}: the plan is {plan}")
            results = _run(problem, needs)
            again = _run(problem, needs)
        names = {"dh": needs[0], "dw": needs[1], "db": needs[1] and problem.bias is not None}
        expected = {"logp", *(name for name, need in names.items() if need)}
        if set(results) != expected:
            wrong.append(f"{path}: gives {', '.join(results)} and not {', '.join(sorted(expected))}")
        if not all(torch.equal(a, again[name]) for name, a in results.items()):
            wrong.append(f"{path}: a second run gives other bits")
        bits[path] = results["logp"]
        if not torch.equal(results["logp"], bits["stats"]):
            wrong.append(f"{path}: log-probs are not the bits of the reference pass")
        results = {name: x.cpu().double() for name, x in results.items()}
        truth, live = problem.truth["logp"], problem.truth["logp"] != 0
        hold(path, "logp", largest_error(results["logp"], truth), TOKEN_LIMIT)
        hold(path, "relative", float(((results["logp"] - truth) / truth)[live].abs().max()), RELATIVE_LIMIT)
        if "dh" in results:
            hold(path, "dh", worst_row(results["dh"], problem.truth["dh"], dtype), ROW_LIMIT[dtype])
        for name in ("dw", "db"):
            if name in results:
                limit = eager_limit(problem.eager[name])
                hold(path, name, largest_error(results[name], problem.truth[name]) / limit, 1.0)
    return errors, wrong


NAMES = {
    "logp": "error of a log-prob in nats",
    "relative": "relative error of a log-prob",
    "dh": "relative error of a row of d hidden",
    "dw": "error of d weight over its limit",
    "db": "error of d bias over its limit",
}


@contextmanager
def _settings(backend: str, keep: str) -> Iterator[None]:
    """The environment of one backend; a small workspace, so that even this shape takes several tiles."""
    variables = {
        "FASTDPO_BACKEND": "triton" if backend == "fused" else backend,
        "FASTDPO_GEMM": "triton" if backend == "fused" else "cublas",
        "FASTDPO_KEEP_MB": keep,
        "FASTDPO_WORKSPACE_MB": "1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _leaves(problem: Problem, needs: tuple[bool, bool]) -> list[Tensor | None]:
    each = zip((problem.hidden, problem.weight, problem.bias), (*needs, needs[1]), strict=True)
    return [x if x is None else x.detach().requires_grad_(need) for x, need in each]


def _plan(problem: Problem, needs: tuple[bool, bool]) -> Any:
    hidden, weight, bias = _leaves(problem, needs)
    assert hidden is not None
    assert weight is not None
    options: Any = problem.options
    return linear_logprob_plan(hidden, weight, problem.labels, bias=bias, rows=problem.rows, **options)


def _run(problem: Problem, needs: tuple[bool, bool]) -> dict[str, Tensor]:
    """Log-probs, and the gradients that `needs` asks for, by the op as it is called by everybody."""
    hidden, weight, bias = leaves = _leaves(problem, needs)
    assert hidden is not None
    assert weight is not None
    options: Any = problem.options
    out = linear_logprob(hidden, weight, problem.labels, bias=bias, rows=problem.rows, **options)
    return _gradients(out, leaves, problem.upstream)


def _gradients(out: Tensor, leaves: list[Tensor | None], upstream: Tensor) -> dict[str, Tensor]:
    if out.requires_grad:
        out.backward(upstream.to(out))
    named = zip(("dh", "dw", "db"), leaves, strict=True)
    return {"logp": out.detach(), **{name: x.grad for name, x in named if x is not None and x.grad is not None}}


def _problem(dtype: torch.dtype, device: torch.device, options: dict[str, float]) -> Problem:
    generator = torch.Generator().manual_seed(0)
    columns = _columns(device)
    hidden, weight, labels = planted_inputs(N, H, columns, GAPS, generator)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = (torch.randn(columns, generator=generator) * 0.1).to(dtype) if options else None
    rows = torch.randperm(N, generator=generator) if options else None
    labels = labels if rows is None else labels[rows]
    labels[::IGNORED] = -100
    upstream = torch.linspace(-2, 1.5, N)
    leaves = [None if x is None else x.double().requires_grad_() for x in (hidden, weight, bias)]
    z = reference.logits(leaves[0], leaves[1], leaves[2], **options)  # pyright: ignore[reportArgumentType]
    truth = _gradients(reference.logprob(z if rows is None else z[rows], labels), leaves, upstream)
    there = Problem(
        hidden.to(device),
        weight.to(device),
        None if bias is None else bias.to(device),
        labels.to(device),
        None if rows is None else rows.to(device),
        options,
        upstream.to(device),
        truth,
        {},
    )
    for name, x in _eager(there).items():
        there.eager[name] = largest_error(x.cpu().double(), truth[name])
    return there


def _eager(problem: Problem) -> dict[str, Tensor]:
    """What a plain training loop does: logits in the operands' dtype, then an fp32 log-softmax."""
    hidden, weight, bias = leaves = _leaves(problem, (True, True))
    assert hidden is not None
    assert weight is not None
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = (z * problem.options.get("logit_scale", 1.0)).float()
    cap = problem.options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    z = z if problem.rows is None else z[problem.rows]
    return _gradients(reference.logprob(z, problem.labels), leaves, problem.upstream)
