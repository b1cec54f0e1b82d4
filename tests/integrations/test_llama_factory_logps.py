"""Log-probs for LLaMA-Factory's DPO trainer, from logits and by a model's forward; no LLaMA-Factory is needed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fastdpo.integrations.llama_factory import get_batch_logps
from fastdpo.integrations.llama_factory_forward import RowMeansForward, forward_of


def labels_of(prompts: list[int], completions: list[int], length: int) -> Tensor:
    """Rows with a prompt, a completion and padding, as LLaMA-Factory's collator makes them."""
    labels = torch.full((len(prompts), length), -100)
    for row, (start, count) in enumerate(zip(prompts, completions, strict=True)):
        labels[row, start : start + count] = torch.randint(0, 11, (count,))
    return labels


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_log_probs_from_logits_are_the_formula(dtype: torch.dtype, ld_alpha: float | None):
    completions = [5, 2, 0, 3, 4, 4]
    labels = labels_of([3, 1, 2, 4, 2, 3], completions, 9)
    logits = torch.randn(6, 9, 11).mul(5).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    sums = []
    for row, count in enumerate(completions):
        shared = min(count, completions[(row + 3) % 6])
        places = (labels[row] != -100).nonzero().flatten().tolist()
        logps = [wide[row, t - 1].log_softmax(-1)[labels[row, t]] for t in places]
        weights = [1.0 if i < shared or ld_alpha is None else ld_alpha for i in range(count)]
        sums.append(sum((w * x for w, x in zip(weights, logps, strict=True)), wide.sum() * 0))
    ours, lengths = get_batch_logps(logits, labels, ld_alpha=ld_alpha)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lengths.tolist() == completions
    torch.testing.assert_close(ours.double(), torch.stack(sums), rtol=1e-6, atol=1e-6)
    upstream = torch.randn(6).double()
    ours.backward(upstream.to(ours.dtype))
    torch.stack(sums).backward(upstream)
    torch.testing.assert_close(
        logits.grad.double(), wide.grad, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-9
    )


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must be \(2, 5\) like logits, got \(2, 4\)"):
        get_batch_logps(torch.randn(2, 5, 7), torch.zeros(2, 4, dtype=torch.int64))


TINY: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2", "bias"])
def test_the_forward_gives_log_probs_and_means_of_logits(name: str):
    if name == "cohere":
        model: Any = CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.25))
    elif name == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=1.5))
    else:
        model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False))
    if name == "bias":
        model.lm_head = torch.nn.Linear(16, 37)
    forward = forward_of(model.eval())
    assert isinstance(forward, RowMeansForward)
    ids = torch.randint(0, 37, (4, 6))
    rows, targets = torch.tensor([1, 2, 9, 22]), torch.tensor([5, 0, 36, 7])
    with forward.installed():
        scores = model(input_ids=ids, logprob_rows=rows, logprob_targets=targets)
    logits = model(input_ids=ids).logits
    logps = logits.flatten(0, 1)[rows].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scores["logprob"], logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores["all_logits"], logits.detach().mean((1, 2)), rtol=1e-4, atol=1e-6)
    assert not scores["all_logits"].requires_grad


def test_models_of_another_form_are_named(monkeypatch: pytest.MonkeyPatch):
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    assert isinstance(forward_of(model), RowMeansForward)
    model.forward = lambda *args, **kwargs: None
    assert forward_of(model) == "something else has replaced its forward"
    del model.forward
    theirs = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, *args, **kwargs: theirs(self, *args, **kwargs))
    assert forward_of(model) == "something else has replaced its forward"
    monkeypatch.undo()
    model.lm_head.weight.ds_id = 0
    assert "ZeRO-3" in str(forward_of(model))
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert forward_of(model) == "its head is a torch.nn.modules.container.Sequential"
    model.config.is_encoder_decoder = True
    assert forward_of(model) == "it is not a text-only causal language model"


def test_logits_that_are_not_the_heads_are_noticed():
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    # a final layer of which `logit_transform` knows nothing
    model.lm_head.forward = lambda hidden: 3 * torch.nn.functional.linear(hidden, model.lm_head.weight)
    assert forward_of(model) == "they are not what the head's weight gives"
