"""A LoRA on lm_head under the patch: trained as through logits, and never left out in silence."""

import copy
import functools
import importlib
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastdpo.demo import demo_paths
from fastdpo.integrations import trl_head
from fastdpo.integrations.trl import patch_trl
from fastdpo.ops import reference

pytest.importorskip("trl")
utils: Any = importlib.import_module("trl.trainer.utils")
ALL = ("log_probs", *trl_head.OUTPUTS)


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
def test_a_lora_on_the_head_trains_as_through_logits(kind, tmp_path, monkeypatch, trainer_of, train, compare):
    kind, *again = kind.split(", ")
    steps = 10 if kind == "dpo" else 5
    start: Callable[[], dict[str, Any]] = lambda: (  # noqa: E731
        {"model": trained_adapter()} if again else {"peft_config": lora_on_the_head()}
    )
    with patch_trl():
        ours = train(kind, tmp_path / "ours", max_steps=steps, learning_rate=1e-2, **start())
    module = sys.modules[f"trl.trainer.{kind}_trainer"]
    with monkeypatch.context() as by_logits:
        by_logits.setattr(module, "add_fused_lm_head", logits_head)
        by_logits.setattr(module, "BaseTunerLayer", ())
        theirs = train(kind, tmp_path / "logits", max_steps=steps, learning_rate=1e-2, **start())
    compare(ours, theirs, steps)
    if kind == "dpo":
        # the adapter switched off, or its copy, is the policy's own start, to the last bit
        assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert ours[0]["rewards/margins"] == 0.0
        assert abs(ours[-1]["rewards/margins"]) > 1e-2
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer_of(kind, tmp_path / "no", **start())


@pytest.fixture
def lora_model(small_model: Callable[..., Any]) -> Callable[[], PeftModel]:
    def make() -> PeftModel:
        model = get_peft_model(small_model(), lora_on_the_head())
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return model

    return make


def test_a_lora_on_the_head_gets_its_gradients_and_is_switched_off(batch, lora_model):
    inputs, results = batch(), []
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
        results.append([*(getattr(out, name).detach() for name in ALL), without, plain.detach(), *grads.values()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    assert not torch.allclose(results[0][0], results[0][len(ALL)], atol=1e-2)


def test_a_lora_on_the_head_is_never_left_out_in_silence(monkeypatch, batch, lora_model):
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
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps.masked_fill(labels < 0, 0.0).detach()


def test_a_lora_on_the_head_is_that_of_the_model_that_is_called(small_model, batch, lora_model):
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
        logps = plain(**inputs, fused_lm_head=True).log_probs.detach()
        torch.testing.assert_close(logps, own_scores(plain, inputs), rtol=0, atol=1e-8)
        # an adapter that comes after the fused head
        late = get_peft_model(plain, lora_on_the_head())
        for name, parameter in late.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        logps = late(**inputs, fused_lm_head=True).log_probs.detach()
        torch.testing.assert_close(logps, own_scores(late, inputs), rtol=0, atol=1e-8)
        merged = late.merge_and_unload()
    # nothing of an adapter is left, so TRL alone may go on
    merged(**inputs, fused_lm_head=True)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_what_is_no_plain_lora_is_refused_in_trl_s_words(tmp_path, trainer_of):
    trl_says = "adapter to `lm_head` is not supported"
    with patch_trl():
        for config in (lora_on_the_head(use_dora=True), lora_on_the_head(lora_bias=True)):
            with pytest.raises(ValueError, match=trl_says):
                trainer_of("dpo", tmp_path, peft_config=config)
        with pytest.raises(ValueError, match=trl_says):
            trainer_of("grpo", tmp_path, peft_config=lora_on_the_head())
