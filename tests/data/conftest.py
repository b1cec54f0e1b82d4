"""Tokenizers of one token per byte, and rows for them: no file, no network."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # imported when they are used: a conftest.py is read before Triton's interpreter is switched on
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

# tools, a style, messages with their calls
TEMPLATE = (
    "{% if tools %}T:{{ tools | tojson }}\n{% endif %}{% if style %}S:{{ style }}\n{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}call:{{ call.function.arguments | tojson }}{% endfor %}"
    "</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def byte_tokenizer() -> "Callable[..., PreTrainedTokenizerFast]":
    """byte_tokenizer("<pad>", eos_token="</s>"): further special tokens, and what PreTrainedTokenizerFast takes.

    merges: pairs of bytes that are one token more. The special tokens come last.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(*special: str, merges: Sequence[tuple[str, str]] = (), **options: Any) -> PreTrainedTokenizerFast:
        symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
        vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(token) for token in special])
        return PreTrainedTokenizerFast(tokenizer_object=core, **options)

    return make


@pytest.fixture
def tokenizer(byte_tokenizer: "Callable[..., PreTrainedTokenizerFast]") -> "PreTrainedTokenizerFast":
    """`ab` is one token; its chat template shows tools, a style, and calls."""
    made = byte_tokenizer("</s>", "<pad>", merges=[("a", "b")], eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def text_rows() -> "Callable[..., Dataset]":
    """text_rows((prompt, chosen, rejected), ...) as a dataset."""
    from datasets import Dataset

    def make(*rows: tuple[str, str, str]) -> Dataset:
        return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])

    return make


@pytest.fixture
def id_rows() -> Callable[..., list[dict[str, Any]]]:
    """id_rows((prompt, chosen, rejected), ...) as rows of token ids."""
    return lambda *rows: [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in rows]
