"""TR-DPO: the reference follows the policy by the paper's rule, for whole models and for what a LoRA adds."""

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

import tiny_runs
from fastdpo.training.checkpoints.content_hashes import MANIFEST
from fastdpo.training.checkpoints.folders import REFERENCE_NAME, CheckpointError
from fastdpo.training.reference import synced
from fastdpo.training.reference.synced import SyncedAdapter, SyncedModel, lora_factors, rank_limit, recompress
from fastdpo.training.trainer import DPOTrainer
from tiny_runs import ENVIRONMENT, ROOT, batch_of, by_definition, losses, model, reference_logps


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})


def adapted(**options: Any) -> PeftModel:
    """With an adapter whose factors are not zero, of a size that is felt."""
    policy = cast(PeftModel, get_peft_model(model(), lora(**options)))
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def make(folder: Path, policy: Any, **options: Any) -> DPOTrainer:
    usual = {"max_steps": 6, "sync_ref_model": True, "ref_model_sync_steps": 2}
    return tiny_runs.make(folder, policy, **{**usual, **options})


class Dense(TrainerCallback):
    """Keeps a dense reference beside the run, by the paper's rule, and the policies that it saw."""

    def __init__(self, start: nn.Module, every: int, alpha: float) -> None:
        self.reference, self.every, self.alpha = start, every, alpha
        self.mixed = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.mixed += 1
            policy = merged(kwargs["model"])
            for mine, other in zip(self.reference.parameters(), policy.parameters(), strict=True):
                mine.data = (1 - self.alpha) * mine.data + self.alpha * other.data


def merged(policy: nn.Module) -> nn.Module:
    policy = copy.deepcopy(policy)
    return cast(Any, policy).merge_and_unload() if isinstance(policy, PeftModel) else policy


