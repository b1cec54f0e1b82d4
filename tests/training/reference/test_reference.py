"""Every kind of reference is the policy that it claims to be, and stays it: log-probs, memory, checkpoints."""

import copy
import gc
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.adapters import adapter_on, choose_adapters
from fastdpo.models.forward import model_call
from fastdpo.training.checkpoints.content_hashes import MANIFEST
from fastdpo.training.checkpoints.folders import REFERENCE_NAME, CheckpointError
from fastdpo.training.reference.base import FrozenModel
from fastdpo.training.reference.inside_policy import AdapterOff, OtherAdapter, StartWeights
from fastdpo.training.trainer import DPOTrainer

VOCABULARY = 61
SIDES = ("prompt", "chosen", "rejected")


def model(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


def moved(policy: PeftModel, name: str = "default", seed: int = 3) -> PeftModel:
    """As if the adapter had been trained before."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in policy.named_parameters():
        if f".{name}" in key:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def trained(**options: Any) -> PeftModel:
    return moved(cast(PeftModel, get_peft_model(model(), lora(**options))))


def two_adapters() -> PeftModel:
    policy = cast(PeftModel, get_peft_model(model(), lora(), adapter_name="dpo_train"))
    policy.add_adapter("reference", lora(r=2, lora_alpha=3))
    return moved(moved(policy, "dpo_train"), "reference", seed=4)


def pairs(count: int = 8, seed: int = 1) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(2, 9, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    rows = [{"prompt_ids": ids(), "chosen_ids": [*ids(), 0], "rejected_ids": [*ids(), 0]} for _ in range(count)]
    return Dataset.from_list(rows)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )


def make(folder: Path, policy: Any, **options: Any) -> DPOTrainer:
    given = {name: options.pop(name) for name in ("ref_model", "peft_config", "callbacks") if name in options}
    args = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 4,
        "save_strategy": "no",
        **options,
    }
    return DPOTrainer(policy, args=DPOConfig(**args), train_dataset=pairs(), processing_class=tokenizer(), **given)


def batch_of(trainer: DPOTrainer) -> dict[str, Tensor]:
    return replace(trainer.data_collator, layout="padded")([cast(dict, pairs()[row]) for row in range(4)])


def by_definition(policy: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs of the targets from the model's own logits."""
    with torch.no_grad():
        logits = policy.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.flatten(0, 1)[batch["rows"]].log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]


def reference_logps(trainer: DPOTrainer, batch: dict[str, Tensor]) -> Tensor:
    with trainer.forward.installed():
        logps = trainer.reference(cast(Any, trainer.model), model_call(batch))
    assert logps is not None
    assert not logps.requires_grad
    return logps


def losses(trainer: DPOTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


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
    assert type(trainer.reference) is cls
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


def test_adapters_that_cannot_be_trained_are_named(tmp_path: Path) -> None:
    for name in ("a/b", "a\\b", "a.b", "modules", "train", "keys", ""):
        with pytest.raises(ValueError, match=r"model_adapter_name is .*, which cannot name an adapter") as caught:
            choose_adapters(trained(), DPOConfig(output_dir=str(tmp_path), use_cpu=True, model_adapter_name=name))
        assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match="trained adapter's name is 'a/b', which cannot"):
        make(tmp_path, get_peft_model(model(), lora(), adapter_name="a/b"))
    merged = trained()
    cast(Any, merged).merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into the weights .* call unmerge_adapter\(\)"):
        make(tmp_path, merged)
    cast(Any, merged).unmerge_adapter()
    make(tmp_path, merged)


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


def test_best_named_adapter_is_loaded(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.after = getattr(self, "after", {})
            self.after[state.global_step] = policy.get_parameter(name).detach().clone()

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_wanted"] = {2: 2.0, 4: 1.0}[state.global_step]

    policy, watch = two_adapters(), Watch()
    name = next(n for n, p in policy.named_parameters() if "lora_B" in n and "dpo_train" in n)
    trainer = DPOTrainer(
        policy,
        args=DPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            disable_tqdm=True,
            max_steps=4,
            save_steps=2,
            eval_steps=2,
            eval_strategy="steps",
            load_best_model_at_end=True,
            metric_for_best_model="eval_wanted",
            learning_rate=1e-2,
            gradient_checkpointing=False,
            model_adapter_name="dpo_train",
            ref_adapter_name="reference",
        ),
        train_dataset=pairs(),
        eval_dataset=pairs(2),
        processing_class=tokenizer(),
        callbacks=[watch],
    )
    trainer.train()
    assert torch.equal(policy.get_parameter(name), watch.after[2])
    assert not torch.equal(policy.get_parameter(name), watch.after[4])
    assert policy.get_parameter(name).requires_grad


