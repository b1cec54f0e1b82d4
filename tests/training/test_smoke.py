"""What users do with a Trainer besides training one model on one dataset: each works, and gives the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._device
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from fastdpo import DataCollatorForPreference, DPOConfig, DPOTrainer
from fastdpo.losses import LOSSES

VOCABULARY = 61
SIZES: dict[str, Any] = {
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
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.02}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"</s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue] untyped setter
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def model(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


def mixtral(**options: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, **EXPERTS, "num_local_experts": 4, **options}))


def qwen(**options: Any) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **EXPERTS, "num_experts": 4, "head_dim": 16, **options}))


def pairs(count: int = 8, seed: int = 1, words: int = VOCABULARY) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(2, 9, (), generator=generator))
        return torch.randint(2, words, (length,), generator=generator).tolist()

    rows = [{"prompt_ids": ids(), "chosen_ids": [*ids(), 0], "rejected_ids": [*ids(), 0]} for _ in range(count)]
    return Dataset.from_list(rows)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "max_steps": 3,
    "save_strategy": "no",
}
ARGUMENTS = ("eval_dataset", "peft_config", "ref_model", "callbacks", "data_collator", "compute_metrics")


def make(folder: Path, policy: Any = None, train: Any = None, **options: Any) -> DPOTrainer:
    given = {name: options.pop(name) for name in ARGUMENTS if name in options}
    args = DPOConfig(**{"output_dir": str(folder / "out"), **OPTIONS, **options})
    return DPOTrainer(
        model() if policy is None else policy,
        args=args,
        train_dataset=pairs() if train is None else train,
        processing_class=given.pop("processing_class", None) or tokenizer(),
        **given,
    )


def logs(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


# a mixture of experts


@pytest.mark.parametrize(
    ("build", "options"),
    [(mixtral, {"gradient_checkpointing": True}), (qwen, {"router_aux_loss_coef": 0.5})],
    ids=["mixtral, its own coefficient", "qwen3_moe, one that is given"],
)
def test_the_load_balancing_loss_is_trl_s(tmp_path: Path, build: Any, options: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl")
    build().save_pretrained(tmp_path / "moe")
    tokenizer().save_pretrained(tmp_path / "moe")
    texts = ["w5 w9 ", "w7 w4 w12 ", "w30 w2 ", "w21 w17 ", "w3 w44 w5 ", "w8 w6 "]
    data = Dataset.from_list(
        [{"prompt": texts[i], "chosen": texts[(i + 1) % 6], "rejected": texts[(i + 3) % 6]} for i in range(6)]
    )
    runs: list[Any] = []
    for name, trainer, config in (("ours", DPOTrainer, DPOConfig), ("trl", trl.DPOTrainer, trl.DPOConfig)):
        args = config(output_dir=str(tmp_path / name), **{**OPTIONS, **options})
        running = trainer(str(tmp_path / "moe"), args=args, train_dataset=data, processing_class=tokenizer())
        running.train()
        runs.append(logs(running))
    ours, theirs = runs
    assert len(ours) == len(theirs) == 3
    # it matters: a run that leaves it out is far outside the bounds
    weight = options.get("router_aux_loss_coef", 0.02)
    assert weight * theirs[0]["aux_loss"] > 2e-2 * theirs[0]["loss"]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "aux_loss"):
            assert mine[name] == pytest.approx(other[name], rel=5e-4), name
        for name in ("rewards/chosen", "rewards/margins"):
            assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), name


def test_the_load_balancing_loss_is_the_policy_s_alone(tmp_path: Path) -> None:
    asked: list[Any] = []
    policy, reference = qwen(), qwen()
    for which in (policy, reference):
        which.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(kwargs.get("output_router_logits")), with_kwargs=True
        )
    trainer = make(tmp_path, policy, ref_model=reference, max_steps=1, eval_dataset=pairs(3, 2))
    asked.clear()
    trainer.train()
    assert asked == [None, True]
    evaluated = trainer.evaluate()
    assert evaluated["eval_aux_loss"] > 1
    # the logged loss is the one that is optimized
    (line,) = logs(trainer)
    assert line["loss"] - 0.02 * line["aux_loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    plain = make(tmp_path, qwen(), router_aux_loss_coef=0.0, max_steps=1, eval_dataset=pairs(3, 2))
    plain.train()
    assert "aux_loss" not in logs(plain)[0]
    assert "eval_aux_loss" not in plain.evaluate()
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.1, and LlamaForCausalLM returns no"):
        make(tmp_path, router_aux_loss_coef=0.1)
    make(tmp_path, router_aux_loss_coef=0.0)


# gradient accumulation


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}


def accumulated(folder: Path, loss: Any, size: int, steps: int, double: bool) -> tuple[float, dict[str, Tensor]]:
    callback = Gradients()
    policy, reference = model(), model(initializer_range=0.3)
    trainer = make(
        folder,
        policy.double() if double else policy,
        ref_model=reference.double() if double else reference,
        loss_type=loss,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
        callbacks=[callback],
    )
    compute, losses = trainer.compute_loss, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    # Trainer sums what it logs in fp32
    trainer.compute_loss = recorded
    trainer.train()
    assert len(losses) == steps
    assert logs(trainer)[0]["loss"] == pytest.approx(sum(losses) / steps, rel=1e-6)
    return sum(losses) / steps, callback.found


# the others read their micro-batch as a whole: its order, its tokens, its mean KL
MEANS_OVER_PAIRS = [name for name, loss in LOSSES.items() if not loss.sorts and name not in ("sft", "cpo", "kto_pair")]


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", ["sigmoid", ["ipo", "simpo"], MEANS_OVER_PAIRS], ids=["sigmoid", "two", "all"])
def test_accumulation_changes_neither_loss_nor_gradients(tmp_path: Path, loss: Any, double: bool) -> None:
    whole, wanted = accumulated(tmp_path, loss, 8, 1, double)
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    bound = 1e-9 if double else 1e-4
    for size, steps in ((2, 4), (1, 8)):
        found, gradients = accumulated(tmp_path, loss, size, steps, double)
        assert found == pytest.approx(whole, rel=bound)
        assert gradients.keys() == wanted.keys()
        error = torch.cat([(gradients[name] - wanted[name]).flatten() for name in wanted]).norm()
        assert float(norm) > 1e-3
        assert float(error / norm) < bound


def test_a_loss_that_sorts_its_micro_batch_would_be_seen(tmp_path: Path) -> None:
    assert len(MEANS_OVER_PAIRS) == len(LOSSES) - 5
    whole, _ = accumulated(tmp_path, "aot", 8, 1, True)
    parts, _ = accumulated(tmp_path, "aot", 2, 4, True)
    assert parts != pytest.approx(whole, rel=1e-4)


# models


def test_model_as_a_path(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    args = DPOConfig(output_dir=str(tmp_path / "out"), **OPTIONS)
    by_path = DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=pairs())
    by_path.train()
    by_model = make(tmp_path)
    by_model.train()
    assert [line["loss"] for line in logs(by_path)] == [line["loss"] for line in logs(by_model)]


@pytest.mark.parametrize("peft", [False, True])
def test_a_model_with_a_device_map(tmp_path: Path, peft: bool) -> None:
    model().save_pretrained(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    mapped = make(tmp_path, policy, peft_config=lora() if peft else None)
    plain = make(tmp_path, peft_config=lora() if peft else None)
    for trainer in (mapped, plain):
        trainer.train()
    assert [line["loss"] for line in logs(mapped)] == [line["loss"] for line in logs(plain)]
    assert logs(mapped)[-1]["loss"] != logs(mapped)[0]["loss"]


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_optimizers_of_bitsandbytes(tmp_path: Path, optim: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra `quant`)")
    trainer = make(tmp_path, optim=optim)
    trainer.train()
    assert "bitsandbytes" in type(trainer.optimizer.optimizer).__module__
    assert logs(trainer)[-1]["loss"] != logs(trainer)[0]["loss"]


@pytest.mark.parametrize("tied", [False, True])
def test_resized_and_tied_embeddings(tmp_path: Path, tied: bool) -> None:
    policy = model(tie_word_embeddings=tied)
    policy.resize_token_embeddings(VOCABULARY + 6)
    data = pairs(words=VOCABULARY + 6)
    trainer = make(tmp_path, policy, train=data, per_device_train_batch_size=8, save_strategy="steps")
    trainer.train()
    history = logs(trainer)
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"] == 0.0
    assert (policy.lm_head.weight is policy.model.embed_tokens.weight) == tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, VOCABULARY + 2, 7]])
    torch.testing.assert_close(loaded(ids).logits, policy.eval()(ids).logits)
    assert loaded.config.vocab_size == VOCABULARY + 6


@pytest.mark.parametrize(("kind", "head"), [("use_dora", False), ("use_dora", True), ("use_rslora", True)])
def test_dora_and_rslora(tmp_path: Path, kind: str, head: bool) -> None:
    targets = ["q_proj", "v_proj", *(["lm_head"] if head else [])]
    adapter = lora(target_modules=targets, lora_alpha=8, **{kind: True})
    trainer = make(tmp_path, peft_config=adapter, per_device_train_batch_size=8, save_strategy="steps")
    trainer.train()
    history = logs(trainer)
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]
    assert history[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    ids = torch.tensor([[5, 6, 7]])
    trained = trainer.model.eval()
    loaded: Any = PeftModel.from_pretrained(model(), tmp_path / "out").eval()
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peft", [False, True])
def test_generate_is_what_it_was(tmp_path: Path, peft: bool) -> None:
    trainer = make(tmp_path, peft_config=lora() if peft else None, gradient_checkpointing=True)
    trainer.train()
    trained = trainer.model.eval()
    other: Any = model()
    if peft:
        trainer.save_model(str(tmp_path / "adapter"))
        other = PeftModel.from_pretrained(other, tmp_path / "adapter")
    else:
        other.load_state_dict(trained.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    options: Any = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "output_scores": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    found, wanted = (m.generate(input_ids=ids, **options) for m in (trained, other.eval()))
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.past_key_values is not None
    for mine, theirs in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiled_policy_trains_as_the_plain_one(tmp_path: Path) -> None:
    runs = []
    # one shape and one layer: tracing is what takes the time
    options = {"train": pairs(2), "max_steps": 2}
    for compile_options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = make(tmp_path, model(num_hidden_layers=1), **options, **compile_options)
        trainer.train()
        runs.append([[line["loss"], line["grad_norm"]] for line in logs(trainer)])
        # a run that quietly trains uncompiled would pass the comparison
        assert (torch._dynamo.utils.counters["frames"]["ok"] > 0) == bool(compile_options)
    for plain, compiled in zip(*runs, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4)
    torch._dynamo.reset()


# data and metrics


def test_several_evaluation_datasets(tmp_path: Path) -> None:
    data = {"near": pairs(3, 2), "far": pairs(5, 3)}
    reference = model(initializer_range=0.3)
    trainer = make(tmp_path, eval_dataset=data, eval_strategy="steps", eval_steps=3, ref_model=reference)
    trainer.train()
    lines = trainer.state.log_history
    for name, dataset in data.items():
        (line,) = [line for line in lines if f"eval_{name}_loss" in line]
        assert line[f"eval_{name}_loss"] == pytest.approx(trainer.evaluate(dataset)["eval_loss"], rel=1e-6)
        assert trainer.tokenize_reports[name].rows == len(dataset)


def test_compute_metrics_gets_every_pair(tmp_path: Path) -> None:
    seen: list[Any] = []

    def share(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        right = prediction.predictions["rewards/chosen"] > prediction.predictions["rewards/rejected"]
        return {"share": float(right.mean())}

    data = pairs(5, 2)
    reference = model(initializer_range=0.3)
    trainer = make(tmp_path, eval_dataset=data, compute_metrics=share, ref_model=reference)
    found = trainer.evaluate()
    assert found["eval_share"] == found["eval_rewards/accuracies"]
    (prediction,) = seen
    assert prediction.label_ids.tolist() == [0] * 5
    assert prediction.predictions["chosen_tokens"].tolist() == [len(row["chosen_ids"]) for row in data.to_list()]
    assert prediction.predictions["logps/rejected"].mean() == pytest.approx(found["eval_logps/rejected"])
    assert found.keys() == {*make(tmp_path, ref_model=reference, eval_dataset=data).evaluate(), "eval_share"}
    output = trainer.predict(data)
    assert output.metrics["test_share"] == found["eval_share"]
    assert output.predictions["rewards/chosen"].shape == (5,)


def test_a_collator_of_one_s_own(tmp_path: Path) -> None:
    """Cut to 6 tokens and padded to a multiple of 8: the config's own limits do not apply."""
    collator = DataCollatorForPreference(pad_token_id=0, max_length=6, pad_to_multiple_of=8)
    trainer = make(tmp_path, data_collator=collator)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (4, 8)
    trainer.train()
    assert trainer.data_collator is collator
    plain = make(tmp_path)
    plain.train()
    for cut, whole in zip(logs(trainer), logs(plain), strict=True):
        assert cut["num_tokens"] < whole["num_tokens"]
    assert logs(trainer)[0]["logps/chosen"] > logs(plain)[0]["logps/chosen"]
