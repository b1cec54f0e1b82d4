"""`patch_trl` on and off, nested and from threads, and which TRL it takes."""

import importlib
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.integrations import trl_head
from fastdpo.integrations.trl import TrlPatch, patch_trl

trl: Any = pytest.importorskip("trl")
utils: Any = importlib.import_module("trl.trainer.utils")
ROOT = Path(__file__).resolve().parents[3]
F64 = torch.float64


def trl_names() -> dict[tuple[str, str], Any]:
    """Every name in every loaded module of TRL."""
    modules = [name for name in sys.modules if name.split(".")[0] == "trl"]
    return {(name, key): value for name in modules for key, value in vars(sys.modules[name]).items()}


def test_everything_is_put_back():
    before = trl_names()
    handle = patch_trl()
    ours = [binding.ours for binding in TrlPatch._changes]
    assert utils._ChunkedLogProbFunction is trl_head.ChunkedLogProb
    assert sys.modules["trl.trainer.dpo_trainer"].add_fused_lm_head is utils.add_fused_lm_head
    changed = {where for where, value in trl_names().items() if where in before and value is not before[where]}
    assert {key for _, key in changed} == {
        "_ChunkedLogProbFunction",
        "_use_triton",
        "add_fused_lm_head",
        "BaseTunerLayer",
    }
    # a module of TRL's that is imported only now
    late = types.ModuleType("trl.imported_late")
    late.add_fused_lm_head = utils.add_fused_lm_head
    sys.modules[late.__name__] = late
    try:
        handle.undo()
        after = trl_names()
    finally:
        del sys.modules[late.__name__]
    assert late.add_fused_lm_head is before["trl.trainer.utils", "add_fused_lm_head"]
    assert all(after[where] is value for where, value in before.items())
    assert not any(value is x for value in after.values() for x in ours)


def test_patches_may_be_repeated_nested_and_left_by_an_exception(caplog):
    theirs = utils._ChunkedLogProbFunction
    with caplog.at_level(logging.INFO, "fastdpo"):
        first = patch_trl()
        with patch_trl() as second:
            pass
        second.undo()  # once more does nothing
        assert utils._ChunkedLogProbFunction is trl_head.ChunkedLogProb
        with pytest.raises(RuntimeError, match="inside"), patch_trl():
            raise RuntimeError("inside")
        assert utils._ChunkedLogProbFunction is trl_head.ChunkedLogProb
        last = patch_trl()
        first.undo()
        assert utils._ChunkedLogProbFunction is trl_head.ChunkedLogProb
        last.undo()
    assert utils._ChunkedLogProbFunction is theirs
    assert [x.message for x in caplog.records] == [
        f"TRL {trl.__version__}: the fused head of its trainers computes through fastdpo."
    ]
    with pytest.raises(RuntimeError, match="inside"), patch_trl():
        raise RuntimeError("inside")
    assert utils._ChunkedLogProbFunction is theirs


def test_importing_the_integration_loads_no_trl():
    code = (
        "import sys, fastdpo.integrations.trl; fastdpo.integrations.trl.patch_trl; "
        "print([m for m in ('trl', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def changed_outputs(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None,
                    logit_scale=1.0, outputs=("entropy", "is_top1")):  # fmt: skip
    """A later fused head that gives other results."""


REFUSED = {
    "other arguments": (
        {"_ChunkedLogProbFunction": types.SimpleNamespace(forward=lambda ctx, hidden, weight: 0)},
        "fused head other",
    ),
    "other outputs": ({"_ChunkedLogProbFunction": types.SimpleNamespace(forward=changed_outputs)}, "fused head other"),
    "1.15 without triton": ({"_ChunkedLogProbFunction": None}, "found no Triton"),
    "1.14": ({"add_fused_lm_head": ...}, "Triton kernels of its own"),
    "0.14": ({"add_fused_lm_head": ..., "selective_log_softmax": ...}, "has neither"),
}


@pytest.mark.parametrize(("names", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_another_trl_is_refused_with_the_versions_that_work(names, why, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "9.9.9")
    for name, value in names.items():
        monkeypatch.delattr(utils, name) if value is ... else monkeypatch.setattr(utils, name, value)
    before = trl_names()
    with pytest.raises(ImportError, match=f"works with TRL 0.15 to 1.13, 1.15 and 1.16, got TRL 9.9.9.*{why}"):
        patch_trl()
    assert all(value is before[where] for where, value in trl_names().items())


def test_a_later_trl_whose_function_is_the_same_is_taken(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with patch_trl():
        assert utils._ChunkedLogProbFunction is trl_head.ChunkedLogProb


def test_without_trl_the_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        ImportError, match=r"works with TRL 0\.15 to 1\.13, 1\.15 and 1\.16, and TRL cannot be imported"
    ):
        patch_trl()


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor], Tensor]:
    """TRL as it was from 0.15 to 1.13: trainers bind `selective_log_softmax(logits, index)` at import."""

    def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
        index = index if index.dim() == logits.dim() else index.unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, index).squeeze(-1)

    monkeypatch.delattr(utils, "add_fused_lm_head")
    monkeypatch.setattr(utils, "selective_log_softmax", selective_log_softmax)
    trainer = types.ModuleType("trl.trainer.older_trainer")
    trainer.selective_log_softmax = selective_log_softmax
    monkeypatch.setitem(sys.modules, trainer.__name__, trainer)
    return selective_log_softmax


def test_an_older_trl_scores_logits_through_the_op(older, caplog):
    trainer = sys.modules["trl.trainer.older_trainer"]
    logits = (6 * torch.randn(2, 7, 500)).bfloat16()
    index, mask = torch.randint(0, 500, (2, 7)), torch.rand(2, 7) < 0.5
    with caplog.at_level(logging.INFO, "fastdpo"), patch_trl():
        assert "selective_log_softmax, with which its trainers score, computes through fastdpo" in caplog.text
        results = []
        for score, x in ((trainer.selective_log_softmax, logits), (older, logits.to(F64))):
            x = x.clone().requires_grad_()
            logps = score(x, index)
            logps[~mask] = 0  # as TRL's DPO trainer does
            logps = torch.roll(logps, shifts=1, dims=1)
            logps[:, 1:].sum(-1).square().sum().backward()
            results.append((logps.detach(), x.grad))
        several = trainer.selective_log_softmax(logits, index[..., None].expand(2, 7, 3))
        assert several.shape == (2, 7, 3)
    (ours, grad), (truth, true_grad) = results
    assert ours.dtype == torch.float32
    assert float((ours - truth).abs().max()) <= 1e-5
    assert float((grad - true_grad).abs().max()) <= 1.2e-2 * float(true_grad.abs().max())
    # the control: TRL's own answers in bf16
    assert float((older(logits, index) - older(logits.to(F64), index)).abs().max()) > 5e-3
    assert trainer.selective_log_softmax is utils.selective_log_softmax is older


def test_threads_may_patch_at_once():
    def work() -> None:
        for _ in range(20):
            with patch_trl():
                assert utils._ChunkedLogProbFunction.__name__ == "ChunkedLogProb"

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work) for _ in range(6)]:
            done.result()
    assert utils._ChunkedLogProbFunction.__name__ != "ChunkedLogProb"
