"""The fused head through the patch, `model(..., labels=labels, fused_lm_head=True)`, against the model's own logits."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastdpo.integrations import trl_head
from fastdpo.integrations.trl import patch_trl
from fastdpo.ops import reference

pytest.importorskip("trl")
utils: Any = importlib.import_module("trl.trainer.utils")
F64 = torch.float64
ALL = ("log_probs", *trl_head.OUTPUTS)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_the_fused_head_scores_as_the_model_s_own_logits_do(kind, small_model, batch):
    model, inputs = small_model(kind).double(), batch()
    targets, mask = inputs["labels"][:, 1:], inputs["labels"][:, 1:] != -100
    plain = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    with patch_trl():
        utils.add_fused_lm_head(model, temperature=0.8, outputs=ALL)
        out = model(**inputs, fused_lm_head=True)
        out.loss.backward()
        shifted = model(
            input_ids=inputs["input_ids"], shift_labels=inputs["labels"].roll(-1, 1), fused_lm_head=True
        ).log_probs
        divided = model(**inputs, fused_lm_head=True, num_items_in_batch=5).loss
    z = plain.detach() / 0.8
    truth = reference.logprob(z, targets)
    assert out.log_probs.shape == out.entropy.shape == (3, 10)
    assert shifted.shape == (3, 11)
    assert torch.allclose(out.log_probs, truth, atol=1e-10)
    assert torch.allclose(out.loss, -truth.sum() / mask.sum(), atol=1e-10)
    assert torch.allclose(divided, -truth.sum() / 5, atol=1e-10)
    stats = reference.token_stats(z, targets.clamp(min=0))
    for name, ours in trl_head.OUTPUTS.items():
        expected = stats[ours].masked_fill(~mask, 0)
        assert torch.allclose(getattr(out, name).to(F64), expected.to(F64), atol=1e-10), name
    assert torch.equal(out.label_mask, mask)


def test_a_batch_without_a_scored_token_is_a_differentiable_zero(small_model, batch):
    model, inputs = small_model(), batch()
    inputs["labels"].fill_(-100)
    with patch_trl():
        utils.add_fused_lm_head(model, outputs=ALL)
        out = model(**inputs, fused_lm_head=True)
        (out.loss + out.entropy.sum()).backward()
    for name in ALL:
        assert getattr(out, name).shape == (3, 10)
        assert not getattr(out, name).any()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert float(out.loss) == 0.0


def test_on_a_cpu_only_scored_positions_are_computed(monkeypatch, small_model, batch):
    model, inputs = small_model(), batch()
    scored = int((inputs["labels"][:, 1:] != -100).sum())
    rows, run = [], trl_head.linear_logprob_stats
    monkeypatch.setattr(trl_head, "linear_logprob_stats", lambda *a, **k: rows.append(len(a[0])) or run(*a, **k))
    utils.add_fused_lm_head(model)
    with patch_trl():
        ours = model(**inputs, fused_lm_head=True).log_probs
    assert rows == [scored]
    assert torch.allclose(ours, model(**inputs, fused_lm_head=True).log_probs, atol=1e-5)
    assert rows == [scored]
    assert not ours[1].any()


@pytest.mark.parametrize("how", ["cast_lm_head_to_fp32", "bf16", "autocast"])
def test_16_bit_heads_are_exact(how, small_model, batch):
    """Error against float64 of the same operands; a bf16 logit of 10 would be off by 0.03."""
    model, inputs = small_model(vocab_size=4000, initializer_range=0.5), batch(4000)
    mask = inputs["labels"][:, 1:] != -100
    states = []
    model.model.norm.register_forward_hook(lambda *a: states.append(a[2].detach()))
    model = model if how == "autocast" else model.to(torch.bfloat16)
    with patch_trl(), torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
        utils.add_fused_lm_head(model, cast_lm_head_to_fp32=how == "cast_lm_head_to_fp32")
        out = model(**inputs, fused_lm_head=True)
        out.loss.backward()
    assert model.lm_head.weight.grad.dtype == model.lm_head.weight.dtype
    hidden, weight = (x.bfloat16().to(F64) for x in (states[0][:, :-1], model.lm_head.weight.detach()))
    z = hidden @ weight.t()
    assert float(z.abs().max()) > 10
    truth = reference.logprob(z, inputs["labels"][:, 1:])
    assert float((out.log_probs - truth).abs()[mask].max()) <= 1e-4
    assert float((reference.logprob(z.bfloat16(), inputs["labels"][:, 1:]) - truth).abs()[mask].max()) > 5e-3


@contextmanager
def gathered(full: dict[int, Tensor], *parameters: nn.Parameter | None) -> Iterator[None]:
    """As ZeRO-3's gathering: the parameters are whole inside, and empty after it."""
    there = [p for p in parameters if p is not None and p.numel() == 0]
    for p in there:
        p.data = full[id(p)].clone()
    yield
    for p in there:
        p.data = torch.empty(0, dtype=p.dtype)


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("keep", ["0", "64"], ids=["recompute", "kept"])
def test_a_weight_that_is_gathered_for_the_call_only(trained, keep, monkeypatch, small_model, batch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    model, inputs = small_model(), batch()
    model.lm_head.requires_grad_(trained)
    weight, results = model.lm_head.weight, []
    full = {id(weight): weight.detach().clone()}

    def whole(_: Tensor) -> None:
        weight.data = full[id(weight)]

    utils.add_fused_lm_head(model, outputs=ALL)
    for sharded in (False, True):
        model.zero_grad()
        if sharded:
            weight.data = torch.empty(0)
            # where a gradient is added to it, it is whole again
            weight.register_hook(whole) if trained else None
            monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", functools.partial(gathered, full))
        with patch_trl():
            out = model(**inputs, fused_lm_head=True)
            assert weight.numel() == (0 if sharded else full[id(weight)].numel())
            (out.loss + out.entropy.sum()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert (weight.grad is not None) == trained
        results.append([out.log_probs.detach(), out.entropy.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("apart", [False, True], ids=["with the model", "the head apart"])
def test_a_head_that_fsdp2_shards(apart, one_process, small_model, batch):
    """Apart, it is a DTensor in TRL's forward, which gathers it."""
    inputs, results = batch(), []
    for patched in (False, True):
        model = small_model()
        utils.add_fused_lm_head(model, outputs=ALL)
        for module in (model.lm_head, model)[1 - apart :]:
            fully_shard(module, mesh=one_process)
        with patch_trl() if patched else nullcontext():
            out = model(**inputs, fused_lm_head=True)
            (out.loss + 0.1 * out.entropy.sum()).backward()
        results.append([out.log_probs.detach(), *(p.grad.full_tensor() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entropy", [0.0, 0.1], ids=["logged", "in the loss"])
def test_a_compiled_model_gives_the_same(entropy, small_model, batch):
    model, inputs = small_model(), batch()
    with patch_trl():
        utils.add_fused_lm_head(model, outputs=ALL)
        results = []
        for forward in (torch.compile(model, backend="aot_eager"), model):
            model.zero_grad()
            out = forward(**inputs, fused_lm_head=True)
            (out.loss + entropy * out.entropy.sum() if entropy else out.loss).backward()
            assert trl_head.EntropyOnDemand.asked_for == (entropy > 0)
            results.append([out.log_probs.detach(), *(p.grad.clone() for p in model.parameters())])
    torch._dynamo.reset()
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
