"""No call of an operation reads a device's values: nothing in it waits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.losses.modules import FusedLinearDPOLoss
from fastdpo.ops.linear_logprob.api import linear_logprob, linear_logprob_plan, linear_logprob_stats
from fastdpo.ops.linear_logprob.settings import STATS
from fastdpo.ops.logprob import logprob

N, V = 12, 70  # of `operands`


class NothingRead(TorchDispatchMode):
    """Fails where an operation's result or shape depends on values, which on a GPU waits for them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.repeat_interleave.Tensor:
            reads = kwargs.get("output_size") is None
        elif func is torch.ops.aten.index.Tensor:
            reads = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        assert not reads, f"{func} reads values"
        return func(*args, **kwargs)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_nothing_waits_for_a_device(backend, keep, monkeypatch, as_on_a_gpu, operands, pairs):
    monkeypatch.setenv("FASTDPO_BACKEND", backend)
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    weight, states, pair_labels, ref_states = pairs()
    pair_labels[0, 0] = -100
    ran = []
    # on a CPU, bf16 and kept, dW comes from a routine of its own, which may look at labels
    for dtype in (torch.float32,) if keep == "64" else (torch.float32, torch.bfloat16):
        for needs in ((0, 0, 0), (1, 0, 0), (1, 1, 1)):
            hidden, w, bias, labels = operands(needs, dtype, ignored=True)
            ran.append(linear_logprob_plan(hidden, w, labels, bias=bias, stats=STATS, entropy_grad=False).path)
            with NothingRead():
                for entropy_grad in (False, True):
                    stats = linear_logprob_stats(
                        hidden, w, labels, bias=bias, stats=STATS, softcap=4.0, entropy_grad=entropy_grad
                    )
                    total = stats.logprob.sum() + stats.entropy.sum()
                    if total.requires_grad:
                        total.backward()
                rows = torch.tensor([0, 0, 5, 3])
                out = linear_logprob(hidden, w, labels[:4], rows=rows)
                if out.requires_grad:
                    out.sum().backward()
    assert set(ran) == {"stats", "one_pass", "kept" if keep == "64" else "recompute"}
    logits = torch.randn(N, V, requires_grad=True)
    with NothingRead():
        logprob(logits, operands(ignored=True)[-1]).sum().backward()
        FusedLinearDPOLoss(shift=True)(weight, states, pair_labels, ref_hidden=ref_states)[0].backward()


def test_a_read_is_noticed(operands):
    hidden, weight, _, labels = operands(ignored=True)
    for read in (
        lambda: linear_logprob(hidden, weight, labels),  # on a CPU it takes ignored labels out
        lambda: torch.repeat_interleave(labels, torch.ones_like(labels)),
        lambda: labels[labels > 0],
        lambda: labels.max().item(),
    ):
        with pytest.raises(AssertionError, match="reads values"), NothingRead():
            read()
