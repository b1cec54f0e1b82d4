"""What `train_step` trains: models by their sizes, or one that lies in a folder, and how many pairs a step has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

YARDSTICK = "trl"  # the entry that the others are checked against


@dataclass(frozen=True)
class ModelShape:
    """A Llama's or Qwen2's sizes, under the names of their configuration."""

    family: str  # "llama" or "qwen2"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False


SHAPES = {
    "Llama 2x64": ModelShape("llama", 64, 160, 2, 4, 2, 6400),
    "Llama 4x256": ModelShape("llama", 256, 688, 4, 8, 4, 6400),
    "Qwen2.5-0.5B": ModelShape("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "Llama-3.2-1B": ModelShape("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "Llama-3.1-8B": ModelShape("llama", 4096, 14336, 32, 32, 8, 128256),
}


@dataclass(frozen=True)
class TrainCase:
    """Steps of `pairs` preference pairs cut at `length` tokens, on a model whose weights are random, or read.

    mode: "full" trains every weight, "lora" an adapter on all linear layers. A round is `steps` steps over the same
    pairs. `inputs`: "real" pairs, or "synthetic" ones of the same lengths. `folder`: of the model's weights and its
    tokenizer. `entries`: the only ones that there is room for; () for all.
    """

    head: str
    h: int
    v: int
    pairs: int
    length: int
    steps: int
    dtype: str
    mode: str
    inputs: str = "real"
    folder: str = ""
    entries: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        synthetic = " synthetic" if self.inputs == "synthetic" else ""
        return f"{self.head}, {self.pairs} pairs of {self.length} {self.dtype} {self.mode}{synthetic}"


# (model, pairs, length, steps, mode)
CPU_SIZES = [("Llama 4x256", 4, 1024, 8, "full")]
CPU_QUICK = [("Llama 2x64", 2, 256, 4, "full")]
CUDA_QUICK = [("Qwen2.5-0.5B", 4, 1024, 4, "lora")]
CUDA_SIZES = [
    ("Llama-3.2-1B", 4, 1024, 8, "lora"),
    ("Llama-3.1-8B", 4, 1024, 8, "lora"),
    ("Qwen2.5-0.5B", 4, 1024, 8, "lora"),
    ("Llama-3.2-1B", 4, 1024, 8, "full"),
    ("Qwen2.5-0.5B", 4, 1024, 8, "full"),
]
# (pairs, length, steps) of a model in a folder, by device and whether the run is a quick one
FOLDER_SIZES = {
    ("cpu", True): (2, 256, 2),
    ("cpu", False): (4, 1024, 2),
    ("cuda", True): (4, 1024, 4),
    ("cuda", False): (4, 1024, 8),
}
# weights, gradients and both moments in fp32 of a fifth such model would not fit 80 GiB
ROOM = {("Llama-3.2-1B", "full"): ("fastdpo", "trl")}


def train_cases(device: str, quick: bool, folder: Path | None = None, inputs: str = "real") -> list[TrainCase]:
    """What a run measures, the most important first; a model in a folder is trained with LoRA, after the others.

    Raises:
        ValueError: the folder holds no model.
    """
    if device == "cpu":
        sizes, dtype = (CPU_QUICK if quick else CPU_SIZES), "fp32"
    else:
        sizes, dtype = (CUDA_QUICK if quick else CUDA_SIZES), "bf16"
    cases = []
    for model, pairs, length, steps, mode in sizes:
        shape = SHAPES[model]
        room = ROOM.get((model, mode), ())
        sized = (shape.hidden_size, shape.vocab_size, pairs, length, steps, dtype, mode, inputs)
        cases.append(TrainCase(model, *sized, entries=room))
    if folder is not None:
        config = _config(folder)
        pairs, length, steps = FOLDER_SIZES[device, quick]
        sized = (config["hidden_size"], config["vocab_size"], pairs, length, steps, dtype, "lora", inputs)
        cases.append(TrainCase(folder.resolve().name, *sized, folder=str(folder)))
    return cases


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {name: config[name] for name in ("hidden_size", "vocab_size")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no causal language model: {type(error).__name__}: {error}") from None
