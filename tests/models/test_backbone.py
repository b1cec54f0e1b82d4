"""The backbone is found where `base_model_prefix` points nowhere; attention is switched on the decoder's part alone."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from fastdpo.models.attention import FLEX, flex_refusal
from fastdpo.models.backbone import backbone, decoder_config
from fastdpo.models.forward import LogprobForward

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def llama4() -> Any:
    more = {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **more))


def mllama() -> Any:
    return MllamaForCausalLM(MllamaTextConfig(**SIZES, cross_attention_layers=[1]))


@pytest.mark.parametrize("make", [llama4, mllama])
def test_a_prefix_that_points_nowhere(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = make().double().eval()
    assert model.base_model is model
    assert backbone(model) is model.model
    forward = LogprobForward(model)
    assert forward.route == "head"
    assert not [line for line in caplog.messages if "does not know" in line]
    ids = torch.randint(3, 67, (2, 9))
    rows = torch.tensor([2, 5, 9 + 6])
    targets = ids.flatten()[rows + 1]
    with torch.no_grad():
        with forward.installed():
            found = model(input_ids=ids, logprob_rows=rows, logprob_targets=targets)["logprob"]
        own = model(input_ids=ids).logits.flatten(0, 1)[rows].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    # Mllama's own logits are fp32 whatever its dtype
    error = 1e-9 if own.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, own, rtol=error, atol=error, check_dtype=False)


def test_a_model_without_a_backbone_takes_its_own_logits(caplog: pytest.LogCaptureFixture) -> None:
    class Whole(LlamaForCausalLM):
        base_model_prefix = "nowhere"

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.trunk = self.model
            del self.model

        def forward(self, input_ids: Any, **kwargs: Any) -> Any:
            output = self.trunk(input_ids=input_ids)
            output.logits = self.lm_head(output.last_hidden_state)
            return output

        def get_output_embeddings(self) -> Any:
            return self.lm_head

    model = Whole(LlamaConfig(**SIZES))
    assert backbone(model) is None
    assert LogprobForward(model).route == "model"
    assert "(it has no backbone apart from its head)" in caplog.text


def test_no_head_is_refused() -> None:
    class Headless(PreTrainedModel):
        config_class = LlamaConfig

    with pytest.raises(ValueError, match=r"^Headless has no language model head; fastdpo trains causal LMs\.$"):
        LogprobForward(Headless(LlamaConfig(**SIZES)))


def vision() -> Any:
    text = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**tower, "image_size": 28, "patch_size": 14})
    return Gemma3ForConditionalGeneration(config)


def test_a_vision_tower_keeps_its_attention() -> None:
    model = vision().eval()
    config = model.config
    text, tower = config.text_config, config.vision_config
    tower._attn_implementation = "eager"
    assert decoder_config(model) is text
    forward = LogprobForward(model)
    assert forward.route == "head"
    forward.attention = FLEX
    with forward.installed(), forward.installed():
        kinds = [part._attn_implementation for part in (config, text, tower)]
    assert kinds == ["sdpa", FLEX, "eager"]
    assert [part._attn_implementation for part in (config, text, tower)] == ["sdpa", "sdpa", "eager"]
    text._attn_implementation = "eager"
    assert flex_refusal(model, torch.device("cuda")) == "the model's attention is eager"
