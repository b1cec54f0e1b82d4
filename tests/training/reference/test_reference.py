"""Every kind of reference is the policy that it claims to be, and stays it: log-probs, memory, checkpoints."""

import copy
import gc
import math
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdpo.models.adapters import adapter_on
from fastdpo.training.checkpoints.content_hashes import MANIFEST
from fastdpo.training.checkpoints.folders import REFERENCE_NAME, CheckpointError
from fastdpo.training.reference.base import FrozenModel
from fastdpo.training.reference.inside_policy import AdapterOff, OtherAdapter, StartWeights
from tiny_runs import (
    KillAt,
    Killed,
    batch_of,
    by_definition,
    lora,
    losses,
    make,
    model,
    reference_logps,
    trained,
    two_adapters,
)


def under_reference(policy: PeftModel) -> nn.Module:
    policy = copy.deepcopy(policy)
    policy.set_adapter("reference")
    return policy


DORA = {"use_dora": True}
WHOLE_HEAD = {"modules_to_save": ["lm_head"]}
# kind: policy, trainer's arguments, the model that the reference must equal, its class
KINDS: dict[str, tuple[Any, dict[str, Any], Any, type]] = {
    "frozen copy": (model, {}, copy.deepcopy, FrozenModel),
    "ref_model": (
        model,
        {"ref_model": model(initializer_range=0.3)},
        lambda policy: model(initializer_range=0.3),
        FrozenModel,
    ),
    "ref_model beside an adapter": (trained, {"ref_model": model()}, lambda policy: model(), FrozenModel),
    "fresh adapter": (model, {"peft_config": lora()}, lambda policy: model(), AdapterOff),
    "fresh adapter given": (lambda: get_peft_model(model(), lora()), {}, lambda policy: model(), AdapterOff),
    "IA3": (
        model,
        {"peft_config": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")},
        lambda policy: model(),
        AdapterOff,
    ),
    "second adapter": (
        two_adapters,
        {"model_adapter_name": "dpo_train", "ref_adapter_name": "reference"},
        under_reference,
        OtherAdapter,
    ),
    "start of an adapter": (trained, {}, copy.deepcopy, StartWeights),
    "start of a DoRA": (lambda: trained(**DORA), {}, copy.deepcopy, StartWeights),
    "start of an adapter and a head": (lambda: trained(**WHOLE_HEAD), {}, copy.deepcopy, StartWeights),
    "start of an adapter and biases": (
        lambda: get_peft_model(model(attention_bias=True), lora(bias="all")),
        {},
        copy.deepcopy,
        StartWeights,
    ),
    # PiSSA changes the base model: switched off it is not what training starts from
    "fresh PiSSA": (model, {"peft_config": lora(init_lora_weights="pissa")}, lambda policy: model(), StartWeights),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_what_it_claims_to_be_and_stays(tmp_path: Path, kind: str) -> None:
    make_policy, options, make_wanted, cls = KINDS[kind]
    policy = make_policy()
    wanted = make_wanted(policy)
    trainer = make(tmp_path, policy, **options)
    assert type(trainer._reference) is cls
    batch = batch_of(trainer)
    truth = by_definition(wanted, batch)
    torch.testing.assert_close(reference_logps(trainer, batch), truth, rtol=1e-5, atol=1e-5)
    before = {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    torch.testing.assert_close(reference_logps(trainer, batch), truth, rtol=1e-5, atol=1e-5)
    assert {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()} == before
    # the comparison sees a reference that moves with the policy
    assert (by_definition(cast(nn.Module, trainer.model), batch) - truth).abs().max() > 1e-2
    assert len(set(losses(trainer))) == 4


@pytest.mark.parametrize("kind", ["fresh adapter", "second adapter", "start of an adapter"])
def test_kinds_of_one_model_hold_one_base_model(tmp_path: Path, kind: str) -> None:
    make_policy, options, _, _ = KINDS[kind]
    policy = make_policy()

    def weights() -> int:
        gc.collect()
        # what is kept of tensors, each storage once
        tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
        kept = [item for item in tensors if item.layout is torch.strided]  # others have no one storage
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())

    base = sum(t.untyped_storage().nbytes() for t in model().parameters())
    before = weights()
    trainer = make(tmp_path, policy, **options)
    grown = weights() - before
    assert grown < base / 4, (grown, base)
    # what a copy would have cost
    assert trainer is not None
    extra = copy.deepcopy(policy)
    assert weights() - before > base
    del extra


@pytest.mark.parametrize("kind", ["fresh adapter", "second adapter", "start of an adapter"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_before_the_backward_everything_is_as_it_was(tmp_path: Path, kind: str, checkpointing: bool) -> None:
    make_policy, options, _, _ = KINDS[kind]
    trainer = make(tmp_path, make_policy(), gradient_checkpointing=checkpointing, **options)
    policy = cast(PeftModel, trainer.model)
    frozen = next(name for name, p in policy.named_parameters() if p.requires_grad and "lora_A" in name)
    policy.get_parameter(frozen).requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    active = list(policy.active_adapters)
    seen = []
    backward = trainer.accelerator.backward

    def watched(loss: Tensor, **kwargs: Any) -> None:
        layers = [m for m in policy.modules() if hasattr(m, "lora_A")]
        seen.append(
            ({n: p.requires_grad for n, p in policy.named_parameters()}, [list(m.active_adapters) for m in layers])
        )
        assert not any(m.disable_adapters for m in layers)
        backward(loss, **kwargs)

    trainer.accelerator.backward = watched  # pyright: ignore[reportAttributeAccessIssue] for this test
    trainer.train()
    assert len(seen) == 4
    for flags, adapters in seen:
        assert flags == wanted
        assert all(adapter == active for adapter in adapters)


def test_an_error_in_the_reference_pass_leaves_the_model_as_it_was() -> None:
    policy = two_adapters()
    wanted = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}

    def fail() -> None:
        with adapter_on("reference")(policy):
            assert policy.active_adapters == ["reference"]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert policy.active_adapters == ["dpo_train"]
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == wanted
    # what PEFT alone does
    policy.set_adapter("reference")
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} != wanted


@pytest.mark.parametrize("kind", ["fresh adapter", "second adapter", "start of an adapter"])
def test_a_forward_that_fails_leaves_the_model_as_it_was(tmp_path: Path, kind: str) -> None:
    make_policy, options, _, _ = KINDS[kind]
    trainer = make(tmp_path, make_policy(), **options)
    policy = cast(PeftModel, trainer.model)
    policy.train()
    layers = [module for module in policy.modules() if hasattr(module, "lora_A")]
    # not what PEFT would set by itself
    next(p for name, p in policy.named_parameters() if p.requires_grad).requires_grad_(False)

    def state() -> Any:
        flags = [(name, p.requires_grad) for name, p in policy.named_parameters()]
        active = [(list(layer.active_adapters), layer.disable_adapters) for layer in cast(Any, layers)]
        return flags, active, list(policy.active_adapters), policy.training

    before, start = state(), {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    seen = []

    def fail(*args: Any) -> None:
        seen.append(state())
        raise KeyError("in the forward")

    handle = policy.get_submodule("base_model.model.model.layers.1.mlp").register_forward_hook(fail)
    batch = batch_of(trainer)
    with pytest.raises(KeyError, match="in the forward"):
        reference_logps(trainer, batch)
    handle.remove()
    assert seen
    assert seen[0] != before
    assert state() == before
    assert all(torch.equal(tensor, start[name]) for name, tensor in policy.state_dict().items())


def test_ref_model_that_shares_weights_with_the_policy_is_refused(tmp_path: Path) -> None:
    base = model()
    adapted = trained()
    other = model(initializer_range=0.3)
    other.model = base.model  # the backbone alone
    for policy, ref_model in ((base, other), (adapted, adapted.get_base_model())):
        before = [parameter.requires_grad for parameter in policy.parameters()]
        with pytest.raises(ValueError, match=r"are one in memory \(\S+\), so that .*; load ref_model a second time"):
            make(tmp_path, policy, ref_model=ref_model)
        assert [parameter.requires_grad for parameter in policy.parameters()] == before


def test_reference_is_neither_optimized_nor_saved(tmp_path: Path) -> None:
    policy = two_adapters()
    names = {"model_adapter_name": "dpo_train", "ref_adapter_name": "reference"}
    trainer = make(tmp_path, policy, save_strategy="steps", save_steps=2, **names)
    trainer.train()
    optimized = {id(p) for group in cast(Any, trainer.optimizer).param_groups for p in group["params"]}
    assert all((id(p) in optimized) == (".dpo_train." in name) for name, p in policy.named_parameters())
    # at the root the trained adapter alone; a checkpoint has what a resumed run needs
    assert not [path.name for path in tmp_path.iterdir() if path.name in ("dpo_train", "reference")]
    assert (tmp_path / "checkpoint-4" / "dpo_train" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(model(), tmp_path).eval()
    batch = batch_of(trainer)
    torch.testing.assert_close(by_definition(loaded, batch), by_definition(policy, batch))
    merged = cast(Any, loaded.merge_and_unload())
    torch.testing.assert_close(by_definition(merged, batch), by_definition(policy, batch), rtol=1e-4, atol=1e-4)
    # by the user's own hand too
    start = make(tmp_path / "start", trained())
    start.model.save_pretrained(tmp_path / "plain")
    saved = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert saved.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()


RESUMED = ["ref_model", "second adapter", "start of an adapter and a head"]


@pytest.mark.parametrize("kind", RESUMED)
def test_resumed_run_has_the_same_reference(tmp_path: Path, kind: str) -> None:
    make_policy, options, _, _ = KINDS[kind]
    options = {**options, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make(tmp_path / "whole", make_policy(), **options)
    whole.train()
    with pytest.raises(Killed):
        make(tmp_path / "killed", make_policy(), callbacks=[KillAt(3)], **options).train()
    resumed = make(tmp_path / "killed", make_policy(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


def test_start_of_the_first_run_stays_the_reference(tmp_path: Path) -> None:
    """Also where the resumed run is given the adapter as it is by then."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make(tmp_path / "whole", trained(), **options)
    whole.train()
    with pytest.raises(Killed):
        make(tmp_path / "killed", trained(), callbacks=[KillAt(3)], **options).train()
    later = PeftModel.from_pretrained(model(), tmp_path / "killed" / "checkpoint-2", is_trainable=True)
    resumed = make(tmp_path / "killed", later, **options)
    batch = batch_of(resumed)
    wrong = reference_logps(resumed, batch)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    torch.testing.assert_close(reference_logps(resumed, batch), by_definition(trained(), batch), rtol=1e-5, atol=1e-5)
    assert (wrong - reference_logps(resumed, batch)).abs().max() > 1e-2


def test_checkpoint_without_the_start_is_named(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, trained(), **options).train()
    assert (tmp_path / "checkpoint-2" / REFERENCE_NAME).is_file()
    with pytest.raises(CheckpointError, match=r"has a reference of its own .* and this run needs none"):
        make(tmp_path, trained(), ref_model=model(), **options).train(resume_from_checkpoint=True)
    for name in (REFERENCE_NAME, MANIFEST):
        (tmp_path / "checkpoint-2" / name).unlink()
    with pytest.raises(CheckpointError, match="has no reference of its own"):
        make(tmp_path, trained(), **options).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    make(tmp_path, trained(), **options).train()
    with pytest.raises(CheckpointError, match=r"it lacks .*lora_magnitude_vector"):
        make(tmp_path, trained(**DORA), **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["start of an adapter", "start of a DoRA", "second adapter"])
def test_bf16_autocast_and_dropout_start_at_ln_2(tmp_path: Path, kind: str) -> None:
    make_policy, options, _, _ = KINDS[kind]
    policy = make_policy()
    if kind == "second adapter":  # one adapter under two names
        trained().save_pretrained(tmp_path / "sft")
        policy = PeftModel.from_pretrained(model(), tmp_path / "sft", adapter_name="dpo_train", is_trainable=True)
        policy.load_adapter(str(tmp_path / "sft"), adapter_name="reference")
    trainer = make(tmp_path, policy, bf16=True, max_steps=2, gradient_checkpointing=True, **options)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses(trainer)[1] != losses(trainer)[0]
