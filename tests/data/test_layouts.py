"""Packed and prompt-shared batches give the log-probs and gradients of padded ones, and wrong masks are seen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.formats import load_preferences
from fastdpo.data.layouts import common_prefix, first_fit
from fastdpo.data.tokenize_dataset import tokenize_dataset
from fastdpo.models import attention
from fastdpo.models.document_attention import DOCUMENTS
from fastdpo.models.forward import LogprobForward
from fastdpo.training.batches.layout import config_limit, settle_layout
from fastdpo.training.batches.probe import LayoutProbe, ProbeRows, difference

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
PLAIN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "granite": {"logits_scaling": 8.0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 4.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 0.25},
    "cohere": {"logit_scale": 0.25},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "glm": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


def make(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **PLAIN.get(name, {}), **OTHERS.get(name, {}), **more})
    # torch's grouped products take no float64
    options = {"experts_implementation": "eager"} if name in ("mixtral", "qwen3_moe") else {}
    return AutoModelForCausalLM.from_config(config, **options).to(dtype).eval()


def rows(vocabulary: int = 97) -> list[dict[str, Any]]:
    """Prompts of all lengths; answers that begin alike, that are equal, and an empty one."""
    draw = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=draw).tolist()

    same = ids(4)
    return [
        {"prompt_ids": ids(9), "chosen_ids": ids(7), "rejected_ids": ids(3)},
        {"prompt_ids": ids(2), "chosen_ids": same + ids(5), "rejected_ids": same + ids(8)},
        {"prompt_ids": ids(14), "chosen_ids": same, "rejected_ids": same},
        {"prompt_ids": ids(5), "chosen_ids": ids(6), "rejected_ids": []},
        {"prompt_ids": [], "chosen_ids": ids(6), "rejected_ids": ids(4)},
    ]


COLLATOR = DataCollatorForPreference(pad_token_id=0)

pytestmark = pytest.mark.usefixtures("float64_stays")


def logprobs(model: Any) -> LayoutProbe:
    return LayoutProbe(model, LogprobForward(model), called, torch.no_grad)


def called(batch: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: batch[name] for name in batch if name not in ("rows", "targets", "offsets", "lengths")}
    return inputs | {"logprob_rows": batch["rows"], "logprob_targets": batch["targets"]}


def run(model: Any, batch: dict[str, Tensor], attention: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradients of a weighted sum of them."""
    model.zero_grad()
    forward = LogprobForward(model)
    forward.attention = attention
    with forward.installed():
        found = model(**called(batch))["logprob"]
    (found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(
    model: Any,
    examples: list[dict[str, Any]],
    collator: DataCollatorForPreference,
    error: float,
    attention: str | None = None,
) -> None:
    wanted, gradients = run(model, replace(collator, layout="padded")(examples))
    found, mine = run(model, collator(examples), attention)
    torch.testing.assert_close(found, wanted, rtol=error, atol=error)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    off = torch.stack([(mine[name] - g).norm() for name, g in gradients.items()]).norm()
    assert float(off / norm) < error


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_log_probs_and_gradients_are_those_of_padded_rows(name: str, layout: str) -> None:
    model = make(name)
    assert_equal(model, rows(), replace(COLLATOR, layout=layout), 1e-9)
    if model.config._attn_implementation == "sdpa":
        assert_equal(model, rows(), replace(COLLATOR, layout=layout, max_row_tokens=1000), 1e-9, DOCUMENTS)


@pytest.mark.parametrize("attn", ["eager", "sdpa", DOCUMENTS])
@pytest.mark.parametrize("max_row_tokens", [None, 60, 1000])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_cut_sequences_in_rows_of_any_length(mode: str, max_row_tokens: int | None, attn: str) -> None:
    model = make("llama", attn_implementation="eager" if attn == "eager" else "sdpa")
    way = DOCUMENTS if attn == DOCUMENTS else None
    collator = replace(COLLATOR, layout="shared", max_row_tokens=max_row_tokens, max_length=11, truncation_mode=mode)
    assert_equal(model, rows(), collator, 1e-9, way)
    assert_equal(model, rows(), replace(collator, pad_to_multiple_of=16), 1e-9, way)


def test_scored_tokens_of_the_prompt_belong_to_both_sequences() -> None:
    examples = [
        {**row, **{f"{part}_mask": [i % 2 for i in range(len(row[f"{part}_ids"]))] for part in PARTS}} for row in rows()
    ]
    collator = replace(COLLATOR, layout="shared")
    assert_equal(make("llama"), examples, collator, 1e-9)
    batch = collator(examples[:1])
    assert batch["offsets"].diff().tolist() == [9 // 2 + 7 // 2, 9 // 2 + 3 // 2]


PARTS = ("prompt", "chosen", "rejected")


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", [*PLAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_real_pairs(name: str, dtype: torch.dtype, error: float, layout: str, shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "minimind_tokenizer")
    pairs = load_preferences(str(shared_data / "dpo_en_demo.json")).select(range(12))
    dataset, _ = tokenize_dataset(pairs, tokenizer, max_length=200)
    collator = replace(COLLATOR, layout=layout, max_length=200)
    model = make(name, dtype, vocab_size=6400)
    examples = [dict(row) for row in dataset][:4]
    assert_equal(model, examples, collator, error)
    if model.config._attn_implementation == "sdpa":
        assert_equal(model, examples, replace(collator, max_row_tokens=10000), error, DOCUMENTS)


def test_flex_attention_sees_what_the_mask_says() -> None:
    model = make("llama", torch.float32)
    batch = replace(COLLATOR, layout="shared", max_row_tokens=1000)(rows())
    forward = LogprobForward(model)
    wanted = LayoutProbe(model, forward, called, torch.no_grad)(batch)
    forward.attention = attention.FLEX
    launches: list[bool] = []
    usual = attention.flex_attention
    try:
        attention.flex_attention = lambda *a, **k: (launches.append(True), usual(*a, **k))[1]
        found = LayoutProbe(model, forward, called, torch.no_grad)(batch)
        padded = LayoutProbe(model, forward, called, torch.no_grad)(COLLATOR(rows()))
    finally:
        attention.flex_attention = usual
    assert len(launches) == 2  # once a layer, and not for padded rows
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded, wanted, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_on_a_cpu_the_mask_is_used_and_why() -> None:
    refusal = attention.flex_refusal(make("llama"), torch.device("cpu"))
    assert refusal == "FlexAttention has no backward pass on cpu"


def _sees_the_other_answer(documents: Tensor, branches: Tensor) -> Tensor:
    return attention_allowed(documents, torch.zeros_like(branches))


def _sees_no_prompt(documents: Tensor, branches: Tensor) -> Tensor:
    same = branches[:, :, None] == branches[:, None, :]
    return attention_allowed(documents, branches) & same[:, None]


attention_allowed = attention.allowed


@pytest.mark.parametrize("mask", [_sees_the_other_answer, _sees_no_prompt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_sees_wrong_masks(dtype: torch.dtype, mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", dtype)
    collator = replace(COLLATOR, layout="shared")
    assert difference(logprobs(model), collator, rows()[:2]) is None
    monkeypatch.setattr(attention, "allowed", mask)
    assert "off by" in str(difference(logprobs(model), collator, rows()[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_sees_positions_that_do_not_restart(dtype: torch.dtype) -> None:
    class Running(DataCollatorForPreference):
        def __call__(self, examples: Any) -> dict[str, Tensor]:
            batch = super().__call__(examples)
            if "position_ids" in batch:
                batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
            return batch

    found = difference(logprobs(make("llama", dtype)), Running(pad_token_id=0, layout="shared"), rows()[:2])
    assert "off by" in str(found)


@pytest.mark.parametrize("name", PLAIN)
def test_auto_is_shared_for_plain_models(name: str) -> None:
    collator, description = settle("auto", make(name, torch.float32))
    assert (collator.layout, description) == ("shared", "shared")


def settle(wanted: str, model: Any, longest: int = 20, **more: Any) -> tuple[DataCollatorForPreference, str]:
    return settle_layout(wanted, COLLATOR, [logprobs(model)], ProbeRows(rows()[:2], longest), **more)


def test_a_window_shorter_than_the_longest_row_pads() -> None:
    collator, description = settle("auto", make("mistral", torch.float32, sliding_window=16))
    assert collator.layout == "padded"
    assert description == "padded, since its attention reaches back 16 tokens and the longest sequence has 20"
    assert settle("auto", make("mistral", torch.float32, sliding_window=20))[0].layout == "shared"
    with pytest.raises(
        ValueError, match="batch_layout 'shared' is not exact here: its attention reaches back 16 tokens"
    ):
        settle("shared", make("mistral", torch.float32, sliding_window=16))


def test_the_probe_alone_would_see_a_window() -> None:
    model = make("mistral", torch.float32, sliding_window=8)
    assert "off by" in str(difference(logprobs(model), replace(COLLATOR, layout="shared"), rows()))


@pytest.mark.parametrize(
    ("make_model", "options", "reason"),
    [
        (
            lambda: make("mixtral", torch.float32),
            {"needs_padding": "the router counts"},
            "padded, since the router counts",
        ),
        (lambda: _recurrent(), {}, "linear_attention layers, which carry a state"),
        (lambda: _alibi(), {}, "takes no position_ids"),
    ],
)
def test_models_that_pad(make_model: Callable[[], Any], options: dict[str, Any], reason: str) -> None:
    collator, description = settle("auto", make_model(), **options)
    assert collator.layout == "padded"
    assert reason in description


def _recurrent() -> Any:
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    return AutoModelForCausalLM.from_config(config)


def _alibi() -> Any:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    )


def test_flash_attention_packs_at_most() -> None:
    model = make("llama", torch.float32)
    model.config._attn_implementation_internal = "flash_attention_2"
    limit = config_limit(model, 20)
    assert (limit.widest, limit.reason) == ("packed", "flash_attention_2 takes no mask of another form")


def test_without_a_comparison_plain_models_share_and_others_pad() -> None:
    collator, description = settle("auto", make("llama", torch.float32), no_probe="the weights are split")
    assert (collator.layout, description) == ("shared", "shared (not compared with padded rows: the weights are split)")
    collator, description = settle("auto", make("olmo2", torch.float32), no_probe="the weights are split")
    assert collator.layout == "padded"
    assert "were not compared with padded ones: the weights are split" in description


def test_rows_are_filled() -> None:
    assert first_fit([5, 9, 4, 3], 9) == [[1], [0, 2], [3]]
    assert first_fit([5, 9, 4, 3], 100) == [[0, 1, 2, 3]]
    batch = replace(COLLATOR, layout="packed")([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 9, 0]]
    assert batch["documents"].tolist() == [[0] * 4, [1] * 4, [2, 2, 2, -1], [3, 3, 3, -1]]
    assert batch["lengths"].tolist() == [4, 4, 3, 3]


def test_common_prefixes() -> None:
    assert common_prefix(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 5])) == 2
    assert common_prefix(torch.tensor([1, 2]), torch.tensor([1, 2, 4])) == 2
    assert common_prefix(torch.tensor([], dtype=torch.long), torch.tensor([1])) == 0
