"""The trainer's choice of a layout, in runs where it was wrong or failed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.models import attention
from fastdpo.models.document_attention import DOCUMENTS
from fastdpo.models.load import disable_dropout
from fastdpo.training.batches.probe import ProbeRows

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}


def model(name: str = "llama", attn: str | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **HEADS, **TOKENS, **more})
    return AutoModelForCausalLM.from_config(config, **({} if attn is None else {"attn_implementation": attn}))


def pairs(*lengths: tuple[int, int, int]) -> Dataset:
    draw = torch.Generator().manual_seed(1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list(
        [
            {name: torch.randint(1, 61, (n,), generator=draw).tolist() for name, n in zip(names, row, strict=True)}
            for row in lengths
        ]
    )


PAIRS = pairs((9, 7, 3), (2, 9, 12), (14, 4, 4), (5, 6, 1))


def trainer(folder: Path, policy: Any, data: Dataset = PAIRS, collator: Any = None, **options: Any) -> DPOTrainer:
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 61)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>")
    args = {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False}
    args |= {"per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2}
    return DPOTrainer(
        policy,
        args=DPOConfig(**{**args, "max_steps": 3, **options}),
        data_collator=collator,
        train_dataset=data,
        processing_class=tokenizer,
    )


def losses(run: DPOTrainer) -> list[float]:
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def test_a_wider_padding_stays_within_learned_positions(tmp_path: Path) -> None:
    data = pairs((10, 10, 10), (12, 8, 8))
    run = trainer(tmp_path, model("gpt2", **GPT2, max_position_embeddings=21, n_positions=21), data)
    assert run.layout_description == "shared"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_re_entrant_checkpointing_keeps_the_documents(tmp_path: Path, name: str) -> None:
    # GPT-2 passes its mask on by position, so that checkpointing detaches it
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    run = trainer(tmp_path, model(name, **GPT2), **options)
    assert run._logprob_forward.attention == DOCUMENTS
    wanted = losses(trainer(tmp_path, model(name, **GPT2), batch_layout="padded", **options))
    assert losses(run) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("multiple", [None, 16])
def test_values_of_another_size_than_queries(tmp_path: Path, multiple: int | None) -> None:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    latent |= {"num_key_value_heads": 2, "first_k_dense_replace": 2, "n_routed_experts": 4, "router_aux_loss_coef": 0.0}
    run = trainer(tmp_path, model("deepseek_v3", **latent), pad_to_multiple_of=multiple)
    assert run._logprob_forward.attention == DOCUMENTS
    wanted = losses(trainer(tmp_path, model("deepseek_v3", **latent), batch_layout="padded"))
    assert losses(run) == pytest.approx(wanted, abs=1e-5)


def test_a_given_collator_s_layout_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collator = DataCollatorForPreference(pad_token_id=0, layout="shared")
    wanted = losses(trainer(tmp_path, model(), batch_layout="padded"))
    assert losses(trainer(tmp_path, model(), collator=collator)) == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match=r"the data_collator's layout 'shared' is not exact here: .* reaches back 8"):
        trainer(tmp_path, model("mistral", sliding_window=8), collator=collator)
    allowed = attention.allowed
    monkeypatch.setattr(attention, "allowed", lambda documents, branches: allowed(documents, branches * 0))
    with pytest.raises(ValueError, match="layout 'shared' is not exact here: log-probs of shared rows are off by"):
        trainer(tmp_path, model(), collator=collator)


def test_neftune_pads(tmp_path: Path) -> None:
    run = trainer(tmp_path, model(), neftune_noise_alpha=5.0)
    assert run.layout_description == "padded, since NEFTune scales its noise by the length of a row"


def test_a_model_that_fails_in_its_own_way_pads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise TypeError("what is this mask?")

    monkeypatch.setattr(attention, "attention_mask", fails)
    run = trainer(tmp_path, model())
    assert run.data_collator.layout == "padded"
    assert "shared rows do not run (TypeError: what is this mask?)" in run.layout_description


def test_a_later_stream_may_not_pass_the_window(tmp_path: Path) -> None:
    run = trainer(tmp_path, model("mistral", sliding_window=23))
    assert run.data_collator.layout == "shared"
    with pytest.raises(ValueError, match=r"eval_dataset has a sequence of 30 tokens, .* reaches back 23"):
        run.evaluate(pairs((10, 20, 3)))
    with pytest.raises(ValueError, match="eval_dataset is a stream, whose sequences may have 1024 tokens"):
        run.evaluate(PAIRS.to_iterable_dataset())


def test_the_rows_to_compare_on() -> None:
    # the longest prompt, the longest sequence, the longest document, in this order
    lengths = [(30, 2, 2), (10, 35, 1), (8, 26, 26), (12, 12, 12)]
    found = ProbeRows.of([pairs(*lengths)], None).rows
    assert [tuple(len(ids) for ids in row.values()) for row in found] == lengths[:3]
    # prompts that leave no room for answers say little, where others are cut to the same length
    cut = ProbeRows.of([pairs((39, 9, 9), (5, 50, 50), (20, 30, 30))], 40).rows
    assert [len(row["prompt_ids"]) for row in cut] == [39, 5]


@pytest.mark.parametrize(("name", "option"), [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")])
def test_dropout_of_attention_weights_is_seen(name: str, option: str) -> None:
    policy = model(name, **{**GPT2, "attn_pdrop": 0.0, option: 0.1})
    assert attention._drops_attention(policy)
    disable_dropout(policy)
    assert not attention._drops_attention(policy)


def test_a_backward_outside_of_training_is_right_or_fails(tmp_path: Path) -> None:
    # checkpointing runs the blocks again, when the model has its own attention back
    def gradient(layout: str, checkpointing: bool) -> float:
        run = trainer(tmp_path, model(), batch_layout=layout)
        if checkpointing:
            run.model.gradient_checkpointing_enable({"use_reentrant": False})
        run.model.train()
        run.compute_loss(run.model, run.data_collator(list(PAIRS))).backward()
        return float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm())

    assert gradient("shared", False) == pytest.approx(gradient("padded", False), rel=1e-4)
    with pytest.raises(RuntimeError):
        gradient("shared", True)
