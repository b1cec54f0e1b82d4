"""The embedded demo: a tiny Llama that answers politely or carelessly by chance, and pairs that prefer the polite.

Everything is package data: no network, no GPU. `fastdpo.demo.make.build` made it and makes it again,
`fastdpo.demo.evaluate` measures a model on the held-out pairs. Importing this loads neither torch nor transformers.
"""

from pathlib import Path
from typing import Any, NamedTuple


class DemoPaths(NamedTuple):
    """`model`: a folder for `from_pretrained`, with tokenizer; `train`, `heldout`: JSON lines of preference pairs."""

    model: Path
    train: Path
    heldout: Path


def demo_paths() -> DemoPaths:
    """Where the demo's model and pairs lie in this installation."""
    folder = Path(__file__).parent
    return DemoPaths(folder / "model", folder / "train.jsonl", folder / "heldout.jsonl")


# held-out questions to show answers to. The start model answers about half of all held-out questions politely;
# with this seed it answers these three carelessly, so that the change shows
SAMPLE_PROMPTS = (
    "What colour is rust?",
    "What is the capital of Denmark?",
    "Do you know where a rabbit lives?",
)
SAMPLE_SEED = 8

# arguments of DPOConfig. The tiny model forgets its facts when it is pushed further than this: at a margin of
# about 4 nats 60 of 60 held-out answers were right (greedy, after a polite opening), at 18 only 37 were
DEMO_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 20,
    "warmup_steps": 10,
    "beta": 0.1,
    "max_length": 96,
    "gradient_checkpointing": False,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 25,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 1,
}

# with an adapter of rank 16 these go on top: one on the attention's inputs alone learns less and forgets more
DEMO_LORA_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
