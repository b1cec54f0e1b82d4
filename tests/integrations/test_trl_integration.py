"""`patch_trl`: TRL's trainers through fastdpo, against TRL's own function, float64 and logits."""

import copy
import functools
import importlib
import json
import logging
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._device
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastdpo.demo import demo_paths
from fastdpo.integrations import trl_head
from fastdpo.integrations.trl import TrlPatch, patch_trl
from fastdpo.ops import reference

trl: Any = pytest.importorskip("trl")
utils: Any = importlib.import_module("trl.trainer.utils")
if not hasattr(utils, "_use_triton"):
    pytest.skip(f"TRL 1.16 is what these compare with, {trl.__version__} is installed", allow_module_level=True)
chunked_logprob: Any = importlib.import_module("trl.kernels.chunked_logprob")

ROOT = Path(__file__).resolve().parents[2]
F64 = torch.float64
ALL = ("log_probs", *trl_head.OUTPUTS)


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """torch.empty as it is: patched, it escapes the meta device on which models are built before they are loaded."""


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    left = len(TrlPatch._in_force)
    for handle in list(TrlPatch._in_force):
        handle.undo()
    assert left == 0, "a test left the patch on"


def trl_names() -> dict[tuple[str, str], Any]:
    """Every name in every loaded module of TRL."""
    modules = [name for name in sys.modules if name.split(".")[0] == "trl"]
    return {(name, key): value for name in modules for key, value in vars(sys.modules[name]).items()}


# the function's contract: (hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)


def operands(n: int, h: int = 24, v: int = 203, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """hidden (n, h), weight (v, h), bias (v,), peaked like a trained model's, and targets (n,)."""
    targets = torch.randint(0, v, (n,))
    weight, bias = torch.randn(v, h), torch.randn(v)
    hidden = 0.4 * torch.randn(n, h) + torch.rand(n, 1) * 0.3 * weight[targets]
    return [x.to(dtype) for x in (hidden, weight, bias)], targets


def through_the_patch(tensors: list[Tensor], targets: Tensor, options: dict[str, Any], outputs: Any = ALL) -> Any:
    hidden, weight, bias = tensors
    values = [options.get(name, value) for name, value in (("temperature", 1.0), ("softcap", None), ("scale", 1.0))]
    return utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias if options.get("bias", True) else None, targets, values[0], 64, *values[1:], outputs
    )


