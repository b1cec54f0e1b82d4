"""Pairs that are too long, and those that leave nothing to score: dropped, cut and counted."""

import pytest
from datasets import Dataset, IterableDataset

from fastdpo.data.formats import DataError
from fastdpo.data.tokenize_dataset import tokenize_dataset


def test_report(tokenizer, text_rows):
    dataset = text_rows(("xx", "y", "zzzz"), ("xx", "yyyy", "z"), ("xx", "y", "z"), ("x" * 9, "y", "z"))
    _, report = tokenize_dataset(dataset, tokenizer, max_length=4, name="eval")
    assert str(report) == (
        "eval: 3 pairs; max_length 4 cuts 1 chosen and 1 rejected; dropped 1 whose prompt alone fills it "
        "(max_length 10 would keep 95 % of all pairs and 10 all of them; max_prompt_length, or "
        "truncation_mode='keep_end', cuts prompts from the left instead)"
    )
    assert report.as_dict() == {
        "name": "eval",
        "rows": 3,
        "max_length": 4,
        "left_out": (),
        "length_of": {"95 %": 10, "100 %": 10},
        "overlong": 3,
        "dropped_overlong": 0,
        "dropped_long_prompt": 1,
        "dropped_unscored": 0,
        "truncated_chosen": 1,
        "truncated_rejected": 1,
        "empty_after_truncation": 0,
        "shortened_prompts": 0,
        "shortened_chosen": 0,
        "shortened_rejected": 0,
        "prompt_cut": 0,
    }
    _, report = tokenize_dataset(dataset.select([2]), tokenizer, max_length=None)
    assert str(report) == "train: 1 pair, no max_length"


def test_pairs_that_are_too_long(tokenizer, text_rows):
    """Prompt, chosen and rejected of 2 + 2 + 5, 2 + 5 + 2, 2 + 2 + 2 and 9 + 2 + 2 tokens."""
    dataset = text_rows(("xx", "y", "zzzz"), ("xx", "yyyy", "z"), ("xx", "y", "z"), ("x" * 9, "y", "z"))
    stream = dataset.to_iterable_dataset()
    limits = {"max_length": 4, "on_overlong": "drop"}
    for mode in ("keep_start", "keep_end"):
        left, report = tokenize_dataset(dataset, tokenizer, truncation_mode=mode, **limits)
        assert [tokenizer.decode(row["chosen_ids"]) for row in left] == ["y</s>"]
        assert (report.rows, report.overlong, report.dropped_overlong, report.dropped_long_prompt) == (1, 3, 3, 0)
        assert (report.truncated_chosen, report.truncated_rejected) == (0, 0)
        assert str(report).endswith("; dropped 3 longer than max_length")
        assert list(tokenize_dataset(stream, tokenizer, truncation_mode=mode, **limits)[0]) == list(left)
    assert len(list(tokenize_dataset(dataset, tokenizer, max_length=11, on_overlong="error")[0])) == 4
    with pytest.raises(DataError) as caught:
        tokenize_dataset(dataset, tokenizer, max_length=4, on_overlong="error")
    assert str(caught.value) == (
        "train: 3 pairs of 4 are longer than max_length=4, and on_overlong is 'error':\n"
        "  train[0]: 4 tokens with chosen, 7 with rejected\n"
        "  train[1]: 7 tokens with chosen, 4 with rejected\n"
        "  train[3]: 11 tokens with chosen, 11 with rejected\n"
        "Raise max_length, or take on_overlong=drop or truncate."
    )
    stream = dataset.select([2, 1]).to_iterable_dataset()
    with pytest.raises(DataError, match=r"train\[1\]: 7 tokens with chosen, 4 with rejected"):
        list(tokenize_dataset(stream, tokenizer, max_length=4, on_overlong="error")[0])
    with pytest.raises(DataError, match=r"all 4 rows were dropped, .* on_overlong is 'drop', .* shortest has 4 tokens"):
        tokenize_dataset(dataset, tokenizer, max_length=3, on_overlong="drop")
    with pytest.raises(ValueError, match="on_overlong is 'cut'; wanted one of truncate, drop, error"):
        tokenize_dataset(dataset, tokenizer, max_length=3, on_overlong="cut")
    # what max_prompt_length and max_completion_length leave is not too long
    short = {"max_prompt_length": 2, "max_completion_length": 2, "on_overlong": "error"}
    assert tokenize_dataset(dataset, tokenizer, max_length=4, **short)[1].rows == 4


def test_rows_without_a_scored_token_are_dropped_and_counted(tokenizer, id_rows):
    """A lone token after an empty prompt has nothing before it that could predict it."""
    rows = id_rows(([1], [2], [3]), ([], [2], [3, 4]), ([], [2], [3]), ([1], [], []), ([1], [2], []))
    left = [rows[0], rows[1], rows[4]]
    for max_length in (8, None):
        tokenized, report = tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=max_length)
        assert isinstance(tokenized, Dataset)
        assert tokenized.to_list() == left
        assert (report.rows, report.dropped_unscored, report.empty_after_truncation) == (3, 2, 2)
        assert str(report).endswith(
            "dropped 2 without a scored token; 2 with no scored token in one of the completions"
        )
        stream = IterableDataset.from_generator(lambda: iter(rows))
        assert list(tokenize_dataset(stream, tokenizer, max_length=max_length)[0]) == left
    with pytest.raises(DataError, match="train: all 2 rows were dropped, since no completion has a token that could"):
        tokenize_dataset(Dataset.from_list(rows[2:4]), tokenizer, max_length=8)
    with pytest.raises(DataError, match="train: the only row was dropped, since no completion has a token"):
        tokenize_dataset(Dataset.from_list(rows[2:3]), tokenizer, max_length=None)
