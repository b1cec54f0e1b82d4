"""Token ids against TRL 1.16's own preparation of the same rows, on real pairs and on awkward ones."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fastdpo.data.formats import load_preferences, normalize_dataset
from fastdpo.data.rows.sides import SIDES, id_columns
from fastdpo.data.tokenize_dataset import tokenize_dataset
from fastdpo.data.tokenize_row import common_prefix_length

ID_COLUMNS = id_columns(SIDES)


def open_think_block(tokenizer: Any) -> None:
    """The generation prompt begins what the full conversation does not have."""
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")


CHAT = {
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5, I think"}],
}


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
def test_text_equals_trl(tokenizer, row, text_rows):
    dataset = text_rows(row)
    assert our_ids(dataset, tokenizer) == trl_ids(dataset, tokenizer)


def test_text_completions_end_with_one_scored_eos(tokenizer, text_rows):
    ids = our_ids(text_rows(("x", "y</s>", "z")), tokenizer)
    assert tokenizer.decode(ids["chosen_ids"][0]) == "y</s>"
    assert tokenizer.decode(ids["rejected_ids"][0]) == "z</s>"


def test_a_merge_across_the_boundary_is_part_of_both_completions(tokenizer, text_rows):
    ids = our_ids(text_rows(("xa", "bc", "c")), tokenizer)
    assert tokenizer.decode(ids["prompt_ids"][0]) == "x"
    assert tokenizer.decode(ids["chosen_ids"][0]) == "abc</s>"
    assert tokenizer.decode(ids["rejected_ids"][0]) == "ac</s>"


@pytest.mark.parametrize("thinks", [False, True], ids=["plain", "thinking"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tools": '[{"type": "function", "function": {"name": "add"}}]'},
        {"chat_template_kwargs": {"style": "plain"}},
    ],
    ids=["bare", "tools", "kwargs"],
)
def test_chat_equals_trl(tokenizer, thinks, extra):
    if thinks:
        open_think_block(tokenizer)
    dataset = Dataset.from_list([{**CHAT, **extra}])
    ours = our_ids(dataset, tokenizer)
    assert ours == trl_ids(dataset, tokenizer)
    if extra:
        assert ours != our_ids(Dataset.from_list([CHAT]), tokenizer)


def test_chat_template_kwargs_as_json_text(tokenizer):
    rows = [{**CHAT, "chat_template_kwargs": kwargs} for kwargs in ({"style": "plain"}, '{"style": "plain"}')]
    assert our_ids(Dataset.from_list(rows[:1]), tokenizer) == our_ids(Dataset.from_list(rows[1:]), tokenizer)


def test_a_generation_prompt_that_the_conversation_lacks_is_cut_and_told(tokenizer, caplog):
    open_think_block(tokenizer)
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


def test_rows_are_dropped_as_trl_drops_them(tokenizer, text_rows):
    # prompts of 3, 4 and 5 tokens: at max_length 4 the second leaves no room for a completion token
    dataset = text_rows(*[("x" * length, "y", "zzz") for length in (3, 4, 5)])
    for mode, kept in (("keep_start", 1), ("keep_end", 3)):
        tokenized, report = tokenize_dataset(dataset, tokenizer, max_length=4, truncation_mode=mode)
        assert isinstance(tokenized, Dataset)
        assert tokenized[:] == trl_ids(dataset, tokenizer, 4, mode)
        assert report.rows == kept == len(tokenized)
        assert report.dropped_long_prompt == 3 - kept
        assert (report.truncated_chosen, report.truncated_rejected) == (kept, kept)


@pytest.mark.parametrize(
    ("ids", "other", "length"), [([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1)]
)
def test_common_prefix_length(ids, other, length):
    assert common_prefix_length(ids, other) == common_prefix_length(other, ids) == length