def defined(tensors: list[Tensor], targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    hidden, weight, bias = (x.to(F64) for x in tensors)
    z = (hidden @ weight.t() + (bias if options.get("bias", True) else 0.0)) * options.get("scale", 1.0)
    cap = options.get("softcap")
    z = (z if cap is None else cap * torch.tanh(z / cap)) / options.get("temperature", 1.0)
    p = z.softmax(-1)
    return {
        "log_probs": z.log_softmax(-1).gather(1, targets[:, None])[:, 0],
        "entropy": -(p * z.log_softmax(-1)).sum(1),
        "log_sum_sq_probs": (p**2).sum(1).log(),
        "mean_logits": z.mean(1),
        "is_top1": z.argmax(1) == targets,
    }


OPTIONS = {
    "plain": {"bias": False},
    "bias": {},
    "temperature": {"temperature": 0.7, "bias": False},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "all": {"softcap": 5.0, "scale": 1.5, "temperature": 1.3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_outputs_and_gradients_are_those_of_float64(options, dtype):
    tensors, targets = operands(41, dtype=dtype)
    up, up_entropy = torch.randn(41), torch.randn(41)
    exact = [x.to(F64).requires_grad_() for x in tensors]
    truth = defined(exact, targets, options)
    loss = (truth["log_probs"] * up).sum() + (truth["entropy"] * up_entropy).sum()
    used = exact if options.get("bias", True) else exact[:2]
    true_grads = torch.autograd.grad(loss, used)
    with patch_trl():
        for asked_before in (False, True):
            assert trl_head.EntropyOnDemand.asked_for is asked_before
            leaves = [x.clone().requires_grad_() for x in tensors]
            found = dict(zip(ALL, through_the_patch(leaves, targets, options), strict=True))
            for name, x in found.items():
                assert x.shape == (41,)
                assert x.dtype == (torch.bool if name == "is_top1" else torch.float32)
                assert x.requires_grad == (name in ("log_probs", "entropy"))
                assert float((x.detach().to(F64) - truth[name].detach().to(F64)).abs().max()) <= 2e-5, name
            assert 0 < int(found["is_top1"].sum()) < 41
            ((found["log_probs"] * up).sum() + (found["entropy"] * up_entropy).sum()).backward()
            for leaf, t in zip(leaves, true_grads, strict=False):
                assert leaf.grad.dtype == dtype
                limit = (2e-5 if dtype == torch.float32 else 1.2e-2) * float(t.abs().max())
                assert float((leaf.grad.to(F64) - t).abs().max()) <= limit


def test_a_wrong_scale_would_be_seen():
    tensors, targets = operands(41)
    with patch_trl():
        found = through_the_patch(tensors, targets, {"scale": 1.01})[0]
    assert float((found - defined(tensors, targets, {})["log_probs"]).abs().max()) > 1e-3


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "is_top1"), ("mean_logits", "log_sum_sq_probs"), ()])
def test_only_the_outputs_that_are_asked_for(outputs):
    tensors, targets = operands(5)
    with patch_trl():
        found = dict(zip(ALL, through_the_patch(tensors, targets, {}, outputs), strict=True))
    assert {name for name, x in found.items() if x is not None} == {"log_probs", *outputs}


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 1)], ids=["hidden", "weight", "bias", "hidden, weight"])
@pytest.mark.parametrize("asked_before", [False, True], ids=["on demand", "at once"])
def test_the_entropy_alone_is_differentiated(needs, asked_before, monkeypatch):
    tensors, targets = operands(17, dtype=F64)
    with patch_trl():
        monkeypatch.setattr(trl_head.EntropyOnDemand, "asked_for", asked_before)
        leaves = [x.requires_grad_(i in needs) for i, x in enumerate(tensors)]
        wanted = [leaves[i] for i in needs]
        found = torch.autograd.grad((through_the_patch(leaves, targets, {})[1] ** 2).sum(), wanted)
    truth = torch.autograd.grad((defined(leaves, targets, {})["entropy"] ** 2).sum(), wanted)
    for a, t in zip(found, truth, strict=True):
        assert float((a - t).abs().max()) <= 1e-10


def test_an_entropy_that_is_only_logged_costs_no_gradient(monkeypatch):
    asked = []
    run = trl_head.linear_logprob_stats
    monkeypatch.setattr(
        trl_head, "linear_logprob_stats", lambda *a, **k: asked.append(k["entropy_grad"]) or run(*a, **k)
    )
    tensors, targets = operands(9)
    tensors[0].requires_grad_()
    with patch_trl():
        for _ in range(2):
            logps, entropy, *_ = through_the_patch(tensors, targets, {})
            (logps.sum() + entropy.detach().sum()).backward()
        assert asked == [False, False]
        through_the_patch(tensors, targets, {})[1].sum().backward()
        through_the_patch(tensors, targets, {})
        assert asked == [False] * 3 + [True, True]
    with patch_trl():  # another run starts anew
        through_the_patch(tensors, targets, {})
    assert asked[-1] is False


def test_under_autocast_the_entropy_s_gradient_is_that_of_the_rounded_operands():
    tensors, targets = operands(33)
    rounded = [x.bfloat16() for x in tensors[:2]]
    exact = [*(x.to(F64).requires_grad_() for x in rounded), tensors[2].to(F64)]
    truth = torch.autograd.grad(defined(exact, targets, {})["entropy"].sum(), exact[:2])
    found = []
    with patch_trl():
        for _ in ("on demand", "at once"):
            leaves = [x.clone().requires_grad_() for x in tensors]
            with torch.autocast("cpu", torch.bfloat16):
                entropy = through_the_patch(leaves, targets, {})[1]
            entropy.sum().backward()
            found.append([x.grad for x in leaves])
            for grad, t in zip(found[-1], truth, strict=False):
                assert grad.dtype == torch.float32
                assert float((grad - t).abs().max()) <= 1.2e-2 * float(t.abs().max())
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


