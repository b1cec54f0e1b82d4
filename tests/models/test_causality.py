"""A model whose logits depend on later tokens is refused in one sentence; routing noise is none of that."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CpmAntConfig,
    CpmAntForCausalLM,
    PreTrainedTokenizerFast,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.models.causality import sees_ahead
from fastdpo.models.forward import LogprobForward
from fastdpo.training.trainer import DPOTrainer

SMALL = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
AHEAD = {
    "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=67, d_model=32, n_layer=2, n_head=2, d_inner=48)),
    "xlm": lambda: XLMWithLMHeadModel(XLMConfig(vocab_size=67, emb_dim=32, n_layers=2, n_heads=2)),
    "cpmant": lambda: CpmAntForCausalLM(CpmAntConfig(**SMALL, dim_head=16, dim_ff=48, prompt_length=4)),
    "bert": lambda: BertLMHeadModel(BertConfig(**SMALL, intermediate_size=48)),
}
MORE = {"bert": r" \(or set is_decoder=True in its config\)"}


@pytest.mark.parametrize("name", AHEAD)
def test_models_that_look_ahead_are_refused(name: str) -> None:
    model = AHEAD[name]().train()
    sentence = (
        rf"^{type(model).__name__} is not causal: a later token changes the logits of an earlier one, so its log-probs "
        rf"are not those of next tokens; train a causal language model{MORE.get(name, '')}\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        LogprobForward(model)
    assert model.training


def test_the_trainer_says_so_before_it_trains(tmp_path: Path) -> None:
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 67)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )
    pairs = Dataset.from_list([{"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [7, 8]}])
    args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        DPOTrainer(AHEAD["bert"](), None, args, train_dataset=pairs, processing_class=tokenizer)


def test_a_decoder_of_the_same_class_is_trained() -> None:
    assert LogprobForward(BertLMHeadModel(BertConfig(**SMALL, intermediate_size=48, is_decoder=True))).route == "model"


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SIZES: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16, "pad_token_id": 0}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "mistral": {"sliding_window": 3},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 4},
    "mamba": {},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_are_not(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(name, **{**SIZES, "initializer_range": 0.3, **CAUSAL[name]})
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        assert not sees_ahead(model, torch.arange(3, 13)[None])


class Scripted:
    """A model whose logits (T, 3) are what a function of its call's number and of the last token gives."""

    def __init__(self, logits: Any) -> None:
        self.logits, self.calls = logits, 0

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        base = torch.arange(3.0 * input_ids.shape[1]).view(1, -1, 3).clone()
        found = self.logits(base, self.calls, int(input_ids[0, -1]))
        self.calls += 1
        return SimpleNamespace(logits=found)


def _tie(logits: Tensor, call: int, last: int) -> Tensor:
    logits[0, 2] += 5.0 * (call == 0)  # one outcome in the first run, the other one in both others
    return logits


def _one_position(logits: Tensor, call: int, last: int) -> Tensor:
    logits[0, -2] += 5.0 * last
    return logits


def _undefined(logits: Tensor, call: int, last: int) -> Tensor:
    return logits * float("nan")


@pytest.mark.parametrize(
    ("logits", "ahead", "calls"), [(_tie, False, 3), (_one_position, True, 3), (_undefined, False, 2)]
)
def test_what_counts_as_looking_ahead(logits: Any, ahead: bool, calls: int) -> None:
    model: Any = Scripted(logits)
    assert sees_ahead(model, torch.arange(3, 13)[None]) is ahead
    assert model.calls == calls
