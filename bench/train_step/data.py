"""Preference pairs for `train_step`: real ones where they lie beside the checkout, else text of the same lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PAIRS = DATA / "dpo_en_demo.json"
TOKENIZER = DATA / "minimind_tokenizer"
FULL = 1024  # max_length of the table below
# tokens of prompt, chosen and rejected: `evenly` from the pairs of dpo_en_demo.json whose prompt is under 1,024 tokens
LENGTHS = (
    *((55, 32, 75), (177, 11, 9), (118, 106, 58), (31, 296, 37), (208, 4, 229), (310, 16, 136), (255, 88, 183)),
    *((54, 264, 277), (28, 462, 145), (591, 99, 5), (67, 295, 370), (136, 204, 449), (61, 340, 424), (541, 191, 110)),
    *((729, 148, 6), (63, 282, 600), (95, 271, 646), (44, 59, 952), (914, 32, 156), (114, 338, 733), (483, 178, 566)),
    *((327, 503, 487), (361, 561, 476), (645, 383, 443), (377, 733, 455), (77, 892, 767), (699, 653, 544)),
    *((378, 1543, 50), (719, 689, 631), (181, 943, 1057), (704, 828, 711), (877, 699, 953)),
)
WORDS = 4096  # of the synthetic pairs' vocabulary
# in words, for a result's conditions
DESCRIPTIONS = {
    "real": f"pairs of {PAIRS.name}, spread over its lengths",
    "synthetic": f"random words with the lengths of real pairs ({PAIRS.name} is not here)",
}


@dataclass(frozen=True)
class PairRows:
    """`rows`: text or messages under prompt, chosen and rejected."""

    rows: Dataset
    tokenizer: PreTrainedTokenizerBase


def kind() -> str:
    """ "real" or "synthetic": what is here."""
    return "real" if PAIRS.is_file() and TOKENIZER.is_dir() else "synthetic"


def make_pairs(inputs: str, count: int, length: int, folder: str = "") -> PairRows:
    """`count` pairs for a `max_length`, spread evenly over the lengths that there are; the tokenizer is `folder`'s."""
    if inputs == "synthetic":
        return synthetic_pairs(count, length, folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder or TOKENIZER)
    return real_pairs(count, length, tokenizer)


def real_pairs(count: int, length: int, tokenizer: PreTrainedTokenizerBase) -> PairRows:
    """Of the demo pairs. Those whose prompt alone fills `length` are no choice: trainers drop them."""
    from fastdpo.data.formats import load_preferences
    from fastdpo.data.tokenize_dataset import tokenize_dataset

    rows = load_preferences(str(PAIRS))
    tokens, _ = tokenize_dataset(rows, tokenizer, max_length=None)
    columns = (cast("list[list[int]]", cast(Any, tokens)[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
    sizes = [tuple(map(len, parts)) for parts in zip(*columns, strict=True)]
    usable = sorted((sum(size), index) for index, size in enumerate(sizes) if size[0] < length)
    chosen = [index for _, index in mixed(evenly(usable, count))]
    return PairRows(rows.select(chosen), tokenizer)


def synthetic_pairs(count: int, length: int, folder: str = "") -> PairRows:
    """Words drawn at random, one token each, of the lengths in the table, scaled to `length`."""
    tokenizer = word_tokenizer()
    words = [f"w{index}" for index in range(WORDS)]
    if folder:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        words = _one_token_words(tokenizer)
    generator = torch.Generator().manual_seed(0)

    def text(tokens: int) -> str:
        tokens = max(1, tokens * length // FULL)
        return "".join(f"{words[index]} " for index in torch.randint(len(words), (tokens,), generator=generator))

    rows = [
        {name: text(tokens) for name, tokens in zip(("prompt", "chosen", "rejected"), sizes, strict=True)}
        for sizes in mixed(evenly(LENGTHS, count))
    ]
    return PairRows(Dataset.from_list(rows), tokenizer)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, the middles of as many equal parts; some more than once where there are fewer."""
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def mixed(items: Sequence[Any]) -> list[Any]:
    """In an order that is always the same: a batch is not of one length."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    return [items[index] for index in order.tolist()]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word between spaces is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ("<unk>", "<pad>", "<eos>")
    vocabulary = {word: index for index, word in enumerate([*special, *(f"w{index}" for index in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue] a setter
    names = dict(zip(("unk_token", "pad_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def _one_token_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that a tokenizer has whole, after a space where it tells that apart."""
    known = tokenizer.get_vocab()
    after_a_space = [piece[1:] for piece in known if piece[:1] in ("\u0120", "\u2581")]
    return sorted(word for word in after_a_space or known if word.isascii() and word.isalnum())