def test_of_equal_logits_every_one_is_the_largest():
    weight = torch.ones(5, 3)
    with patch_trl():
        found = utils._ChunkedLogProbFunction.apply(torch.ones(5, 3), weight, None, torch.arange(5), 1.0, 64)
    assert found[4].all()


# the fused head: model(..., labels=labels, fused_lm_head=True)


def small_model(kind: str = "llama", **options: Any) -> Any:
    size: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        **options,
    }
    classes = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "gemma2": (Gemma2ForCausalLM, functools.partial(Gemma2Config, head_dim=8, final_logit_softcapping=3.0)),
        "cohere": (CohereForCausalLM, functools.partial(CohereConfig, logit_scale=0.25)),
        "granite": (GraniteForCausalLM, functools.partial(GraniteConfig, logits_scaling=3.0)),
    }
    model, config = classes[kind]
    torch.manual_seed(0)
    return model(config(**size))


def batch(vocabulary: int = 97) -> dict[str, Tensor]:
    ids = torch.randint(1, vocabulary, (3, 11))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_the_fused_head_scores_as_the_model_s_own_logits_do(kind):
    model, inputs = small_model(kind).double(), batch()
    targets, mask = inputs["labels"][:, 1:], inputs["labels"][:, 1:] != -100
    plain = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    with patch_trl():
        utils.add_fused_lm_head(model, temperature=0.8, outputs=ALL)
        found = model(**inputs, fused_lm_head=True)
        found.loss.backward()
        shifted = model(
            input_ids=inputs["input_ids"], shift_labels=inputs["labels"].roll(-1, 1), fused_lm_head=True
        ).log_probs
        divided = model(**inputs, fused_lm_head=True, num_items_in_batch=5).loss
    z = plain.detach() / 0.8
    truth = reference.logprob(z, targets)
    assert found.log_probs.shape == found.entropy.shape == (3, 10)
    assert shifted.shape == (3, 11)
    assert torch.allclose(found.log_probs, truth, atol=1e-10)
    assert torch.allclose(found.loss, -truth.sum() / mask.sum(), atol=1e-10)
    assert torch.allclose(divided, -truth.sum() / 5, atol=1e-10)
    stats = reference.token_stats(z, targets.clamp(min=0))
    for name, ours in trl_head.OUTPUTS.items():
        expected = stats[ours].masked_fill(~mask, 0)
        assert torch.allclose(getattr(found, name).to(F64), expected.to(F64), atol=1e-10), name
    assert torch.equal(found.label_mask, mask)


def test_a_batch_without_a_scored_token_is_a_differentiable_zero():
    model, inputs = small_model(), batch()
    inputs["labels"].fill_(-100)
    with patch_trl():
        utils.add_fused_lm_head(model, outputs=ALL)
        found = model(**inputs, fused_lm_head=True)
        (found.loss + found.entropy.sum()).backward()
    for name in ALL:
        assert getattr(found, name).shape == (3, 10)
        assert not getattr(found, name).any()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert float(found.loss) == 0.0


