"""Progress bars on tokenizing, the reference's pass and training; none with `disable_tqdm`."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.training.pair_datasets import dataset_bars
from fastdpo.training.trainer import DPOTrainer

BARS = ("Tokenizing train", "reference log-probs of train", "2/2")


@pytest.fixture(autouse=True)
def bars_of_datasets() -> Any:
    """On, whatever an earlier test left."""
    off = are_progress_bars_disabled()
    enable_progress_bars()
    yield
    if off:
        disable_progress_bars()


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_run_shows_its_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str], disable_tqdm: bool) -> None:
    sizes: dict[str, Any] = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, vocab_size=11, eos_token_id=0, **sizes))
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, 11)}}
    backend = Tokenizer(WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue] a setter in Rust
    args = DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        disable_tqdm=disable_tqdm,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        max_steps=2,
        save_strategy="no",
        precompute_ref_log_probs=True,
    )
    rows = [{"prompt": "w2 w3", "chosen": f" w{i}", "rejected": " w9"} for i in range(4, 8)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="w1")
    DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    shown = capfd.readouterr().err
    assert [bar in shown for bar in BARS] == [not disable_tqdm] * 3, shown
    assert "it/s]" not in shown or not disable_tqdm
    assert not are_progress_bars_disabled()


def test_bars_that_are_off_stay_off() -> None:
    disable_progress_bars()
    for shown in (True, False):
        with dataset_bars(shown):
            assert are_progress_bars_disabled()
        assert are_progress_bars_disabled()
