"""What looks wrong in tokenized pairs: counted in Arrow's buffers as by reading them, and said once when training."""

import logging
import random
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.findings import repeated_pairs, special_token_findings
from fastdpo.data.rows.sides import SIDES, id_columns
from fastdpo.training.pair_datasets import prepare

ID_COLUMNS = id_columns(SIDES)

BOS, EOS, SPACE, NEWLINE, LETTER = 256, 257, 220, 198, 64
Pair = tuple[list[int], list[int], list[int]]


@pytest.fixture
def tokenizer(byte_tokenizer: Any) -> PreTrainedTokenizerFast:
    made = byte_tokenizer("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    assert made.convert_tokens_to_ids(["<s>", "</s>"]) == [BOS, EOS]
    assert made.decode([SPACE, NEWLINE]).strip() == ""
    return made


def table(pairs: list[Pair]) -> Dataset:
    return Dataset.from_list([dict(zip(ID_COLUMNS, pair, strict=True)) for pair in pairs])


def ending(ids: list[int]) -> str:
    """By reading: white space aside, how many EOS it ends with."""
    ids = [token for token in ids if token not in (SPACE, NEWLINE)]
    if not ids or ids[-1] != EOS:
        return "missing"
    return "doubled" if ids[-2:] == [EOS, EOS] else "one"


def test_counts_are_those_of_reading_every_pair(tokenizer):
    draw = random.Random(0)
    tokens = (BOS, EOS, EOS, SPACE, NEWLINE, LETTER)

    def ids() -> list[int]:
        return [draw.choice(tokens) for _ in range(draw.randrange(5))]

    pairs: list[Pair] = [(ids(), ids(), ids()) for _ in range(400)]
    dataset = table(pairs)
    seen: set[str] = set()
    doubled = identical = repeated = 0
    counts = {kind: [0, 0] for kind in ("missing", "doubled", "one")}
    for prompt, chosen, rejected in pairs:
        doubled += prompt[:2] == [BOS, BOS]
        identical += chosen == rejected
        repeated += str((prompt, chosen, rejected)) in seen
        seen.add(str((prompt, chosen, rejected)))
        for side, answer in enumerate((chosen, rejected)):
            counts[ending(answer)][side] += 1
    assert repeated_pairs(dataset) == (identical, repeated)
    said = special_token_findings(dataset, tokenizer)
    assert said[0].startswith(f"{doubled} of 400 prompts begin with <s> twice")
    for sentence, kind, words in zip(said[1:], ("missing", "doubled"), ("do not end with", "end with"), strict=True):
        chosen, rejected = counts[kind]
        assert sentence.startswith(f"{chosen} of 400 chosen and {rejected} of 400 rejected completions {words} the EOS")
    assert min(doubled, identical, repeated, *counts["missing"], *counts["doubled"], *counts["one"]) > 3
    # rows of another order, through an index
    assert repeated_pairs(dataset.select(range(399, -1, -1))) == (identical, repeated)


def test_nothing_is_said_of_good_pairs(tokenizer):
    assert special_token_findings(table([([BOS, LETTER], [LETTER, EOS, NEWLINE], [EOS])]), tokenizer) == []


def warnings_of(dataset: Any, tokenizer: Any, caplog: Any, tmp_path: Any, **options: Any) -> list[str]:
    caplog.clear()
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    with caplog.at_level(logging.WARNING):
        prepare(dataset, "train", tokenizer, args)
    return [record.message for record in caplog.records if record.name == "fastdpo.training.pair_datasets"]


def test_training_says_it(tokenizer, caplog, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    row = {
        "prompt": [{"role": "user", "content": "<s>q"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    expected = [
        "train: 2 of 2 prompts begin with <s> twice",
        "train: 2 of 2 chosen and 2 of 2 rejected completions do not end with the EOS token </s>",
        "train: the chat template ignores add_generation_prompt",
        "train: 1 of 2 rows are the same as an earlier one; they are kept.",
    ]
    rows = Dataset.from_list([row, row])
    said = warnings_of(rows, tokenizer, caplog, tmp_path)
    assert [sentence[: len(start)] for sentence, start in zip(said, expected, strict=True)] == expected
    stream = IterableDataset.from_generator(lambda: iter([row, row]))
    said = warnings_of(stream, tokenizer, caplog, tmp_path, max_steps=1)
    assert [sentence[:12] for sentence in said] == ["train: 1 of ", "train: 1 of ", "train: the c"]


def test_training_says_it_of_token_ids(tokenizer, caplog, tmp_path):
    good, same = ([BOS, LETTER], [LETTER, EOS], [EOS]), ([BOS, LETTER], [EOS], [EOS])
    assert warnings_of(table([good]), tokenizer, caplog, tmp_path) == []
    assert warnings_of(table([good, same]), tokenizer, caplog, tmp_path) == [
        "train: chosen and rejected are identical in 1 of 2 rows; they teach nothing."
    ]
    long = ([BOS, LETTER], [LETTER, LETTER, EOS], [EOS])
    said = warnings_of(table([good, long, good]), tokenizer, caplog, tmp_path, max_length=4, on_overlong="drop")
    assert said == [
        "train: 1 of 2 rows are the same as an earlier one; they are kept.",
        "train: 2 pairs; max_length 4 cuts 0 chosen and 0 rejected; dropped 0 whose prompt alone fills it; "
        "dropped 1 longer than max_length",
    ]
