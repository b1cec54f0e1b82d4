"""The op inside a program: checkpoints, global precision switches, the backend that was asked for."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdpo.ops.linear_logprob.api import linear_logprob


def test_the_triton_backend_runs_triton(monkeypatch):
    from fastdpo.kernels import fold
    from fastdpo.ops.linear_logprob import triton_tiles

    launched = []
    monkeypatch.setattr(triton_tiles, "fold_tile", lambda *a, **k: (launched.append("fold"), fold.fold_tile(*a, **k)))
    monkeypatch.setattr(
        triton_tiles, "dlogits_tile", lambda *a, **k: (launched.append("dlogits"), fold.dlogits_tile(*a, **k))
    )
    hidden, weight, labels = torch.randn(5, 8), torch.randn(40, 8).requires_grad_(), torch.arange(5)
    linear_logprob(hidden, weight, labels).sum().backward()
    assert launched == []
    monkeypatch.setenv("FASTDPO_BACKEND", "triton")
    linear_logprob(hidden, weight, labels).sum().backward()
    assert launched == ["fold", "dlogits"]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_inside_a_checkpoint(backend, trained, reentrant, planted):
    """What is saved is unpacked once: a second time a non-reentrant checkpoint refuses."""
    hidden, weight, labels = planted(9, 16, 60, torch.float32)

    def run(wrap) -> list[Tensor]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)]
        out = wrap(lambda h: linear_logprob(h, leaves[1], labels), leaves[0])
        out.sum().backward()
        return [x.grad for x in leaves if x.grad is not None]

    plain = run(lambda op, h: op(h))
    checkpointed = run(lambda op, h: checkpoint(op, h, use_reentrant=reentrant))
    assert len(checkpointed) == 1 + trained
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, plain, strict=True))


def test_precision_switches_are_left_as_they_were_found(planted):
    """An inherited value goes on being inherited, one set by hand stays."""
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if switch is None or not hasattr(switch, "fp32_precision"):
        pytest.skip(f"torch {torch.__version__} has no such switch")
    arguments = planted(9, 64, 300, torch.float32)
    try:
        torch.backends.fp32_precision = "tf32"
        linear_logprob(*arguments)
        assert switch.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert switch.fp32_precision == "ieee"
        switch.fp32_precision = "bf16"
        linear_logprob(*arguments)
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = torch.backends.fp32_precision = "none"


def test_fp32_stays_fp32_whatever_the_global_precision(backend, planted):
    hidden, weight, labels = planted(9, 64, 300, torch.float32)
    exact = linear_logprob(hidden, weight, labels)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(linear_logprob(hidden, weight, labels), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
