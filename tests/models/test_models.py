"""Loading policies, and log-probs from any causal LM's own forward call."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    PreTrainedModel,
    T5Config,
)

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.forward import STATISTICS, LogprobForward
from fastdpo.models.load import disable_dropout, load_policy

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # a distribution with peaks: a wrong scale or mask must show
    "initializer_range": 0.3,
}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


ARCHITECTURES = {
    "llama, tied head": lambda: llama(tie_word_embeddings=True),
    "gemma2, softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=4.0, query_pre_attn_scalar=16)
    ),
    "cohere, scale": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite, divisor": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=2, bos_token_id=1)),
}


def batch(vocabulary: int = 67) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    rows = torch.tensor([3, 4, 5, 9 + 2, 9 + 3, 27 + 7])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "logprob_rows": rows,
        "logprob_targets": ids.flatten()[rows + 1],
    }


def own_logprobs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The same log-probs from the logits of the model's unchanged forward."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return (
        logits.flatten(0, 1)[inputs["logprob_rows"]].log_softmax(-1).gather(1, inputs["logprob_targets"][:, None])[:, 0]
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_equal_those_of_the_model_s_own_logits(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().double().eval()
    inputs = batch()
    patched = LogprobForward(model)
    assert patched.route == "head"
    wanted = own_logprobs(model, inputs)
    with patched.installed():
        output = model(**inputs, logprob_stats=STATISTICS)
    assert set(output) == {"logprob", *STATISTICS}
    torch.testing.assert_close(output["logprob"], wanted, rtol=1e-9, atol=1e-9)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logits = logits.flatten(0, 1)[inputs["logprob_rows"]]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(output["entropy"].double(), entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output["mean_logit"].double(), logits.mean(-1), rtol=1e-5, atol=1e-6)


def test_where_logits_are_changed_in_an_unknown_way_the_model_s_own_are_taken(caplog: Any) -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    torch.manual_seed(0)
    model = Odd(LlamaConfig(**SIZES)).double().eval()
    patched = LogprobForward(model)
    assert patched.route == "model"
    assert "Odd computes its logits in a way" in caplog.text
    inputs = batch()
    with patched.installed():
        output = model(**inputs, logprob_stats=STATISTICS)
    torch.testing.assert_close(output["logprob"], own_logprobs(model, inputs), rtol=1e-9, atol=1e-9)
    assert set(output) == {"logprob", *STATISTICS}
    output["logprob"].sum().backward()
    assert model.lm_head.weight.grad is not None


def test_forward_is_what_was_found_and_keeps_its_signature() -> None:
    model = llama()
    found = model.forward
    patched = LogprobForward(model)
    with patched.installed():
        # generate() reads the signature to check its arguments
        assert inspect.signature(model.forward) == inspect.signature(found)
        ids = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        with patched.installed():
            pass
        assert "forward" in vars(model)
    assert "forward" not in vars(model)
    again = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, again)


LORA = {"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
HEADS = {  # adapter, and what the head is said to be where its logits are built
    "lora": (LoraConfig(**LORA), None),
    "dora": (LoraConfig(**LORA, use_dora=True), "under a variant of LoRA"),
    "lora_bias": (LoraConfig(**LORA, lora_bias=True), "under a variant of LoRA"),
    "modules_to_save": (LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"]), None),
}


@pytest.mark.parametrize("name", HEADS)
def test_adapters_on_the_head_are_trained(name: str, caplog: pytest.LogCaptureFixture) -> None:
    adapter, said = HEADS[name]
    model = get_peft_model(llama(), adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = batch()
    patched = LogprobForward(model)
    assert patched.route == ("head" if said is None else "module")
    lines = [line for line in caplog.messages if "so the logits of the scored tokens are built" in line]
    assert [f"the head is {said}, not" in line for line in lines] == ([True] if said else [])

    def trained(output: Tensor) -> list[Tensor]:
        model.zero_grad()
        (output * torch.linspace(-1, 1, len(output))).sum().backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "lm_head" in n and p.grad is not None]

    own = own_logprobs(model, inputs)
    wanted = trained(own)
    with patched.installed():
        output = model(**inputs, logprob_stats=STATISTICS)
        found = trained(output["logprob"])
        with model.disable_adapter(), torch.no_grad():
            base = model(**inputs)["logprob"]
    torch.testing.assert_close(output["logprob"], own, rtol=1e-5, atol=1e-5)
    assert len(found) == len(wanted) >= 1
    for a, b in zip(found, wanted, strict=True):
        assert float(a.abs().sum()) > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(base, own_logprobs(model, inputs), rtol=1e-5, atol=1e-5)
    assert float((base - own).abs().max()) > 1e-2


@pytest.fixture
def bf16_checkpoint(tmp_path: Path) -> str:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_dtype_rules(bf16_checkpoint: str) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    assert load_policy(bf16_checkpoint, DPOConfig(use_cpu=True)).dtype == torch.float32
    base = load_policy(bf16_checkpoint, DPOConfig(use_cpu=True), adapter).get_base_model()
    assert base.lm_head.weight.dtype == torch.bfloat16
    args = DPOConfig(use_cpu=True, model_init_kwargs={"dtype": "bfloat16"})
    assert load_policy(bf16_checkpoint, args).dtype == torch.bfloat16
    args = DPOConfig(use_cpu=True, model_init_kwargs={"dtype": "float33"})
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16 or float16, got 'float33'"):
        load_policy(bf16_checkpoint, args)


def test_wrong_models_are_answered_in_one_sentence(tmp_path: Path, bf16_checkpoint: str) -> None:
    args = DPOConfig(use_cpu=True)
    LlavaConfig().save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"is a multimodal model, which fastdpo does not train yet"):
        load_policy(str(tmp_path / "vision"), args)
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="encoder-decoder"):
        load_policy(str(tmp_path / "t5"), args)
    with pytest.raises(ValueError, match=r"cannot load model '.*nowhere'") as caught:
        load_policy(str(tmp_path / "nowhere"), args)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="got a loaded LlamaForCausalLM"):
        load_policy(llama(), DPOConfig(use_cpu=True, model_init_kwargs={"dtype": "float32"}))
    with pytest.raises(ValueError, match="virtual tokens"):
        load_policy(llama(), args, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has an adapter already"):
        load_policy(adapted, args, LoraConfig(r=2, target_modules=["q_proj"]))


def test_weights_that_are_cut_short_or_lack_a_tensor_are_refused(bf16_checkpoint: str) -> None:
    args = DPOConfig(use_cpu=True)
    path = Path(bf16_checkpoint) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=r"cannot load model '.*model': .*") as caught:
        load_policy(bf16_checkpoint, args)
    assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack lm_head.weight, which would start at random"):
        load_policy(bf16_checkpoint, args)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    policy = load_policy(str(tmp_path), DPOConfig(use_cpu=True))
    assert policy.lm_head.weight is policy.model.embed_tokens.weight


def test_modules_to_save_must_exist() -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_haed"])
    with pytest.raises(ValueError, match="modules_to_save names 'lm_haed', and LlamaForCausalLM has no module"):
        load_policy(llama(), DPOConfig(use_cpu=True), adapter)


def test_adapter_weights_depend_on_the_seed_alone(bf16_checkpoint: str) -> None:
    def first(model: str | PreTrainedModel, draws: int) -> Tensor:
        torch.rand(draws)
        policy = load_policy(model, DPOConfig(use_cpu=True, seed=7), LoraConfig(r=2, target_modules=["q_proj"]))
        return next(p for n, p in policy.named_parameters() if "lora_A" in n)

    assert torch.equal(first(bf16_checkpoint, 3), first(llama().to(torch.bfloat16), 11))


def test_disable_dropout_reaches_modules_and_plain_numbers() -> None:
    config = GPT2Config(vocab_size=67, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5)
    for model in (GPT2LMHeadModel(config), llama(attention_dropout=0.5)):
        model.train()
        inputs = batch()["input_ids"]
        assert not torch.equal(model(inputs).logits, model(inputs).logits)
        disable_dropout(model)
        assert torch.equal(model(inputs).logits, model(inputs).logits)
