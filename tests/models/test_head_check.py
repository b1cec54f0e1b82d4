"""A head that is not what fastdpo takes it for is noticed at the head, whatever rounding hides in the log-probs."""

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MptConfig,
    MptForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RemBertConfig,
    RemBertForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from fastdpo.models import logit_transform
from fastdpo.models.forward import LogprobForward

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
    "initializer_range": 0.3,
}


def recurrent_gemma() -> Any:
    return RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=32, attention_window_size=64)
    )


def xlstm() -> Any:
    return xLSTMForCausalLM(xLSTMConfig(vocab_size=67, hidden_size=128, num_hidden_layers=2, num_heads=2))


CAPPED = {
    "logits_soft_cap": recurrent_gemma,
    "output_logit_soft_cap": xlstm,
    "final_logit_softcapping": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=30.0, query_pre_attn_scalar=16)
    ),
}


# transformers' xLSTM does not run in bf16 on a CPU
NOT_RUN = ("output_logit_soft_cap", torch.bfloat16)


def peaked(model: Any, dtype: torch.dtype) -> Any:
    """With a head of eight times its weights: logits that a cap bends."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    return model.to(dtype).eval()


def compared(model: Any) -> tuple[LogprobForward, float]:
    """The forward, and how far its log-probs of 12 tokens are from the model's own, at most."""
    ids = torch.randint(3, 67, (1, 13))
    targets = ids[0, 1:]
    forward = LogprobForward(model)
    with torch.no_grad():
        with forward.installed():
            ours = model(input_ids=ids, logprob_rows=torch.arange(12), logprob_targets=targets)["logprob"]
        logits = model(input_ids=ids).logits[0, :-1]
    own = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return forward, float((ours - own).abs().max())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CAPPED for dtype in (torch.bfloat16, torch.float32) if (name, dtype) != NOT_RUN],
)
def test_a_cap_is_known_and_noticed_where_it_is_not(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = peaked(CAPPED[name](), dtype)
    rounding = 0.2 if dtype == torch.bfloat16 else 2e-5
    forward, off = compared(model)
    assert (forward.route, forward.softcap) == ("head", 30.0)
    assert off < rounding
    monkeypatch.setattr(logit_transform, "SOFTCAPS", tuple(x for x in logit_transform.SOFTCAPS if x != name))
    forward, off = compared(model)
    assert (forward.route, forward.softcap) == ("model", None)
    assert off < rounding
    lines = [line for line in caplog.messages if "in a way that fastdpo does not know" in line]
    assert len(lines) == 1
    assert "(its logits are not the head's output times 1)" in lines[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("scale", "softcap"), [(1.02, None), (1.0, 500.0), (0.98, 30.0)])
def test_a_transform_that_is_slightly_off_is_noticed_in_bf16_too(
    scale: float, softcap: float | None, dtype: torch.dtype
) -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * scale
            if softcap is not None:
                output.logits = softcap * torch.tanh(output.logits / softcap)
            return output

    forward, off = compared(Odd(LlamaConfig(**SIZES)).to(dtype).eval())
    assert forward.route == "model"
    assert off < 1e-6


def granite() -> Any:
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0))


def minicpm3() -> Any:
    config = MiniCPM3Config(
        **{**SIZES, "head_dim": None},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        dim_model_base=8,
    )
    return MiniCPM3ForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [granite, minicpm3])
def test_a_divisor_after_the_head_or_before_it_is_known(make: Any, dtype: torch.dtype) -> None:
    forward, off = compared(make().to(dtype).eval())
    assert forward.route == "head"
    assert forward.scale == pytest.approx({granite: 1 / 8, minicpm3: 8 / 32}[make])
    assert off < (0.1 if dtype == torch.bfloat16 else 2e-6)


def test_a_divisor_before_a_head_with_a_bias_is_not_one_after_it() -> None:
    model = minicpm3()
    model.lm_head.bias = nn.Parameter(torch.zeros(67))  # zero now, and trained
    assert LogprobForward(model.eval()).route == "model"


def with_head(forward: Any) -> Any:
    """A change of `LlamaForCausalLM`: its head's forward is replaced."""

    def change(model: Any) -> Any:
        weight = model.lm_head.weight
        model.lm_head.forward = lambda hidden: forward(hidden, weight)
        return model

    return change


