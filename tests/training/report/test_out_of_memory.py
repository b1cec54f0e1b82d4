"""Where memory runs out the error says the batch's shapes and what to change, and stays the error that it was."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastdpo.cli import main
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.demo import demo_paths
from fastdpo.training import trainer as trainer_module
from fastdpo.training.reference import precomputed
from fastdpo.training.report import metrics
from fastdpo.training.report.out_of_memory import MemoryWatch, _halved, is_out_of_memory
from fastdpo.training.trainer import DPOTrainer

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."
OPTIONS: dict[str, Any] = {"batch_layout": "padded", "loss_type": "simpo", "save_strategy": "no"}
ADAPTER = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
INSTEAD = "an adapter in place of all weights (peft_config, --use_peft)"


def fail(error: Exception) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        raise error

    return run


def too_much(*args: Any, **kwargs: Any) -> None:
    torch.zeros(1 << 60, dtype=torch.uint8)


def note(error: BaseException) -> str:
    """What a traceback shows of it last."""
    return error.__notes__[-1] if sys.version_info >= (3, 11) else str(error).splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(CUDA),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_what_runs_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_the_cpu_s_own_error_is_one_and_others_are_not() -> None:
    with pytest.raises(RuntimeError) as raised:
        too_much()
    assert is_out_of_memory(raised.value)
    for other in (
        RuntimeError("out of resource: shared memory"),
        ValueError("out of memory"),
        OSError("No space left"),
    ):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(CUDA), MemoryError(), None], ids=["cuda", "host", "allocator"]
)
def test_the_training_batch_is_described_and_the_error_stays(
    tmp_path: Path, make_trainer: Any, error: Exception | None
) -> None:
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=3, **OPTIONS)
    batch = next(iter(trainer.get_train_dataloader()))
    run = too_much if error is None else fail(error)
    trainer.model.get_submodule("model.layers.0").register_forward_pre_hook(run)
    before, kind = str(error), RuntimeError if error is None else type(error)
    with pytest.raises(kind) as raised:
        trainer.train()
    assert type(raised.value) is kind
    size = {"cuda": " (tried to allocate 2.00 GiB)", "host": "", "allocator": f" (tried to allocate {1 << 60} bytes)"}
    tried = size["allocator" if error is None else "cuda" if before else "host"]
    rows, width = batch["input_ids"].shape
    longest = int(batch["attention_mask"].sum(1).max())
    assert note(raised.value) == (
        f"out of memory{tried} in a training batch of 2 pairs (4 sequences, the longest of {longest} tokens; layout "
        f"padded: {rows} x {width} tokens): gradient_checkpointing=True or per_device_train_batch_size=1 with "
        "gradient_accumulation_steps=6 about halves that"
    )
    if tried == size["cuda"]:
        assert str(raised.value).startswith(CUDA), "its own text stays"
    # the trainer can go on: nothing is left half done
    assert not list(tmp_path.glob("*lock"))


def fixes(work: str, adapter: bool = False, pairs: int = 4, **options: Any) -> str:
    args = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, **options)
    watch = MemoryWatch(args, adapter)
    batch = {"input_ids": torch.zeros(1, 90), "offsets": torch.zeros(2 * pairs + 1), "lengths": torch.tensor([40, 50])}
    watch.at(work, batch, SimpleNamespace(layout="packed"))
    return watch.sentence(MemoryError()).partition("tokens): ")[2]


@pytest.mark.parametrize(
    ("work", "options", "wanted"),
    [
        (
            "training",
            {"per_device_train_batch_size": 4},
            "per_device_train_batch_size=2 with gradient_accumulation_steps=2 or max_length=25 about halves that",
        ),
        (
            "training",
            {"per_device_train_batch_size": 9, "gradient_accumulation_steps": 2},
            "per_device_train_batch_size=3 with gradient_accumulation_steps=6 or max_length=25 about halves that",
        ),
        (
            "training",
            {"max_tokens_per_batch": 100, "gradient_checkpointing": False},
            "gradient_checkpointing=True or max_tokens_per_batch=50 about halves that",
        ),
        ("training", {"pairs": 1}, f"max_length=25 about halves that; {INSTEAD} needs less"),
        ("training", {"pairs": 1, "adapter": True}, "max_length=25 about halves that"),
        ("evaluation", {}, "per_device_eval_batch_size=2 or max_length=25 about halves that"),
        ("precomputing", {}, "precompute_ref_batch_size=2 or max_length=25 about halves that"),
    ],
)
def test_the_arguments_are_those_that_apply(work: str, options: dict[str, Any], wanted: str) -> None:
    assert fixes(work, **options) == wanted


def test_a_batch_is_halved_into_whole_parts() -> None:
    assert [_halved(size) for size in (1, 2, 3, 6, 8, 9)] == [(1, 1), (1, 2), (1, 3), (3, 2), (4, 2), (3, 3)]


def test_evaluation_update_and_checkpoint_are_told_apart(
    tmp_path: Path, make_trainer: Any, id_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(lora: bool = False, **options: Any) -> DPOTrainer:
        adapter = ADAPTER if lora else None
        return make_trainer(tmp_path, eval_data=id_pairs(4), peft_config=adapter, **{**OPTIONS, **options})

    def says(trainer: DPOTrainer, text: str) -> None:
        with pytest.raises(MemoryError) as raised:
            trainer.train()
        assert re.search(text, note(raised.value)), note(raised.value)

    trainer = run()
    trainer.model.get_submodule("model.layers.0").register_forward_pre_hook(fail(MemoryError()))
    with pytest.raises(MemoryError) as raised:
        trainer.evaluate()
    assert "in an evaluation batch of 4 pairs (8 sequences" in note(raised.value)
    assert "per_device_eval_batch_size=2 or max_length=" in note(raised.value)

    trainer = run(max_steps=1)
    trainer.create_optimizer()
    monkeypatch.setattr(type(trainer.optimizer), "step", fail(MemoryError()))
    says(trainer, rf"^out of memory in the optimizer's step: {re.escape(INSTEAD)} or optim='adafactor' needs less$")
    monkeypatch.undo()

    trainer = run(max_steps=1)
    trainer.create_optimizer()
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", fail(MemoryError()))
    says(trainer, "^out of memory in the optimizer's step: ")

    trainer = run(lora=True, max_steps=1, save_strategy="steps")
    monkeypatch.setattr(trainer, "_save_checkpoint", fail(MemoryError()))
    says(trainer, r"^out of memory between two steps: optim='adafactor' needs less$")

    trainer = run()
    monkeypatch.setattr(trainer, "create_optimizer", fail(MemoryError()))
    says(trainer, "^out of memory before the first step: ")


def test_what_comes_before_training_is_described(
    tmp_path: Path, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "loss_type": "sigmoid", "precompute_ref_log_probs": True, "precompute_ref_batch_size": 4}
    for place, function in ((precomputed, "model_call"), (trainer_module, "make_reference")):
        with monkeypatch.context() as patch:
            patch.setattr(place, function, fail(torch.OutOfMemoryError(CUDA)))
            with pytest.raises(torch.OutOfMemoryError) as raised:
                make_trainer(tmp_path, **options)
        if function == "model_call":
            assert "in a batch of the reference's log-probs of 4 pairs (8 sequences" in note(raised.value)
            assert "precompute_ref_batch_size=2 or max_length=" in note(raised.value)
        else:
            assert note(raised.value).startswith(
                "out of memory (tried to allocate 2.00 GiB) while model and reference are loaded: train an adapter"
            )


@pytest.mark.slow
def test_a_smaller_batch_that_is_found_is_no_error(tmp_path: Path, make_trainer: Any) -> None:
    sizes: list[int] = []

    def run(model: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]) // 2)
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError(CUDA)

    trainer = make_trainer(tmp_path, auto_find_batch_size=True, **OPTIONS)
    trainer.model.model.register_forward_pre_hook(run, with_kwargs=True)
    trainer.train()
    assert (sizes[0], sizes[-1], trainer.state.global_step) == (2, 1, 4)


def test_the_command_says_the_sentence_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Two and two?", "chosen": "4", "rejected": "5"}) + "\n")
    # within the loss of the first batch
    monkeypatch.setattr(metrics, "pair_columns", fail(torch.OutOfMemoryError(CUDA)))
    given = [
        "train",
        "-m",
        str(demo_paths().model),
        "-d",
        str(pairs),
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
    ]
    assert main(given) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"fastdpo train: failed: out of memory \(tried to allocate 2\.00 GiB\) in a training batch of 1 pair \(2 "
        r"sequences, the longest of (\d+) tokens; layout shared: 1 x \d+ tokens\): max_length=\d+ about halves that; "
        r"an adapter in place of all weights \(peft_config, --use_peft\) needs less \(--debug shows the traceback\)",
        last,
    ), last
