"""A model's own activations as inputs.

    python -m bench.linear_logprob.real MODEL_FOLDER --pairs FILE --out FILE

A file holds hidden (N, H) and weight (V, H) in bf16 and labels (N,) int64: the states that predict the chosen
completions' tokens, the head, and those tokens. No network: the folder holds model and tokenizer.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data" / "activations.safetensors"


def shape(path: Path) -> tuple[int, int, int]:
    """(N, H, V) of a stored file.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            (n, h), (v, also_h) = (file.get_slice(name).get_shape() for name in ("hidden", "weight"))
            (labels,) = file.get_slice("labels").get_shape()
    except Exception as reason:
        raise ValueError(
            f"{path} holds no activations: {reason}; python -m bench.linear_logprob.real makes such a file."
        ) from None
    if h != also_h or n != labels:
        raise ValueError(f"{path}: hidden is ({n}, {h}), weight ({v}, {also_h}), labels ({labels},): they do not fit.")
    return n, h, v


def load(path: Path, n: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The first n rows of hidden, the weight, the first n labels."""
    with safe_open(path, "pt", device=device) as file:
        return file.get_slice("hidden")[:n], file.get_tensor("weight"), file.get_slice("labels")[:n].long()


def activations(model, tokenizer, pairs: str, tokens: int, max_length: int = 1024) -> dict[str, Tensor]:
    """States, head and labels of the first `tokens` chosen tokens of the pairs in a file."""
    from fastdpo.data.formats import load_preferences
    from fastdpo.data.tokenize_dataset import tokenize_dataset

    dataset, _ = tokenize_dataset(load_preferences(pairs), tokenizer, max_length=max_length)
    hidden, labels = [], []
    for row in cast(Iterable[dict[str, list[int]]], dataset):
        prompt, ids = len(row["prompt_ids"]), (row["prompt_ids"] + row["chosen_ids"])[:max_length]
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        hidden.append(states[prompt - 1 : -1])
        labels += ids[prompt:]
        if len(labels) >= tokens:
            break
    weight = model.get_output_embeddings().weight.detach()
    return {
        "hidden": torch.cat(hidden)[:tokens].bfloat16().contiguous(),
        "weight": weight.bfloat16().contiguous(),
        "labels": torch.tensor(labels[:tokens]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear_logprob.real", description="Stores a model's activations."
    )
    parser.add_argument("model", help="folder with a causal language model and its tokenizer")
    parser.add_argument("--gguf", help="name of a GGUF file in that folder (needs the package gguf)")
    parser.add_argument("--pairs", required=True, help="preference pairs, as fastdpo train takes them")
    parser.add_argument("--tokens", type=int, default=4096, help="rows to store (default 4096)")
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"safetensors file (default {DEFAULT.name})")
    arguments = parser.parse_args(argv)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **options)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(activations(model, tokenizer, arguments.pairs, arguments.tokens), arguments.out)
    n, h, v = shape(arguments.out)
    print(f"written: {arguments.out}, {n} states of {h}, a head of {v}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