def called_twice(model: Any) -> Any:
    class Twice(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.lm_head(torch.zeros(1, 1, 32, dtype=self.dtype))
            return super().forward(*args, **kwargs)

    model.__class__ = Twice
    return model


def never_called(model: Any) -> Any:
    class Never(type(model)):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            output = self.model(input_ids=input_ids)
            output.logits = nn.functional.linear(output.last_hidden_state, self.lm_head.weight)
            return output

    model.__class__ = Never
    return model


def other_hidden(model: Any) -> Any:
    class Other(type(model)):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            output = self.model(input_ids=input_ids)
            output.logits = self.lm_head(output.last_hidden_state + 0.05)
            return output

    model.__class__ = Other
    return model


def fewer(model: Any) -> Any:
    class Fewer(type(model)):  # Inkling's own forward leaves the padded part of the vocabulary out
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits[..., :60]
            return output

    model.__class__ = Fewer
    return model


CHANGES = {
    "its logits are 60 of the head's 67": fewer,
    "its forward calls the head 2 times": called_twice,
    "its forward calls the head 0 times": never_called,
    "what enters the head is not the last hidden state": other_hidden,
    "log-probs from the head's weight are off by": with_head(lambda h, w: nn.functional.linear(h, w).flip(-1)),
    "RuntimeError: no such head": with_head(lambda h, w: (_ for _ in ()).throw(RuntimeError("no such head\nat all"))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reason", CHANGES)
def test_the_line_says_what_differs(reason: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = CHANGES[reason](LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval())
    assert LogprobForward(model).route == "model"
    assert [reason in line and "\n" not in line for line in caplog.messages if "does not know" in line] == [True]


def test_out_of_memory_is_no_reason_for_a_way_that_needs_more() -> None:
    def fail(hidden: Tensor, weight: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        LogprobForward(with_head(fail)(LlamaForCausalLM(LlamaConfig(**SIZES))))


def bert(kind: Any, config: Any, **options: Any) -> Any:
    few = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim", "intermediate_size")}
    return kind(config(**few, intermediate_size=48, is_decoder=True, **options))


OWN_LOGITS = {
    # the head's width is not the hidden states'
    "rembert": lambda: bert(RemBertForCausalLM, RemBertConfig, output_embedding_size=24, input_embedding_size=16),
    "bert": lambda: bert(BertLMHeadModel, BertConfig),
    # transformers' own forward leaves the multiplier that its configuration names out
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=67, d_model=32, n_layers=2, n_heads=2, logit_scale=0.5)),
}


@pytest.mark.parametrize("name", OWN_LOGITS)
def test_these_take_their_own_logits(name: str) -> None:
    forward, off = compared(OWN_LOGITS[name]().double().eval())
    assert forward.route == "model"
    assert off < 1e-6


def test_a_multiplier_that_is_a_formula_s_name_is_none() -> None:
    config = MptConfig(vocab_size=67, d_model=32, n_layers=2, n_heads=2, logit_scale="inv_sqrt_d_model")
    assert logit_transform.logit_transform(config) == (1.0, None)
    assert LogprobForward(MptForCausalLM(config).eval()).route == "head"


@pytest.mark.parametrize(("dora", "route"), [(False, "head"), (True, "module")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_on_a_head_keep_their_way(
    dora: bool, route: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(r=4, target_modules=["lm_head"], use_dora=dora, init_lora_weights=False, lora_dropout=0.5)
    for make in (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), granite):
        model = get_peft_model(make().to(dtype), config).train()
        assert LogprobForward(model).route == route
        assert model.training
    assert not [line for line in caplog.messages if "does not know" in line]
    assert all(record.levelno <= logging.WARNING for record in caplog.records)


def test_a_quantized_head_is_called(caplog: pytest.LogCaptureFixture) -> None:
    class Quantized(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, (self.weight * 16).round() / 16)

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.lm_head = Quantized(32, 67, bias=False)
    forward, off = compared(model.to(torch.bfloat16).eval())
    assert forward.route == "module"
    assert off < 0.05
    assert not [line for line in caplog.messages if "does not know" in line]


def test_sharded_weights_are_not_run() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert LogprobForward(model).route == "head"