def test_on_a_cpu_only_scored_positions_are_computed(monkeypatch):
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
def test_16_bit_heads_are_exact(how):
    """Error against float64 of the same operands; a bf16 logit of 10 would be off by 0.03."""
    model, inputs = small_model(vocab_size=4000, initializer_range=0.5), batch(4000)
    mask = inputs["labels"][:, 1:] != -100
    states = []
    model.model.norm.register_forward_hook(lambda *a: states.append(a[2].detach()))
    model = model if how == "autocast" else model.to(torch.bfloat16)
    with patch_trl(), torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
        utils.add_fused_lm_head(model, cast_lm_head_to_fp32=how == "cast_lm_head_to_fp32")
        found = model(**inputs, fused_lm_head=True)
        found.loss.backward()
    assert model.lm_head.weight.grad.dtype == model.lm_head.weight.dtype
    hidden, weight = (x.bfloat16().to(F64) for x in (states[0][:, :-1], model.lm_head.weight.detach()))
    z = hidden @ weight.t()
    assert float(z.abs().max()) > 10
    truth = reference.logprob(z, inputs["labels"][:, 1:])
    assert float((found.log_probs - truth).abs()[mask].max()) <= 1e-4
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
def test_a_weight_that_is_gathered_for_the_call_only(trained, keep, monkeypatch):
    monkeypatch.setenv("FASTDPO_KEEP_MB", keep)
    model, inputs = small_model(), batch()
    model.lm_head.requires_grad_(trained)
    weight, found = model.lm_head.weight, []
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
        found.append([out.log_probs.detach(), out.entropy.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("apart", [False, True], ids=["with the model", "the head apart"])
def test_a_head_that_fsdp2_shards(apart, one_process):
    """Apart, it is a DTensor in TRL's forward, which gathers it."""
    inputs, found = batch(), []
    for patched in (False, True):
        model = small_model()
        utils.add_fused_lm_head(model, outputs=ALL)
        for module in (model.lm_head, model)[1 - apart :]:
            fully_shard(module, mesh=one_process)
        with patch_trl() if patched else nullcontext():
            out = model(**inputs, fused_lm_head=True)
            (out.loss + 0.1 * out.entropy.sum()).backward()
        found.append([out.log_probs.detach(), *(p.grad.full_tensor() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entropy", [0.0, 0.1], ids=["logged", "in the loss"])
def test_a_compiled_model_gives_the_same(entropy):
    model, inputs = small_model(), batch()
    with patch_trl():
        utils.add_fused_lm_head(model, outputs=ALL)
        found = []
        for forward in (torch.compile(model, backend="aot_eager"), model):
            model.zero_grad()
            out = forward(**inputs, fused_lm_head=True)
            (out.loss + entropy * out.entropy.sum() if entropy else out.loss).backward()
            assert trl_head.EntropyOnDemand.asked_for == (entropy > 0)
            found.append([out.log_probs.detach(), *(p.grad.clone() for p in model.parameters())])
    torch._dynamo.reset()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


# TRL's trainers


@functools.cache
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in demo_paths().train.read_text(encoding="utf-8").splitlines()[:40]]


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [len(completion[0]["content"]) / 40 for completion in completions]


def dataset(kind: str) -> Dataset:
    if kind == "kto":
        both = [(row, side) for row in rows() for side in ("chosen", "rejected")]
        return Dataset.from_list(
            [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r, side in both]
        )
    columns = {"dpo": ("prompt", "chosen", "rejected"), "sft": ("prompt", "chosen")}.get(kind, ("prompt",))
    chosen = {"chosen": "completion"} if kind == "sft" else {}
    return Dataset.from_list([{chosen.get(name, name): row[name] for name in columns} for row in rows()])


def trainer_of(kind: str, folder: Path, model: Any = None, peft_config: Any = None, **options: Any) -> Any:
    """TRL's trainer on the demo's model and pairs; on-policy ones generate a few tokens."""
    sampling = {"num_generations": 4, "max_completion_length": 12, "temperature": 0.9, "beta": 0.1}
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 20,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        **(sampling if kind in ("grpo", "rloo") else {}),
        **options,
    }
    first = [str(demo_paths().model) if model is None else model, *([reward] if kind in ("grpo", "rloo") else [])]
    config, trainer = (getattr(trl, f"{kind.upper()}{name}") for name in ("Config", "Trainer"))
    return trainer(*first, args=config(**arguments), train_dataset=dataset(kind), peft_config=peft_config)


def train(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
    running = trainer_of(*arguments, **options)
    running.train()
    return [line for line in running.state.log_history if "loss" in line]


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps: int) -> None:
    assert len(ours) == len(theirs) == steps
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if name != "step_time":
                # a metric near zero is a difference of log-probs, of which fp32 keeps 1e-4 nats
                small = 1e-6 if name == "loss" else 2e-4
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=small), (step, name)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("TRL's own tile function ran")


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of TRL's tile functions has run from here on."""
    counts = {"_forward_tile": 0, "_backward_tile": 0}

    def count(name: str, run: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        counts[name] += 1
        run(*args, **kwargs)

    for name in counts:
        monkeypatch.setattr(chunked_logprob, name, functools.partial(count, name, getattr(chunked_logprob, name)))
    return counts


CASES = {
    "dpo": ("dpo", {}),
    "dpo, frozen head, wpo weights": ("dpo", {"use_weighting": True, "peft_config": True}),
    "kto": ("kto", {}),
    "sft": ("sft", {}),
    "grpo, entropy bonus": ("grpo", {"max_steps": 4, "entropy_coef": 0.01}),
    "rloo": ("rloo", {"max_steps": 4}),
}


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES.keys())
def test_trl_s_trainers_give_the_same_and_run_none_of_trl_s_tiles(kind, options, tmp_path, monkeypatch):
    if "peft_config" in options:
        options = {**options, "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    with monkeypatch.context() as no_tiles, patch_trl():
        no_tiles.setattr(chunked_logprob, "_forward_tile", refuse)
        no_tiles.setattr(chunked_logprob, "_backward_tile", refuse)
        ours = train(kind, tmp_path / "ours", **options)
        assert trl_head.EntropyOnDemand.asked_for == (kind == "grpo")
    counts = counted(monkeypatch)
    theirs = train(kind, tmp_path / "trl", **options)
    steps = options.get("max_steps", 20)
    assert counts["_forward_tile"] >= counts["_backward_tile"] >= steps
    compare(ours, theirs, steps)
    # the comparison means something: the runs move
    assert max(line["grad_norm"] for line in theirs) > 1e-2
    assert kind == "rloo" or abs(theirs[-1]["loss"] - theirs[0]["loss"]) > 1e-2


# a LoRA on lm_head


def logits_head(model: Any, outputs: tuple[str, ...] = (), **_: Any) -> None:
    """`add_fused_lm_head` by the definition: the model's own logits, adapter and all."""
    plain = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        logits, targets = plain(*args, **kwargs).logits[:, :-1], labels[:, 1:]
        mask = targets != -100
        stats = reference.token_stats(logits, targets.clamp(min=0))
        fields = {name: stats[ours].masked_fill(~mask, 0) for name, ours in trl_head.OUTPUTS.items() if name in outputs}
        logps = reference.logprob(logits, targets)
        return utils.FusedCausalLMOutput(loss=-logps.sum() / mask.sum(), log_probs=logps, label_mask=mask, **fields)

    model.forward = types.MethodType(forward, model)


def lora_on_the_head(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", **options)


def trained_adapter() -> PeftModel:
    """As one that was trained and saved before: the reference is then a copy of it, not the model below."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(demo_paths().model)
    model = get_peft_model(base, lora_on_the_head())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("kind", ["dpo", "dpo, a trained adapter", "kto", "sft"])
def test_a_lora_on_the_head_trains_as_through_logits(kind, tmp_path, monkeypatch):
    kind, *again = kind.split(", ")
    steps = 10 if kind == "dpo" else 5
    given: Callable[[], dict[str, Any]] = lambda: (  # noqa: E731
        {"model": trained_adapter()} if again else {"peft_config": lora_on_the_head()}
    )
    with patch_trl():
        ours = train(kind, tmp_path / "ours", max_steps=steps, learning_rate=1e-2, **given())
    module = sys.modules[f"trl.trainer.{kind}_trainer"]
    with monkeypatch.context() as by_logits:
        by_logits.setattr(module, "add_fused_lm_head", logits_head)
        by_logits.setattr(module, "BaseTunerLayer", ())
        theirs = train(kind, tmp_path / "logits", max_steps=steps, learning_rate=1e-2, **given())
    compare(ours, theirs, steps)
    if kind == "dpo":
        # the adapter switched off, or its copy, is the policy's own start, to the last bit
        assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert ours[0]["rewards/margins"] == 0.0
        assert abs(ours[-1]["rewards/margins"]) > 1e-2
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer_of(kind, tmp_path / "no", **given())


def lora_model(**options: Any) -> PeftModel:
    model = get_peft_model(small_model(**options), lora_on_the_head())
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_a_lora_on_the_head_gets_its_gradients_and_is_switched_off():
    inputs, found = batch(), []
    for add in (None, logits_head):
        model = lora_model().double()
        with patch_trl():
            (add or utils.add_fused_lm_head)(model.get_base_model(), outputs=ALL)
            out = model(**inputs, fused_lm_head=True)
            (out.loss + 0.1 * out.entropy.sum()).backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            with torch.no_grad(), model.disable_adapter():
                without = model(**inputs, fused_lm_head=True).log_probs
            plain = model(input_ids=inputs["input_ids"]).logits
        assert sum("lm_head.lora" in name for name in grads) == 2
        found.append([*(getattr(out, name).detach() for name in ALL), without, plain.detach(), *grads.values()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    assert not torch.allclose(found[0][0], found[0][len(ALL)], atol=1e-2)


def test_a_lora_on_the_head_is_never_left_out_in_silence(monkeypatch):
    model, inputs = lora_model(), batch()
    with patch_trl():
        utils.add_fused_lm_head(model.get_base_model())
        model.add_adapter("second", lora_on_the_head())
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match="lm_head is under 2 adapters at once"):
            model(**inputs, fused_lm_head=True)
        model.set_adapter("default")
        monkeypatch.setattr(
            model.get_output_embeddings().lora_B["default"].weight, "ds_status", "NOT_AVAILABLE", raising=False
        )
        with pytest.raises(ValueError, match="that FSDP2 or ZeRO-3 has sharded"):
            model(**inputs, fused_lm_head=True)
    with pytest.raises(RuntimeError, match="patch_trl was undone while"):
        model(**inputs, fused_lm_head=True)
    assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 11, 97)


def own_scores(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probs of TRL's positions from the logits of the model's own forward; 0 where not scored."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # of the class: without fused_lm_head TRL's forward runs the model that it was made for, of a copy too
    logits = type(base).forward(base, inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(labels < 0, 0.0).detach()


def test_a_lora_on_the_head_is_that_of_the_model_that_is_called():
    inputs = batch()
    with patch_trl():
        model = lora_model().double()
        utils.add_fused_lm_head(model.get_base_model())
        copied = copy.deepcopy(model)
        for name, parameter in copied.named_parameters():
            parameter.data += 0.3 * torch.randn_like(parameter) if "lora" in name else 0.1
        out = copied(**inputs, fused_lm_head=True)
        torch.testing.assert_close(out.log_probs.detach(), own_scores(copied, inputs), rtol=0, atol=1e-8)
        out.loss.backward()
        assert all(p.grad is None for p in model.parameters())
        # a plain model after one with an adapter
        plain = small_model(num_hidden_layers=2).double()
        utils.add_fused_lm_head(plain)
        model(**inputs, fused_lm_head=True)
        found = plain(**inputs, fused_lm_head=True).log_probs.detach()
        torch.testing.assert_close(found, own_scores(plain, inputs), rtol=0, atol=1e-8)
        # an adapter that comes after the fused head
        late = get_peft_model(plain, lora_on_the_head())
        for name, parameter in late.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        found = late(**inputs, fused_lm_head=True).log_probs.detach()
        torch.testing.assert_close(found, own_scores(late, inputs), rtol=0, atol=1e-8)
        merged = late.merge_and_unload()
    # nothing of an adapter is left, so TRL alone may go on
    merged(**inputs, fused_lm_head=True)


def test_threads_may_patch_at_once():
    def work() -> None:
        for _ in range(20):
            with patch_trl():
                assert utils._ChunkedLogProbFunction.__name__ == "ChunkedLogProb"

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work) for _ in range(6)]:
            done.result()
    assert utils._ChunkedLogProbFunction.__name__ != "ChunkedLogProb"


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_what_is_no_plain_lora_is_refused_in_trl_s_words(tmp_path):
    trl_says = "adapter to `lm_head` is not supported"
    with patch_trl():
        for config in (lora_on_the_head(use_dora=True), lora_on_the_head(lora_bias=True)):
            with pytest.raises(ValueError, match=trl_says):
                trainer_of("dpo", tmp_path, peft_config=config)
        with pytest.raises(ValueError, match=trl_says):
            trainer_of("grpo", tmp_path, peft_config=lora_on_the_head())


# on, off, and which TRL


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
        found = []
        for score, x in ((trainer.selective_log_softmax, logits), (older, logits.to(F64))):
            x = x.clone().requires_grad_()
            logps = score(x, index)
            logps[~mask] = 0  # as TRL's DPO trainer does
            logps = torch.roll(logps, shifts=1, dims=1)
            logps[:, 1:].sum(-1).square().sum().backward()
            found.append((logps.detach(), x.grad))
        several = trainer.selective_log_softmax(logits, index[..., None].expand(2, 7, 3))
        assert several.shape == (2, 7, 3)
    (ours, grad), (truth, true_grad) = found
    assert ours.dtype == torch.float32
    assert float((ours - truth).abs().max()) <= 1e-5
    assert float((grad - true_grad).abs().max()) <= 1.2e-2 * float(true_grad.abs().max())
    # the control: TRL's own answers in bf16
    assert float((older(logits, index) - older(logits.to(F64), index)).abs().max()) > 5e-3
    assert trainer.selective_log_softmax is utils.selective_log_softmax is older


# other releases of TRL, each in a folder of its own

RELEASES = {
    "0.20.0": (
        "transformers==4.55.4",
        "tokenizers==0.21.4",
        "huggingface_hub==0.34.4",
        "datasets==4.0.0",
        "peft==0.17.1",
        "accelerate==1.10.1",
        "requests",
        "urllib3",
        "certifi",
        "idna",
        "charset-normalizer",
    ),
    "1.13.0": (),
    "1.15.0": (),
}
# trains with TRL alone (where that runs on a CPU), then through the patch, and prints losses and the op's calls
SCRIPT = """
import json, sys, torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from fastdpo.demo import demo_paths
from fastdpo.integrations import trl as integration, trl_head

import trl
torch.set_num_threads(1)
paths, calls = demo_paths(), []
for module, name in ((integration, "logprob"), (trl_head, "linear_logprob_stats")):
    def counted(*args, run=getattr(module, name), **kwargs):
        calls.append(name)
        return run(*args, **kwargs)
    setattr(module, name, counted)
special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
rows = [json.loads(line) for line in paths.train.read_text().splitlines()[:24]]
pairs = Dataset.from_list([{k: v[0]["content"] for k, v in row.items()} for row in rows])


def train():
    model, ref = (LlamaForCausalLM.from_pretrained(paths.model) for _ in range(2))
    args = trl.DPOConfig(
        sys.argv[1], use_cpu=True, bf16=False, disable_tqdm=True, report_to=[], save_strategy="no", max_steps=6,
        per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, gradient_checkpointing=False,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(paths.model / "tokenizer.json"), **special)
    running = trl.DPOTrainer(model, ref, args=args, train_dataset=pairs, processing_class=tokenizer)
    running.train()
    return [line["loss"] for line in running.state.log_history if "loss" in line]


plain = train() if sys.argv[2] == "plain" else None
untouched = len(calls)
with integration.patch_trl():
    ours = train()
result = {"version": trl.__version__, "plain": plain, "ours": ours, "untouched": untouched, "calls": len(calls)}
print("RESULT" + json.dumps(result))
"""


def run_script(folder: Path, extra: str, plain: bool) -> dict[str, Any]:
    path = os.pathsep.join(x for x in (extra, str(ROOT)) if x)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), "plain" if plain else "patched only"],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.slow
@pytest.mark.parametrize("version", RELEASES)
def test_other_releases_of_trl(version, tmp_path):
    folder = str(tmp_path / "packages")
    wanted = [f"trl=={version}", *RELEASES[version]]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *wanted]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {wanted[0]} and what it needs here: {done.stderr.strip()[-200:]}")
    plain = version != "1.15.0"  # that one runs Triton kernels on any device
    found = run_script(tmp_path, folder, plain)
    assert found["version"] == version
    assert found["untouched"] == 0
    assert found["calls"] == 12  # policy and reference of each step
    theirs = found["plain"] if plain else run_script(tmp_path, "", True)["plain"]
    assert len(theirs) == 6
    assert theirs[0] - theirs[-1] > 0.1
    assert found["ours"] == pytest.approx(theirs, rel=1e-3)