class Killed(Exception):
    """Stands for a kill inside one process."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


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


def test_trained_adapter_starts_as_trl_s(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    shared = {
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
    }
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    rows = [
        {name: " " + " ".join(f"w{1 + (7 * i + 11 * j * k) % 60}" for j in range(3, 9)) for k, name in enumerate(SIDES)}
        for i in range(8)
    ]
    logged = []
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)):
        args = config_class(output_dir=str(tmp_path / str(len(logged))), **shared)
        data = Dataset.from_list(rows)
        trainer = trainer_class(trained(), args=args, train_dataset=data, processing_class=words)
        trainer.train()
        logged.append(losses(trainer))
    ours, theirs = logged
    assert ours[0] == pytest.approx(math.log(2), abs=1e-7)
    assert len(set(ours)) == 3
    assert ours == pytest.approx(theirs, rel=5e-4)


def test_adapter_folder_as_model(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    adapter = str(_saved_adapter(tmp_path))
    args = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "disable_tqdm": True}
    config = DPOConfig(**args, model_adapter_name="again", max_steps=1, save_strategy="no")
    trainer = DPOTrainer(adapter, args=config, train_dataset=pairs())
    assert isinstance(trainer.reference, StartWeights)
    assert cast(PeftModel, trainer.model).active_adapters == ["again"]
    assert "the adapter 'again' as it was at the start" in trainer.reference_description
    assert trainer.reference_origin == {"kind": "start"}
    batch = batch_of(trainer)
    truth = by_definition(trained(), batch)
    torch.testing.assert_close(reference_logps(trainer, batch), truth, rtol=1e-5, atol=1e-5)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match="cannot load model"):
        DPOTrainer(adapter, args=config, train_dataset=pairs(), processing_class=tokenizer())


def _saved_adapter(folder: Path) -> Path:
    policy = trained()
    policy.peft_config["default"].base_model_name_or_path = str(folder / "base")
    policy.save_pretrained(folder / "adapter")
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    return folder / "adapter"


def test_an_adapter_that_is_not_named_is_not_the_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path, two_adapters())
    assert isinstance(trainer.reference, StartWeights)
    assert any("other adapters, which are not used: reference; ref_adapter_name makes" in m for m in caplog.messages)


def test_wrong_names_are_answered_in_one_sentence(tmp_path: Path) -> None:
    both = {"model_adapter_name": "dpo_train", "ref_adapter_name": "reference"}
    for options, words in (
        ({**both, "ref_adapter_name": "sft"}, "ref_adapter_name is 'sft'.* it has 'dpo_train', 'reference'"),
        ({**both, "model_adapter_name": "dpo"}, "model_adapter_name is 'dpo'.* no adapter of this name"),
        ({"ref_adapter_name": "dpo_train"}, "which is the adapter that is trained"),
        ({**both, "ref_model": model()}, "both name a reference; give one"),
    ):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, two_adapters(), **options)
    with pytest.raises(ValueError, match="and the model has no adapter; pass a PeftModel"):
        make(tmp_path, model(), ref_adapter_name="reference")
    policy = two_adapters()
    cast(Any, policy.base_model).set_adapter(["dpo_train", "reference"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        make(tmp_path, policy)
    policy = two_adapters()
    policy.get_parameter("base_model.model.lm_head.weight").requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.weight is trained beside the adapter, so the reference 'reference'"):
        make(tmp_path, policy, **both)


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


def test_new_adapter_gets_the_name_asked_for(tmp_path: Path) -> None:
    trainer = make(tmp_path, model(), peft_config=lora(), model_adapter_name="mine", max_steps=1)
    assert cast(PeftModel, trainer.model).active_adapters == ["mine"]
    trainer.train()


def test_adapter_that_is_loaded_frozen_is_named(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="no weight of the adapter 'default' is trainable; load an adapter with"):
        make(tmp_path, frozen).train()
    # by its name it is made trainable
    frozen = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    trainer = make(tmp_path, frozen, model_adapter_name="default", max_steps=2)
    trainer.train()
    assert losses(trainer)[1] != losses(trainer)[0]