def test_frozen_copy_follows_trl_s_formula(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    policy, theirs = model(), model()

    class Trl(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 2 == 0:
                callbacks.SyncRefModelCallback._sync_target_model(kwargs["model"], theirs, 0.6)

    trainer = make(tmp_path, policy, callbacks=[Trl()])
    reference = trainer._reference
    assert isinstance(reference, SyncedModel)
    assert trainer.reference_description == (
        "a copy of the starting policy, mixed with the policy every 2 steps (alpha 0.6)"
    )
    assert trainer.reference_origin == {"kind": "start", "synced": True}
    trainer.train()
    for (name, mine), other in zip(reference.model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name
    start = model()
    assert not torch.equal(reference.model.get_parameter("lm_head.weight"), start.lm_head.weight)
    assert not torch.equal(reference.model.get_parameter("lm_head.weight"), policy.lm_head.weight)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


PATTERNS = {
    "fresh": {},
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "ranks": {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"q_proj": 7}},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize(("kind", "alpha"), [*((kind, 0.6) for kind in PATTERNS), ("fresh", 1.0), ("ranks", 1.0)])
def test_lora_reference_equals_the_dense_rule(tmp_path: Path, kind: str, alpha: float) -> None:
    policy = get_peft_model(model(), lora()) if kind == "fresh" else adapted(**PATTERNS[kind])
    dense = Dense(merged(policy), 2, alpha)
    trainer = make(tmp_path, policy, callbacks=[dense], ref_model_mixup_alpha=alpha)
    reference = trainer._reference
    assert isinstance(reference, SyncedAdapter)
    batch = batch_of(trainer)
    start = reference_logps(trainer, batch)
    torch.testing.assert_close(start, by_definition(dense.reference, batch), rtol=1e-5, atol=1e-5)
    trainer.train()
    assert dense.mixed == 3
    moved = reference_logps(trainer, batch)
    torch.testing.assert_close(moved, by_definition(dense.reference, batch), rtol=1e-5, atol=1e-5)
    assert (moved - start).abs().max() > 1e-2
    # the adapter itself is as it was trained, with its own rank
    trained = cast(PeftModel, trainer.model)
    shapes = {name: p.shape for name, p in trained.named_parameters() if p.requires_grad}
    fresh = get_peft_model(model(), lora(**PATTERNS[kind]))
    assert shapes == {name: p.shape for name, p in fresh.named_parameters() if p.requires_grad}
    if alpha == 1:
        torch.testing.assert_close(moved, by_definition(trained, batch), rtol=1e-5, atol=1e-5)
    else:
        # mixing the factors one by one is another rule
        wrong = Wrong(get_peft_model(model(), lora()) if kind == "fresh" else adapted(**PATTERNS[kind]))
        make(tmp_path, wrong.policy, callbacks=[wrong]).train()
        torch.testing.assert_close(by_definition(wrong.policy, batch), by_definition(trained, batch))
        assert (by_definition(wrong.reference, batch) - moved).abs().max() > 1e-4


class Wrong(TrainerCallback):
    def __init__(self, policy: Any) -> None:
        self.policy, self.reference = policy, copy.deepcopy(policy)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 2 == 0:
            for mine, other in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                mine.data = 0.4 * mine.data + 0.6 * other.data


def test_recompression_keeps_the_best_and_measures_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = torch.randn(9, 20, dtype=torch.float64), torch.randn(12, 9, dtype=torch.float64)
    singular = torch.linalg.svdvals(b @ a)
    for rank in (4, 9):
        new_a, new_b, error = recompress(a, b, rank)
        assert new_a.shape == (rank, 20)
        assert new_b.shape == (12, rank)
        lost = float((b @ a - new_b @ new_a).norm() / (b @ a).norm())
        assert lost == pytest.approx(error, abs=1e-12)
        assert error == pytest.approx(float(singular[rank:].norm() / singular.norm()), abs=1e-12)
    assert error < 1e-12
    assert recompress(torch.zeros(3, 5), torch.zeros(4, 3), 2)[2] == 0.0
    assert rank_limit(torch.zeros(3, 500), torch.zeros(400, 3)) == 64
    assert rank_limit(torch.zeros(16, 500), torch.zeros(400, 16)) == 128
    assert rank_limit(torch.zeros(16, 500), torch.zeros(90, 16)) == 90

    # ranks stay bounded, and the error that the log names bounds what it costs
    monkeypatch.setattr(synced, "rank_limit", lambda a, b: 2 * len(a))
    policy = adapted()
    dense = Dense(merged(policy), 1, 0.3)
    trainer = make(tmp_path, policy, callbacks=[dense], ref_model_mixup_alpha=0.3, ref_model_sync_steps=1)
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        trainer.train()
    reference = cast(SyncedAdapter, trainer._reference)
    assert {len(reference.start[a_name]) for a_name, _ in reference.layers} == {6}
    said = [line for line in caplog.messages if "mixed with the policy after step" in line]
    assert len(said) == 6
    errors = [float(line.split("at most ")[1].split(" ")[0]) for line in said]
    assert errors[0] == 0.0
    assert 0 < max(errors) < 0.2
    for a_name, b_name in reference.layers:
        path = a_name.split(".lora_A")[0].removeprefix("base_model.model.")
        base = cast(PeftModel, trainer.model).get_parameter(f"base_model.model.{path}.base_layer.weight")
        delta = dense.reference.get_parameter(f"{path}.weight") - base
        kept = 8 / 3 * reference.start[b_name] @ reference.start[a_name]
        assert float((kept - delta).norm() / delta.norm()) <= 1.5 * sum(errors)


@pytest.mark.parametrize("peft", [False, True])
def test_resumed_run_has_the_moved_reference(tmp_path: Path, peft: bool) -> None:
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise Killed

    def run(folder: str, **options: Any) -> DPOTrainer:
        policy = adapted() if peft else model()
        return make(tmp_path / folder, policy, save_strategy="steps", save_steps=4, **options)

    whole = run("whole")
    whole.train()
    killed = run("killed", callbacks=[Kill()])
    with pytest.raises(Killed):
        killed.train()
    resumed = run("killed")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert (tmp_path / "killed" / "checkpoint-4" / REFERENCE_NAME).is_file()
    # the saved model has nothing of it
    assert not list((tmp_path / "whole").glob(f"*{REFERENCE_NAME}"))
    for step in (4, 6):
        (tmp_path / "killed" / f"checkpoint-{step}" / MANIFEST).unlink()
    (tmp_path / "killed" / "checkpoint-6" / REFERENCE_NAME).unlink()
    with pytest.raises(CheckpointError, match="has no reference of its own"):
        run("killed").train(resume_from_checkpoint=True)
    (tmp_path / "killed" / "checkpoint-4" / REFERENCE_NAME).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"reference.safetensors is not readable"):
        run("killed").train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))


