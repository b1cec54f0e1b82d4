"""Tokenizing whole datasets: ids that are given, streams, workers, the cache, and what cannot be tokenized."""

from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from fastdpo.data.formats import DataError, normalize_dataset
from fastdpo.data.rows.sides import SIDES, id_columns
from fastdpo.data.tokenize_dataset import tokenize_dataset

ID_COLUMNS = id_columns(SIDES)

CHAT = {
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5, I think"}],
}


@pytest.mark.parametrize("bad", [None, [1, None], [-1], [1.0], "ids", 7], ids=str)
@pytest.mark.parametrize("column", ID_COLUMNS)
def test_given_ids_are_checked(tokenizer, column, bad, id_rows):
    rows = id_rows(([1], [2], [3]), ([1], [2], [3]))
    rows[1][column] = bad
    said = rf"train\[1\]: `{column}` is not a list of token ids; wanted integers of 0 or more\."
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(DataError, match=said):
        list(tokenize_dataset(stream, tokenizer, max_length=8)[0])
    if (isinstance(bad, list) and bad != [1.0]) or bad is None:
        with pytest.raises(DataError, match=said):
            tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=8)
    else:  # a column of an Arrow table has one type
        with pytest.raises(DataError, match=said.replace("1", "0", 1)):
            tokenize_dataset(Dataset.from_list([{**rows[0], column: bad}]), tokenizer, max_length=8)


def test_given_ids_may_be_of_any_integer_and_list_type(tokenizer, id_rows):
    from datasets import Features, Sequence, Value

    rows = id_rows(([1], [2], [3]), ([4], [5], [6]))
    features = Features(
        {"prompt_ids": Sequence(Value("uint16"), length=1)} | dict.fromkeys(ID_COLUMNS[1:], Sequence(Value("int32")))
    )
    tokenized, _ = tokenize_dataset(Dataset.from_list(rows, features=features), tokenizer, max_length=8)
    assert list(tokenized) == rows
    arrays = Dataset.from_list(rows).to_iterable_dataset().with_format("numpy")
    assert len(list(tokenize_dataset(arrays, tokenizer, max_length=8)[0])) == 2


def test_tokenized_rows_are_only_filtered(tokenizer, caplog):
    columns = {
        "prompt_ids": [[1, 2], [1, 2, 3]],
        "chosen_ids": [[4], [4]],
        "rejected_ids": [[5], [5]],
        "ref_chosen_logps": [-1.0, -2.0],
    }
    tokenized, report = tokenize_dataset(Dataset.from_dict(columns), tokenizer, max_length=3)
    assert isinstance(tokenized, Dataset)
    assert tokenized.to_list() == [{"prompt_ids": [1, 2], "chosen_ids": [4], "rejected_ids": [5]}]
    assert report.dropped_long_prompt == 1
    assert "train: ref_chosen_logps is ignored" in caplog.text


def test_a_normalized_stream_is_tokenized_like_a_dataset(tokenizer):
    rows: list[dict[str, Any]] = [
        {"chosen": [*CHAT["prompt"], *CHAT["chosen"]], "rejected": [*CHAT["prompt"], *CHAT["rejected"]], "tools": None}
    ]
    rows += [{**rows[0], "tools": '[{"type": "function", "function": {"name": "add"}}]'}]
    stream = normalize_dataset(IterableDataset.from_generator(lambda: iter(rows)))
    dataset = normalize_dataset(Dataset.from_list(rows))
    ours = list(tokenize_dataset(stream, tokenizer, max_length=None)[0])
    assert ours == list(tokenize_dataset(dataset, tokenizer, max_length=None)[0])
    assert ours[0] != ours[1]  # the second shows its tool


def test_workers_and_row_order_change_nothing(tokenizer, text_rows):
    dataset = text_rows(*[(f"q{n}", "a" * n, "b") for n in range(1, 8)])
    alone = tokenize_dataset(dataset, tokenizer, max_length=None)[0][:]
    shared, _ = tokenize_dataset(dataset, tokenizer, max_length=None, num_proc=2)
    assert isinstance(shared, Dataset)
    assert shared[:] == alone
    backwards = tokenize_dataset(dataset.select(range(6, -1, -1)), tokenizer, max_length=None)[0][:]
    assert {name: values[::-1] for name, values in backwards.items()} == alone


def test_cached_tokenization_is_found_again(tokenizer, tmp_path, text_rows):
    """The map's fingerprint is stable: the tokenizer's use in between does not make it another one."""
    text_rows(("q", "a", "b")).save_to_disk(str(tmp_path / "rows"))
    fingerprints = set()
    for _ in range(2):
        dataset = Dataset.load_from_disk(str(tmp_path / "rows"))
        tokenized, _ = tokenize_dataset(dataset, tokenizer, max_length=64)
        assert isinstance(tokenized, Dataset)
        fingerprints.add(tokenized._fingerprint)
    assert len(fingerprints) == 1


def test_iterable_dataset_is_lazy(tokenizer):
    seen = []

    def rows():
        for length in (2, 5, 9, 3):
            seen.append(length)
            yield {"prompt": "x" * length, "chosen": "y", "rejected": "z", "id": length}

    stream = IterableDataset.from_generator(rows)
    tokenized, report = tokenize_dataset(stream, tokenizer, max_length=5)
    assert seen == [2]  # one row, to see what the columns are
    rows_seen: list[Any] = list(tokenized)
    assert [len(row["prompt_ids"]) for row in rows_seen] == [2, 3]
    assert all(set(row) == set(ID_COLUMNS) for row in rows_seen)
    assert report.rows is None
    assert report.dropped_long_prompt is None
    assert "streamed" in str(report)


def refuse_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% if messages[0].content == 'bad' %}{{ raise_exception('roles!') }}{% endif %}" + (
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        ([CHAT], lambda t: setattr(t, "chat_template", None), "train: the rows are messages, but .* no chat template"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], lambda t: setattr(t, "eos_token", None), "no EOS token"),
        ([{"prompt": "a", "chosen": "b"}], None, "train: missing column `rejected`; found prompt, chosen"),
        (
            [{"prompt": "x" * 9, "chosen": "b", "rejected": "c"}, {"prompt": "x" * 7, "chosen": "b", "rejected": "c"}],
            None,
            r"train: all 2 rows were dropped, .* max_length=4 .* \(the shortest has 7\); raise max_length",
        ),
        (
            [CHAT, {**CHAT, "prompt": [{"role": "user", "content": "bad"}]}],
            refuse_roles,
            r"train\[1\]: the chat template refuses this row: roles!",
        ),
    ],
    ids=["template", "eos", "column", "dropped", "refused"],
)
def test_one_sentence_where_it_cannot_go_on(tokenizer, rows, change, message):
    if change:
        change(tokenizer)
    with pytest.raises(DataError, match=message):
        tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=4)


def test_an_empty_dataset(tokenizer):
    with pytest.raises(DataError, match="has no row"):
        tokenize_dataset(Dataset.from_dict({"prompt": []}), tokenizer, max_length=None)
