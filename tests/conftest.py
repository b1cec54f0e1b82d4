"""Shared fixtures. Triton's interpreter is switched on before anything imports a kernel.

On a GPU there are two runs, since a process either interprets kernels or compiles them: `pytest` interprets and leaves
the gpu tests out, `pytest -m gpu` compiles and runs nothing else.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._device

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# torch lists its constructors at their first use; with torch.empty patched below, `with torch.device("meta")` would
# miss the real one if that is in a test
torch.utils._device._device_constructors()
# tiny tensors lose more to a second thread than they gain, most of all where other work wants the cores
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real preference pairs and a real tokenizer, beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("FASTDPO_REQUIRE_DATA") == "1":
            pytest.fail(f"FASTDPO_REQUIRE_DATA=1 and {folder} is absent")
        pytest.skip(f"real preference data is absent: {folder}")
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """w1 to w60, split at white space; id 0 is </s>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"</s>": 0, **{f"w{i}": i for i in range(1, 61)}}, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="w1")


@pytest.fixture(scope="session")
def id_pairs() -> Any:
    """Pairs of random ids below 61, the same for the same seed: `id_pairs(18, seed=1)`."""
    from datasets import Dataset

    def make(count: int = 18, seed: int = 1) -> Dataset:
        generator = torch.Generator().manual_seed(seed)

        def ids() -> list[int]:
            length = int(torch.randint(2, 9, (), generator=generator))
            return torch.randint(1, 61, (length,), generator=generator).tolist()

        return Dataset.from_list(
            [{"prompt_ids": ids(), "chosen_ids": [*ids(), 0], "rejected_ids": [*ids(), 0]} for _ in range(count)]
        )

    return make


@pytest.fixture(scope="session")
def tiny_config() -> Any:
    """Sizes of a tiny causal LM of 61 tokens, as most architectures name them: `LlamaConfig(**tiny_config())`."""

    def make(**options: Any) -> dict[str, Any]:
        sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
        return {**sizes, **heads, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, **options}

    return make


@pytest.fixture
def make_trainer(tiny_config: Any, id_pairs: Any, word_tokenizer: Any) -> Any:
    """`make_trainer(folder, config=LlamaConfig(...), max_steps=4)`: a trainer on the CPU, each time the same one.

    model or config: left out, a tiny Llama. data, eval_data, peft_config, callbacks as DPOTrainer takes them; any other
    option is DPOConfig's.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fastdpo import DPOConfig, DPOTrainer

    def make(
        folder: Path,
        config: Any = None,
        model: Any = None,
        data: Any = None,
        eval_data: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        **options: Any,
    ) -> DPOTrainer:
        torch.manual_seed(0)
        if model is None:
            model = AutoModelForCausalLM.from_config(config or LlamaConfig(**tiny_config()))
        usual = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}
        usual |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 4}
        return DPOTrainer(
            model,
            args=DPOConfig(output_dir=str(folder), **{**usual, **options}),
            train_dataset=id_pairs() if data is None else data,
            eval_dataset=eval_data,
            processing_class=word_tokenizer,
            callbacks=callbacks,
            peft_config=peft_config,
        )

    return make


@pytest.fixture
def train_command(make_trainer: Any, tmp_path: Path) -> list[str]:
    """`fastdpo train` of a tiny model for 4 steps, into tmp_path / "out"."""
    trainer = make_trainer(tmp_path / "unused")
    for part in (trainer.model, trainer.tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = "".join(f'{{"prompt": "w1 w{i}", "chosen": " w{i + 9}", "rejected": " w3"}}\n' for i in range(4, 22))
    (tmp_path / "pairs.jsonl").write_text(rows)
    paths = {"-m": tmp_path / "model", "-d": tmp_path / "pairs.jsonl", "--output_dir": tmp_path / "out"}
    sizes = {"--max_steps": 4, "--per_device_train_batch_size": 2, "--gradient_checkpointing": False}
    return ["train", *(str(part) for pair in {**paths, **sizes}.items() for part in pair)]


def _repair_interpreter() -> None:
    """Triton's interpreter truncates casts to bf16 and multiplies bf16 bit patterns; do both as hardware does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def round_to_bf16(x: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)

    def as_float(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(widen(handle.data), tl.float32)

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, *rest):
        return dot(self, as_float(a), as_float(b), d, *rest)

    def cast_impl(self, source, wanted):
        have, want = source.dtype.scalar, wanted.scalar
        if have == want:
            return cast(self, source, wanted)
        if want == tl.bfloat16:
            return interpreter.TensorHandle(round_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
        return as_float(source) if have == tl.bfloat16 and want == tl.float32 else cast(self, as_float(source), wanted)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.option.markexpr.replace(" ", "")
    if chosen == "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "0")
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1":
        _repair_interpreter()


@pytest.fixture
def drawn() -> None:
    """Asked for by a test of the real curves in `dpo_metrics`."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's curves take longer to draw than most runs of the tests take to train."""
    report = sys.modules.get("fastdpo.training.report.metric_files")
    if report is not None and "drawn" not in request.fixturenames:
        monkeypatch.setattr(report, "curves_png", lambda log_history: b"\x89PNG not drawn")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now is there to stay: accelerate collects garbage at each start of training, a quarter of a
    second over all modules of transformers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: an output that nothing wrote shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: a test's process may be killed, its machine stays on."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def float64_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms and rotary embeddings round to fp32 whatever the model's dtype; float64 is kept here."""
    to, as_float = torch.Tensor.to, torch.Tensor.float

    def wide(x, *args, **kwargs):
        down = x.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype"))
        return x if down else to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", wide)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else as_float(x))
    softmax = torch.nn.functional.softmax

    def wide_softmax(x, *args, dtype=None, **kwargs):
        return softmax(x, *args, dtype=x.dtype if x.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)