def test_checkpoint_of_another_reference_is_named(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    kinds = {True: r"a delta mixed with the adapter's \(sync_ref_model\)", False: "the start of an adapter"}
    for sync in (True, False):
        folder = tmp_path / str(sync)
        make(folder, adapted(), sync_ref_model=sync, **options).train()
        words = f"its reference is {kinds[sync]} and this run's is {kinds[not sync]}; go on with the arguments"
        with pytest.raises(CheckpointError, match=words):
            make(folder, adapted(), sync_ref_model=not sync, **options).train(resume_from_checkpoint=True)
    make(tmp_path, model(), **options).train()
    path = tmp_path / "checkpoint-2" / REFERENCE_NAME
    with safe_open(path, framework="pt") as file:
        kind = file.metadata()
    state = load_file(path)
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    for change, words in (
        ({"metadata": kind}, r"have other weights \(lm_head.weight\)"),
        ({}, "its reference is of an unknown kind"),
    ):
        save_file({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, path, **change)
        with pytest.raises(CheckpointError, match=words):
            make(tmp_path, model(), **options).train(resume_from_checkpoint=True)


def test_mixed_factors_keep_32_bits() -> None:
    policy = cast(PeftModel, get_peft_model(model().bfloat16(), lora(), autocast_adapter_dtype=False))
    reference = SyncedAdapter(policy)
    reference.mix(policy, 0.6)
    assert {tensor.dtype for tensor in reference.start.values()} == {torch.float32}
    assert {policy.get_parameter(name).dtype for name in reference.start} == {torch.bfloat16}
    assert len(lora_factors(policy)) == 4


def test_what_cannot_be_mixed_is_answered_in_one_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for options, words in (
        ({"use_dora": True}, "that of base_model.model.model.layers.0.self_attn.q_proj is another kind"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.default.weight is trained too"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, None),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_A.default is trained too"),
    ):
        policy = get_peft_model(model(), lora(**options))
        if words is None:  # no bias in this model: nothing but the factors is trained
            make(tmp_path, policy)
            continue
        with pytest.raises(ValueError, match=words):
            make(tmp_path, policy)
    with pytest.raises(ValueError, match="ref_model has others; leave ref_model out"):
        make(tmp_path, model(), ref_model=model(num_hidden_layers=1))
    with pytest.raises(ValueError, match="ref_model has others; leave ref_model out"):
        make(tmp_path, adapted(), ref_model=model())
    two = adapted()
    two.add_adapter("reference", lora())
    with pytest.raises(ValueError, match=r"leave ref_adapter_name \('reference'\) out"):
        make(tmp_path, two, ref_adapter_name="reference")
    make(tmp_path, model(), loss_type="simpo")
    assert any("sync_ref_model is not used: the loss reads no reference" in line for line in caplog.messages)
    # a reference of the same shape is moved
    trainer = make(tmp_path, model(), ref_model=model(initializer_range=0.3))
    assert isinstance(trainer._reference, SyncedModel)


TWO = """
import importlib.util, os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("sync_tests", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for kind, policy in (("lora", module.adapted), ("full", module.model), ("start", module.adapted)):
    options = {"ddp_find_unused_parameters": False, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    trainer = module.make(Path(sys.argv[2]), policy(), sync_ref_model=kind != "start", **options)
    trainer.train()
    if trainer.args.process_index == 0:
        torch.save(module.losses(trainer), f"{sys.argv[2]}/{kind}.pt")
torch.distributed.barrier()
os._exit(0)  # all is written; threads of gloo sometimes abort a process that ends by the book
"""


@pytest.mark.slow
def test_two_processes_log_what_one_logs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    folder = tmp_path / "two"
    folder.mkdir()
    subprocess.run([*launcher, __file__, str(folder)], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    seen = []
    for kind, policy in (("lora", adapted), ("full", model), ("start", adapted)):
        one = make(tmp_path / "one", policy(), sync_ref_model=kind != "start")
        one.train()
        seen.append(losses(one)[-1])
        assert torch.load(folder / f"{kind}.pt") == pytest.approx(losses(one), rel=1e-4)
    assert len(set(seen)) == 3
