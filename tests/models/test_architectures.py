"""Log-probs from hidden states and head equal those of each architecture's own forward, policy and gradients."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fastdpo.models.forward import LogprobForward

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# model_type -> what differs from SIZES
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 4.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 0.25},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "glm": {},
    "olmo2": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **ARCHITECTURES[name]})
    # torch's grouped products take no float64
    options = {"experts_implementation": "eager"} if "num_experts" in ARCHITECTURES[name] else {}
    return AutoModelForCausalLM.from_config(config, **options).double().eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 67, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


ROWS = torch.tensor([3, 4, 5, 9 + 2, 9 + 3, 27 + 7])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_and_gradients_are_those_of_the_model_s_own_logits(name: str, caplog: Any) -> None:
    model, inputs = make(name), batch()
    targets = inputs["input_ids"].flatten()[ROWS + 1]
    patched = LogprobForward(model)
    assert patched.route == "head"
    assert caplog.records == [] or all(r.levelno < logging.WARNING for r in caplog.records if "fastdpo" in r.name)

    def gradients(logprob: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (logprob * torch.linspace(-1, 2, len(ROWS), dtype=torch.float64)).sum().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    with patched.installed():
        ours = model(**inputs, logprob_rows=ROWS, logprob_targets=targets)["logprob"]
    mine = gradients(ours)
    logits = model(**inputs).logits.flatten(0, 1)[ROWS]
    own = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    theirs = gradients(own)
    torch.testing.assert_close(ours.detach(), own.detach(), rtol=1e-8, atol=1e-8)
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_router_s_auxiliary_loss_is_the_architecture_s_own(name: str) -> None:
    model, inputs = make(name), batch()
    call = {**inputs, "output_router_logits": True}
    wanted = model(**call).aux_loss
    targets = inputs["input_ids"].flatten()[ROWS + 1]
    with LogprobForward(model).installed():
        found = model(**call, logprob_rows=ROWS, logprob_targets=targets)
        plain = model(**inputs, logprob_rows=ROWS, logprob_targets=targets)
    assert float(wanted) > 0
    torch.testing.assert_close(found["aux_loss"], wanted)
    torch.testing.assert_close(found["logprob"], plain["logprob"])
    assert "aux_loss" not in plain
    found["aux_loss"].backward()
    routers = [p for k, p in model.named_parameters() if "gate.weight" in k or "router.weight" in k]
    assert routers
    assert all(p.grad is not None and bool(p.grad.any()) for p in routers)


def test_a_forgotten_multiplier_would_be_seen() -> None:
    model, inputs = make("granite"), batch()
    targets = inputs["input_ids"].flatten()[ROWS + 1]
    patched = LogprobForward(model)
    patched.scale = 1.0
    with patched.installed():
        wrong = model(**inputs, logprob_rows=ROWS, logprob_targets=targets)["logprob"]
    own = model(**inputs).logits.flatten(0, 1)[ROWS].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert float((wrong - own).abs().max()) > 1e-2
