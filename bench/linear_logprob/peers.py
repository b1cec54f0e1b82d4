"""Who is compared in `linear_logprob`: hidden (N, H), weight (V, H), labels (N,), softcap -> log-probs (N,)."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measure.bounds import eager_bytes, trl_bytes
from ..measure.entries import Entry, Factory, LeftOut, installed, own_version
from .cases import MODES


def fastdpo(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    from fastdpo import linear_logprob

    return linear_logprob(hidden, weight, labels, softcap=softcap)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """matmul, log_softmax, gather: what a plain loop does, in the operands' dtype up to the logits."""
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.log_softmax(logits.float(), -1).gather(1, labels[:, None])[:, 0]


def _own(name: str) -> Entry:
    form = name.partition(" ")[2]
    return Entry(name, own_version(), fastdpo, {"FASTDPO_GEMM": form} if form else {})


def _products(*each: int) -> dict[str, int]:
    """By mode, as `Entry.products` takes them."""
    return dict(zip(MODES, each, strict=True))


EAGER = Entry("eager", f"torch {torch.__version__}", eager, products=_products(1, 2, 3), tile_bytes=eager_bytes)


def _compile(name: str) -> Entry:
    """Inductor on the eager entry; dynamic, since a compilation for each shape would take the run's time."""
    compiled = torch.compile(eager, dynamic=True)

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        # one for each dtype, mode and softcap; past torch's limit of 8 it would quietly run eager instead
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(hidden, weight, labels, softcap)

    return Entry(name, f"torch {torch.__version__}", run, products=_products(1, 2, 3))


def _torch(name: str) -> Entry:
    """torch's chunked op; per token its loss is in the operands' dtype."""
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise LeftOut(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has it)")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        return -function(hidden, weight, labels, reduction="none", options=options()).float()

    return Entry(name, f"torch {torch.__version__}", run, softcap=False, products=_products(1, 3, 4))


def _trl(name: str) -> Entry:
    """TRL's chunked op with its own chunk size; on a CPU it folds its tiles in eager torch."""
    package = installed("trl")
    from trl.trainer import utils

    try:
        function = getattr(utils, "_ChunkedLogProbFunction")  # noqa: B009  the name that its trainers use
        chunk = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE")  # noqa: B009
    except AttributeError as reason:
        raise LeftOut(f"{package} has no chunked log-prob op (1.16 has it): {reason}") from None

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        return function.apply(hidden, weight, None, labels, 1.0, chunk, softcap, 1.0, ())[0]

    return Entry(name, package, run, products=_products(1, 3, 4), tile_bytes=trl_bytes)


def _liger(name: str) -> Entry:
    """Liger's fused linear cross-entropy, per token: its gradients are then made in the backward."""
    package = installed("liger-kernel")
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        loss = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none", softcap=softcap)
        assert isinstance(loss, Tensor)  # more comes where more is asked for
        return -loss

    return Entry(name, package, run, products=_products(1, 3, 4))


def _liger_scaled(name: str) -> Entry:
    """Liger's per-token op: CuTe on sm_90 (with nvidia-cutlass-dsl), torch in blocks of 512 tokens elsewhere."""
    package = installed("liger-kernel")
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # pyright: ignore[reportMissingImports]

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        loss = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)
        return -(loss[0] if isinstance(loss, tuple) else loss)

    return Entry(name, package, run, softcap=False, dtypes=("bf16",), products=_products(1, 4, 4))


def _cce(name: str) -> Entry:
    """Apple's cut cross-entropy, with its filter of small gradients, or without ("cce exact").

    Releases after 25.1 name the exact form; in 25.1 it is the absence of the filter.
    """
    package = installed("cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    options: dict[str, str | None] = {}
    products = None  # its filter decides
    if name == "cce exact":
        products = _products(1, 3, 4)
        presets = "accum_e_fp32" in inspect.signature(linear_cross_entropy).parameters
        options = {"impl": "cce_exact"} if presets else {"filter_eps": None}

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, softcap=softcap, reduction="none", **options).float()

    return Entry(name, package, run, dtypes=("bf16", "fp16"), products=products)


def _verl(name: str) -> Entry:
    package = installed("verl")
    from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy  # pyright: ignore[reportMissingImports]

    if "temperature" not in inspect.signature(LinearCrossEntropy.forward).parameters:
        raise LeftOut(f"{package}: its kernel takes no temperature (later releases have another argument order)")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        return LinearCrossEntropy.apply(hidden, weight, labels, 1.0, "none", None)[0]

    return Entry(name, package, run, softcap=False, products=_products(1, 4, 4))


FACTORIES = (
    Factory("fastdpo", _own),
    Factory("fastdpo cublas", _own, ("cuda",)),
    Factory("fastdpo triton", _own, ("cuda",)),
    Factory("eager", lambda _: EAGER),
    Factory("trl", _trl),
    Factory("torch", _torch, ("cuda",)),
    Factory("liger", _liger, ("cuda",)),
    Factory("liger scaled", _liger_scaled, ("cuda",)),
    Factory("cce", _cce, ("cuda",)),
    Factory("cce exact", _cce, ("cuda",)),
    Factory("verl", _verl, ("cuda",)),
    Factory("compile", _compile, ("cuda",)),
)
