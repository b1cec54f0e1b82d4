"""Every tensor of a checkpoint is read back, whatever name it was saved under, or the checkpoint is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    Qwen3MoeConfig,
    TrainerCallback,
)

from fastdpo.training.checkpoints.content_hashes import MANIFEST
from fastdpo.training.checkpoints.folders import STATE_NAME, CheckpointError
from fastdpo.training.checkpoints.weights import load_whole_model

Sizes = Callable[..., dict[str, Any]]


def gpt_neox(sizes: dict[str, Any]) -> Any:
    return GPTNeoXConfig(**{name: value for name, value in sizes.items() if name != "num_key_value_heads"})


def nemotron_h(sizes: dict[str, Any]) -> Any:
    sizes = {name: value for name, value in sizes.items() if name != "num_hidden_layers"}
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 8}
    return NemotronHConfig(**sizes, **mamba, hybrid_override_pattern="M*", head_dim=16)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
# Llama's names are the same in memory and on disk, those of all others are not
CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": lambda sizes: LlamaConfig(**sizes),
    "tied": lambda sizes: LlamaConfig(**sizes, tie_word_embeddings=True),
    "mixtral": lambda sizes: MixtralConfig(**sizes, num_local_experts=4),
    "qwen3_moe": lambda sizes: Qwen3MoeConfig(**sizes, **EXPERTS),
    "gpt_neox": gpt_neox,
    "olmo_hybrid": lambda sizes: OlmoHybridConfig(**sizes, layer_types=["linear_attention", "full_attention"]),
    "nemotron_h": nemotron_h,
}
RENAMED = ("mixtral", "qwen3_moe", "gpt_neox", "olmo_hybrid")


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def different(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]


def losses(trainer: Any) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]


def killed_and_resumed(make_trainer: Any, folder: Path, **options: Any) -> None:
    """A run that is killed after step 3 and resumed from step 2 has the losses and every weight of one that is not."""
    whole = make_trainer(folder / "whole", save_steps=2, **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder / "killed", save_steps=2, callbacks=[KillAt(3)], **options).train()
    resumed = make_trainer(folder / "killed", save_steps=2, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert different(tensors(resumed.model), tensors(whole.model)) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_run_resumes_to_the_same_weights(
    make_trainer: Any, tiny_config: Sizes, tmp_path: Path, name: str
) -> None:
    config = CONFIGS[name](tiny_config())
    killed_and_resumed(make_trainer, tmp_path, config=config)
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors").keys()
    in_memory = AutoModelForCausalLM.from_config(config).state_dict().keys()
    # else the test would not show what it is for
    assert (not saved <= in_memory) == (name in RENAMED or name == "nemotron_h")


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neox"])
def test_adapters_resume_too(make_trainer: Any, tiny_config: Sizes, tmp_path: Path, name: str) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    killed_and_resumed(make_trainer, tmp_path, config=CONFIGS[name](tiny_config()), peft_config=lora)


def test_adapters_on_experts_resume_too(make_trainer: Any, tiny_config: Sizes, tmp_path: Path) -> None:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, task_type="CAUSAL_LM")
    killed_and_resumed(make_trainer, tmp_path, config=CONFIGS["mixtral"](tiny_config()), peft_config=lora)


def test_weights_of_two_dtypes_are_read_without_rounding(tiny_config: Sizes, tmp_path: Path) -> None:
    def mixed() -> Any:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_config())).to(torch.bfloat16)
        model.lm_head.float().weight.data.normal_()  # no bf16 numbers
        return model

    one, two = mixed(), mixed()
    one.save_pretrained(tmp_path)
    assert different(tensors(one), tensors(two))
    load_whole_model(two, tmp_path)
    assert different(tensors(one), tensors(two)) == []
    assert two.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neox", "lora"])
def test_the_best_model_is_of_one_step(
    make_trainer: Any, tiny_config: Sizes, id_pairs: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if name == "lora" else None
    config = CONFIGS["mixtral" if name == "lora" else name](tiny_config())
    trainer = make_trainer(
        tmp_path,
        config=config,
        peft_config=peft,
        eval_data=id_pairs(4, seed=2),
        max_steps=6,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="chosen_by_test",
        greater_is_better=True,
        save_only_model=name == "gpt_neox",
    )
    evaluate = trainer.evaluate
    best = {2: 0.5, 4: 0.9, 6: 0.1}

    def judged(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**evaluate(*args, **kwargs), "eval_chosen_by_test": best[trainer.state.global_step]}

    monkeypatch.setattr(trainer, "evaluate", judged)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    file = "adapter_model.safetensors" if peft else "model.safetensors"
    saved, four, last = (load_file(tmp_path / part / file) for part in ("", "checkpoint-4", "checkpoint-6"))
    assert different(saved, four) == []
    assert len(different(saved, last)) > len(saved) // 2


def test_a_checkpoint_that_lacks_a_tensor_or_has_another_is_refused(
    make_trainer: Any, tiny_config: Sizes, tmp_path: Path
) -> None:
    # an expert that is missing makes the tensor of all experts too short
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    dropped = {
        "llama": ("model.norm.weight", "it lacks model.norm.weight;"),
        "mixtral": (expert, r"layers.0.mlp.experts.down_proj has shape \(3, 32, 48\) there and \(4, 32, 48\)"),
    }
    for name, (key, lacks) in dropped.items():
        make_trainer(tmp_path / name, config=CONFIGS[name](tiny_config()), save_steps=2, max_steps=2).train()
        folder = tmp_path / name / "checkpoint-2"
        stored = load_file(folder / "model.safetensors")
        (folder / MANIFEST).unlink()
        without = {name: value for name, value in stored.items() if name != key}
        assert len(without) == len(stored) - 1
        for changed, wanted in (
            (without, lacks),
            ({**stored, "model.another.weight": torch.zeros(2)}, "it has model.another.weight, for which there is no"),
            ({**stored, "lm_head.weight": torch.zeros(61, 8)}, r"lm_head.weight has shape \(61, 8\) there and \(61,"),
        ):
            save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
            trainer = make_trainer(tmp_path / name, config=CONFIGS[name](tiny_config()), save_steps=2)
            with pytest.raises(CheckpointError, match=wanted):
                trainer.train(resume_from_checkpoint=True)


def test_an_adapter_that_lacks_a_tensor_or_has_another_is_refused(
    make_trainer: Any, tiny_config: Sizes, tmp_path: Path
) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    make_trainer(tmp_path, peft_config=lora, save_steps=2, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    stored = load_file(folder / "adapter_model.safetensors")
    (folder / MANIFEST).unlink()
    first = sorted(stored)[0]
    for changed, wanted in (
        ({key: value for key, value in stored.items() if key != first}, f"it lacks {first}"),
        ({**stored, "base_model.model.x": torch.zeros(2)}, "it has base_model.model.x, for which there is no place"),
        ({**stored, first: torch.zeros(3, 32)}, r"has shape \(3, 32\) there and \(4, 32\) in this run"),
    ):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=wanted):
            make_trainer(tmp_path, peft_config=lora, save_steps=2).train(resume_from_checkpoint=True)
    # other layers than the run's
    save_file(stored, folder / "adapter_model.safetensors")
    more = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "k_proj"], task_type="CAUSAL_LM")
    with pytest.raises(CheckpointError, match=r"it lacks .*k_proj"):
        make_trainer(tmp_path, peft_config=more, save_steps=2).train(resume_from_checkpoint=True)


def test_what_no_adapter_saves_is_not_trained(make_trainer: Any, tiny_config: Sizes, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_config()))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight would be trained and belongs to no adapter"):
        make_trainer(tmp_path, model=model).train()


def test_a_config_that_was_written_by_hand_is_not_needed(make_trainer: Any, tiny_config: Sizes, tmp_path: Path) -> None:
    """The run's own configuration says what the weights are, not the file's."""
    make_trainer(tmp_path, config=CONFIGS["mixtral"](tiny_config()), save_steps=2, max_steps=2).train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "copy").model_type == "mixtral"
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "num_local_experts": 2}))
    trainer = make_trainer(tmp_path, config=CONFIGS["mixtral"](tiny_config()), save_steps=2)
    trainer._load_from_checkpoint(str(tmp_path / "copy"))
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert different(tensors(trainer.model), tensors(stored)) == []


def test_the_best_model_is_found_where_the_run_was_moved_to(
    make_trainer: Any, id_pairs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    options |= {"eval_data": id_pairs(4, seed=2), "metric_for_best_model": "loss", "greater_is_better": False}
    first = make_trainer(tmp_path / "old", max_steps=2, **options)
    first.train()
    state = tmp_path / "old" / "checkpoint-2" / "trainer_state.json"
    content = json.loads(state.read_text())
    assert content["best_global_step"] == 2
    state.write_text(json.dumps({**content, "best_metric": -1.0}))  # no later step is better
    (tmp_path / "old" / "checkpoint-2" / MANIFEST).unlink()
    shutil.move(tmp_path / "old", tmp_path / "new")
    resumed = make_trainer(tmp_path / "new", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-2")
    best, final = (load_file(tmp_path / "new" / part / "model.safetensors") for part in ("checkpoint-2", ""))
    assert different(best, final) == []
    shutil.rmtree(tmp_path / "new" / "checkpoint-2")
    last = make_trainer(tmp_path / "new", max_steps=5, **{**options, "eval_steps": 1, "save_steps": 1})
    last.train(resume_from_checkpoint=True)
    assert last.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-5")
    assert any("the best model so far was checkpoint-2" in line for line in caplog.messages)


def test_a_class_that_initializes_what_it_reads_does_not(tiny_config: Sizes, tmp_path: Path) -> None:
    """Youtu's zeroes the padding token's embedding, whatever the file holds."""
    config = AutoConfig.for_model("youtu", **tiny_config(head_dim=None))
    one, two = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    one.get_input_embeddings().weight.data.normal_()
    one.save_pretrained(tmp_path)
    load_whole_model(two, tmp_path)
    assert different(tensors(one), tensors(two)) == []


def test_an_optimizer_of_other_parameters_is_named(make_trainer: Any, tiny_config: Sizes, tmp_path: Path) -> None:
    """Of a checkpoint that does not say itself what was trained."""
    make_trainer(tmp_path, save_steps=2, max_steps=2).train()
    for name in (STATE_NAME, MANIFEST):
        (tmp_path / "checkpoint-2" / name).unlink()
    model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_config()))
    model.lm_head.requires_grad_(False)
    with pytest.raises(CheckpointError, match="its optimizer is of other trainable parameters, or another optimizer"):
        make_trainer(tmp_path, model=model, save_steps=2).train(resume_from_checkpoint=True)
