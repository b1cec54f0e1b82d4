"""Token ids against TRL 1.16's own preparation of the same rows, on real pairs and on awkward ones."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdpo.data.formats import DataError, load_preferences, normalize_dataset
from fastdpo.data.tokenize_dataset import ID_COLUMNS, tokenize_dataset
from fastdpo.data.tokenize_row import common_prefix_length

TEMPLATE = (
    "{% if tools %}T:{{ tools | tojson }}\n{% endif %}{% if style %}S:{{ style }}\n{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}call:{{ call.function.arguments | tojson }}{% endfor %}"
    "</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# the generation prompt opens a think block that the full conversation does not have
THINKING = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")
CHAT = {
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5, I think"}],
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, but `ab` is one token; no file, no network."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "ab"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("</s>"), AddedToken("<pad>")])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def real(shared_data) -> tuple[Dataset, Any]:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "minimind_tokenizer")
    return load_preferences(str(shared_data / "dpo_en_demo.json")), tokenizer


def trl_ids(dataset: Dataset, tokenizer: Any, max_length: int | None = None, mode: str = "keep_start") -> Any:
    """What TRL's trainer makes of the rows, without building a trainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    args: Any = SimpleNamespace(max_length=max_length, truncation_mode=mode, dataset_num_proc=None)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
    assert isinstance(prepared, Dataset)
    return prepared.select_columns(list(ID_COLUMNS))[:]


def our_ids(
    dataset: Dataset, tokenizer: Any, max_length: int | None = None, mode: str = "keep_start"
) -> dict[str, Any]:
    tokenized, _ = tokenize_dataset(dataset, tokenizer, max_length=max_length, truncation_mode=mode)
    assert isinstance(tokenized, Dataset)
    assert set(tokenized.column_names) == set(ID_COLUMNS)
    return tokenized[:]


def text_rows(*rows: tuple[str, str, str]) -> Dataset:
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


@pytest.mark.parametrize("limits", [(None, "keep_start"), (256, "keep_start"), (256, "keep_end")], ids=str)
def test_real_pairs_equal_trl(real, limits):
    dataset, tokenizer = real
    some = dataset.select(range(40))
    theirs = trl_ids(some, tokenizer, *limits)
    assert our_ids(some, tokenizer, *limits) == theirs
    # negative control: another row order is another answer, so the comparison looks at the ids
    assert our_ids(some.select(range(39, -1, -1)), tokenizer, *limits) != theirs


def test_real_lengths(real):
    """The facts stated beside the data; they count a completion without its end of turn and newline."""
    dataset, tokenizer = real
    tokenized, report = tokenize_dataset(dataset, tokenizer, max_length=None)
    assert isinstance(tokenized, Dataset)
    assert report.rows == 300
    assert report.prompt_cut == 0
    expected = {"prompt_ids": (650, 5991, 0), "chosen_ids": (464, 1681, 2), "rejected_ids": (492, 1505, 2)}
    for column, (mean, longest, end) in expected.items():
        lengths = [len(ids) - end for ids in tokenized[column]]
        assert abs(sum(lengths) / 300 - mean) < 1
        assert max(lengths) == longest
    text = tokenizer.decode(tokenized[0]["prompt_ids"])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    answer = dataset[0]["chosen"][0]["content"]
    assert tokenizer.decode(tokenized[0]["chosen_ids"]) == answer + "<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        ("Question: one?", " Yes.", " No."),
        ("xa", "bc", "c"),  # a and b merge across the boundary, in one completion only
        ("xa", "bc", "bd"),
        ("", "yes", "no"),
        ("x", "ends itself</s>", "does not"),
        ("x </s>", "y", "y"),
        ("two lines\n", "\nthree", " four \u00e9\u4e2d"),
    ],
)
def test_text_equals_trl(tokenizer, row):
    dataset = text_rows(row)
    assert our_ids(dataset, tokenizer) == trl_ids(dataset, tokenizer)


def test_text_completions_end_with_one_scored_eos(tokenizer):
    ids = our_ids(text_rows(("x", "y</s>", "z")), tokenizer)
    assert tokenizer.decode(ids["chosen_ids"][0]) == "y</s>"
    assert tokenizer.decode(ids["rejected_ids"][0]) == "z</s>"


def test_a_merge_across_the_boundary_is_part_of_both_completions(tokenizer):
    ids = our_ids(text_rows(("xa", "bc", "c")), tokenizer)
    assert tokenizer.decode(ids["prompt_ids"][0]) == "x"
    assert tokenizer.decode(ids["chosen_ids"][0]) == "abc</s>"
    assert tokenizer.decode(ids["rejected_ids"][0]) == "ac</s>"


@pytest.mark.parametrize("template", [TEMPLATE, THINKING], ids=["plain", "thinking"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tools": '[{"type": "function", "function": {"name": "add"}}]'},
        {"chat_template_kwargs": {"style": "plain"}},
    ],
    ids=["bare", "tools", "kwargs"],
)
def test_chat_equals_trl(tokenizer, template, extra):
    tokenizer.chat_template = template
    dataset = Dataset.from_list([{**CHAT, **extra}])
    ours = our_ids(dataset, tokenizer)
    assert ours == trl_ids(dataset, tokenizer)
    if extra:
        assert ours != our_ids(Dataset.from_list([CHAT]), tokenizer)


def test_chat_template_kwargs_as_json_text(tokenizer):
    rows = [{**CHAT, "chat_template_kwargs": kwargs} for kwargs in ({"style": "plain"}, '{"style": "plain"}')]
    assert our_ids(Dataset.from_list(rows[:1]), tokenizer) == our_ids(Dataset.from_list(rows[1:]), tokenizer)


def test_a_generation_prompt_that_the_conversation_lacks_is_cut_and_told(tokenizer, caplog):
    tokenizer.chat_template = THINKING
    with caplog.at_level(logging.WARNING):
        tokenized, report = tokenize_dataset(Dataset.from_list([CHAT, CHAT]), tokenizer, max_length=None)
    assert isinstance(tokenized, Dataset)
    assert tokenizer.decode(tokenized[0]["prompt_ids"]).endswith("<assistant>")
    assert tokenizer.decode(tokenized[0]["chosen_ids"]) == "4</s>\n"
    assert report.prompt_cut == 2
    assert "in 2 of 2 rows the prompt alone ends in other tokens" in caplog.text


def test_arguments_of_tool_calls_reach_the_template_as_objects(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    answer = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    ids = our_ids(Dataset.from_list([{**CHAT, "chosen": answer}]), tokenizer)
    assert tokenizer.decode(ids["chosen_ids"][0]) == 'call:{"a": 2}</s>\n'


def test_llama_factory_s_calls_and_observations(tokenizer):
    """Their tags, rendered by a template with tools, are what TRL makes of the same conversation in its own form."""
    tools = [{"name": "add", "parameters": {"type": "object"}}]
    row = {
        "conversations": [
            {"from": "human", "value": "2 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
        ],
        "chosen": {"from": "gpt", "value": "It is 4."},
        "rejected": {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 3}}'},
        "tools": json.dumps(tools),
    }
    normal = normalize_dataset(Dataset.from_list([row]))
    assert isinstance(normal, Dataset)
    ids = our_ids(normal, tokenizer)
    wrapped = json.dumps([{"type": "function", "function": tools[0]}])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    theirs = {
        "prompt": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
        ],
        "chosen": [{"role": "assistant", "content": "It is 4."}],
        "rejected": [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{**call, "function": {"name": "add", "arguments": {"a": 3}}}],
            }
        ],
        "tools": wrapped,
    }
    assert ids == trl_ids(Dataset.from_list([theirs]), tokenizer)
    text = tokenizer.decode(ids["prompt_ids"][0])
    assert text.startswith('T:[{"type": "function", "function": {"name": "add"')
    assert '<assistant>call:{"a": 2}</s>\n<tool>4</s>\n<assistant>' in text


def test_rows_are_dropped_as_trl_drops_them(tokenizer):
    # prompts of 3, 4 and 5 tokens: at max_length 4 the second leaves no room for a completion token
    dataset = text_rows(*[("x" * length, "y", "zzz") for length in (3, 4, 5)])
    for mode, kept in (("keep_start", 1), ("keep_end", 3)):
        tokenized, report = tokenize_dataset(dataset, tokenizer, max_length=4, truncation_mode=mode)
        assert isinstance(tokenized, Dataset)
        assert tokenized[:] == trl_ids(dataset, tokenizer, 4, mode)
        assert report.rows == kept == len(tokenized)
        assert report.dropped_long_prompt == 3 - kept
        assert (report.truncated_chosen, report.truncated_rejected) == (kept, kept)


def test_report(tokenizer):
    dataset = text_rows(("xx", "y", "zzzz"), ("xx", "yyyy", "z"), ("xx", "y", "z"), ("x" * 9, "y", "z"))
    _, report = tokenize_dataset(dataset, tokenizer, max_length=4, name="eval")
    assert str(report) == (
        "eval: 3 pairs; max_length 4 cuts 1 chosen and 1 rejected; dropped 1 whose prompt alone fills it"
    )
    assert report.as_dict() == {
        "name": "eval",
        "rows": 3,
        "max_length": 4,
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


def test_pairs_that_are_too_long(tokenizer):
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


def id_rows(*rows: tuple[Any, Any, Any]) -> list[dict[str, Any]]:
    return [dict(zip(ID_COLUMNS, row, strict=True)) for row in rows]


def test_rows_without_a_scored_token_are_dropped_and_counted(tokenizer):
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


@pytest.mark.parametrize("bad", [None, [1, None], [-1], [1.0], "ids", 7], ids=str)
@pytest.mark.parametrize("column", ID_COLUMNS)
def test_given_ids_are_checked(tokenizer, column, bad):
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


def test_given_ids_may_be_of_any_integer_and_list_type(tokenizer):
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


def test_workers_and_row_order_change_nothing(tokenizer):
    dataset = text_rows(*[(f"q{n}", "a" * n, "b") for n in range(1, 8)])
    alone = our_ids(dataset, tokenizer)
    shared, _ = tokenize_dataset(dataset, tokenizer, max_length=None, num_proc=2)
    assert isinstance(shared, Dataset)
    assert shared[:] == alone
    backwards = our_ids(dataset.select(range(6, -1, -1)), tokenizer)
    assert {name: values[::-1] for name, values in backwards.items()} == alone


def test_cached_tokenization_is_found_again(tokenizer, tmp_path):
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
    tokenizer.chat_template = "{% if messages[0].content == 'bad' %}{{ raise_exception('roles!') }}{% endif %}x"


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


@pytest.mark.parametrize(
    ("ids", "other", "length"), [([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1)]
)
def test_common_prefix_length(ids, other, length):
    assert common_prefix_length(ids, other) == common_prefix_length(other, ids) == length
