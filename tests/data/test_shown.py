"""What a chat template leaves out of a row is said, or the row is refused; and a turn that is begun is gone on with."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.errors import DataError
from fastdpo.data.formats import load_preferences, normalize_dataset
from fastdpo.data.inspection import inspect_pairs
from fastdpo.data.tokenize_dataset import tokenize_dataset
from fastdpo.training.pair_datasets import prepare

USER = {"role": "user", "content": "How tall is the tower?"}
TALL = {"role": "assistant", "content": "Very tall."}
SMALL = {"role": "assistant", "content": "Not very."}
ROW: dict[str, Any] = {"prompt": [USER], "chosen": [TALL], "rejected": [SMALL]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look up.", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}],
}


@pytest.fixture
def with_template(byte_tokenizer: Any) -> Any:
    """with_template("qwen3"): a tokenizer with the template that TRL ships under that name."""
    trl = pytest.importorskip("trl")

    def make(name: str) -> PreTrainedTokenizerBase:
        special = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<bos>", "<pad>")
        tokenizer = byte_tokenizer(*special, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
        return tokenizer

    return make


def tokenized(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    dataset = normalize_dataset(Dataset.from_list(rows), skip_bad_rows=True)
    return tokenize_dataset(dataset, tokenizer, max_length=None, **options)


@pytest.mark.parametrize("role", ["human", "User", "Human", "participant"])
@pytest.mark.parametrize("template", ["qwen3", "qwen2_5"])
def test_a_question_that_vanishes_is_a_bad_row(with_template: Any, template: str, role: str) -> None:
    rows = [ROW, {**ROW, "prompt": [{**USER, "role": role}]}, ROW]
    if template == "qwen2_5" and role == "x":
        pytest.skip("shows it")
    tokenizer = with_template(template)
    with pytest.raises(
        DataError, match=rf"train_dataset\[1\]: `prompt\[0\]\.role` is '{role}', of which the chat template shows"
    ):
        tokenized(rows, tokenizer)
    pairs, _ = tokenized(rows, tokenizer, skip_bad_rows=True)
    assert len(pairs) == 2
    alone = {**ROW, "prompt": [{**USER, "role": role}, USER]}
    with pytest.raises(DataError, match=r"`prompt\[0\]\.role`"):
        tokenized([ROW, alone], tokenizer)


@pytest.mark.parametrize(
    ("template", "role"), [("qwen3", "gpt"), ("llama3", "model"), ("llama3", "gpt"), ("qwen3", "bot")]
)
def test_an_answer_by_somebody_else_is_a_bad_row(with_template: Any, template: str, role: str) -> None:
    rows = [{**ROW, "chosen": [{**TALL, "role": role}]}, ROW]
    with pytest.raises(DataError, match=rf"train_dataset\[0\]: `chosen\[0\]\.role` is '{role}'"):
        tokenized(rows, with_template(template))


def test_gemma_s_own_name_of_an_assistant_is_one(with_template: Any) -> None:
    tokenizer = with_template("gemma")
    named = {**ROW, "chosen": [{**TALL, "role": "model"}], "rejected": [{**SMALL, "role": "model"}]}
    assert tokenized([named], tokenizer)[0][0] == tokenized([ROW], tokenizer)[0][0]


def test_every_row_that_a_template_refuses_is_named_by_its_line(
    with_template: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template("gemma")
    system = {"role": "system", "content": "Be brief."}
    rows = [ROW, {**ROW, "prompt": [system, USER]}, ROW, {**ROW, "prompt": [USER, USER]}, ROW]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_preferences(str(path))
    with pytest.raises(DataError) as raised:
        tokenize_dataset(dataset, tokenizer, max_length=None)
    assert "train: 2 bad rows of 5:" in str(raised.value)
    for line in (2, 4):
        assert f"{path}:{line}: the chat template refuses this row: " in str(raised.value)
    with caplog.at_level(logging.WARNING):
        pairs, report = tokenize_dataset(dataset, tokenizer, max_length=None, skip_bad_rows=True)
    assert (len(pairs), report.rows) == (3, 3)
    assert any(line.startswith(f"train: skipped 2 bad rows of 5: {path}:2: ") for line in caplog.messages)
    # what a mixture or a split makes of them keeps their places
    from fastdpo.data.mixtures import DatasetSpec, load_mixture, split_off

    mixed = load_mixture([DatasetSpec(str(path)), DatasetSpec(str(path))], data_scale_rate=1.0)
    with pytest.raises(DataError) as raised:
        tokenize_dataset(split_off(mixed, 1)[0], tokenizer, max_length=None, num_proc=2)
    assert f"{path}:2: the chat" in str(raised.value)
    stream = normalize_dataset(dataset.to_iterable_dataset())
    with pytest.raises(DataError, match=r"train\[1\]: the chat template refuses this row"):
        list(tokenize_dataset(stream, tokenizer, max_length=None)[0])
    assert len(list(tokenize_dataset(stream, tokenizer, max_length=None, skip_bad_rows=True)[0])) == 3


def test_a_bad_row_may_be_the_first(with_template: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = with_template("gemma")
    rows = [{**ROW, "prompt": [{"role": "system", "content": "Be brief."}, USER]}, ROW, ROW]
    dataset = normalize_dataset(Dataset.from_list(rows))
    args = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, skip_bad_rows=True)
    with caplog.at_level(logging.WARNING):
        pairs, report = prepare(dataset, "train", tokenizer, args)
    assert (len(pairs), report.rows) == (2, 2)
    assert any(
        "skipped 1 bad row of 3: train_dataset[0]: the chat template refuses" in line for line in caplog.messages
    )
    assert inspect_pairs(dataset, tokenizer, [64], skip_bad_rows=True).report["rows"] == 2


THOUGHT = [{"role": "assistant", "content": f"<think>\n{why}\n</think>\n\n4"} for why in ("two and two", "who knows")]
REASONED = [{"role": "assistant", "content": "4", "reasoning_content": why} for why in ("two and two", "who knows")]


@pytest.mark.parametrize(
    ("template", "answers", "says"),
    [
        ("deepseek_r1_distill", THOUGHT, "what stands before </think> in assistant turns"),
        ("llama3", REASONED, "`reasoning_content` of assistant turns"),
    ],
)
def test_pairs_that_differ_only_in_what_is_left_out_are_counted(
    with_template: Any, caplog: pytest.LogCaptureFixture, template: str, answers: list[Any], says: str
) -> None:
    rows = [{**ROW, "chosen": answers[:1], "rejected": answers[1:]}, ROW]
    tokenizer = with_template(template)
    with caplog.at_level(logging.WARNING):
        tokenized(rows, tokenizer)
    dataset = normalize_dataset(Dataset.from_list(rows))
    findings = inspect_pairs(dataset, tokenizer, [64]).report["findings"]
    for lines in (caplog.messages, findings):
        assert any(says in line and "in 1 of 2 rows (the first: train_dataset[0])" in line for line in lines), lines
        assert any(
            "differ in 1 of 2 rows and are the same tokens there (the first: train_dataset[0])" in line
            for line in lines
        )


def test_qwen3_shows_reasoning_of_the_last_turn_and_none_of_earlier_ones(with_template: Any) -> None:
    tokenizer = with_template("qwen3")
    assert tokenized([{**ROW, "chosen": REASONED[:1], "rejected": REASONED[1:]}], tokenizer)[1].left_out == ()
    earlier = {**ROW, "prompt": [USER, THOUGHT[0], USER]}
    (line,) = tokenized([earlier], tokenizer)[1].left_out
    assert line.startswith("the chat template leaves out what stands before </think> in assistant turns in 1 of 1 rows")


def test_tools_that_a_template_does_not_show(with_template: Any) -> None:
    rows = [{**ROW, "tools": json.dumps(TOOLS)}, ROW]
    (line,) = tokenized(rows, with_template("gemma"))[1].left_out
    assert line == (
        "the chat template shows no tools, and in 1 of 2 rows (the first: train_dataset[0]) there are some; take a "
        "template that does"
    )
    assert tokenized(rows, with_template("qwen3"))[1].left_out == ()


def test_calls_that_a_template_does_not_show_are_a_bad_row(with_template: Any) -> None:
    row = {**ROW, "prompt": [USER, CALL, {"role": "tool", "content": "324 m"}]}
    assert tokenized([row], with_template("qwen3"))[1].left_out == ()
    with pytest.raises(DataError, match=r"nothing of `prompt\[1\]`, a turn of role 'assistant' with tool_calls"):
        tokenized([{**row, "prompt": [USER, CALL, USER]}], with_template("llama3"))


def test_other_rows_of_the_same_shape_are_looked_at_too(with_template: Any) -> None:
    """Words that are in the text by chance hide nothing."""
    chance = {"prompt": [{"role": "human", "content": "Very"}], "chosen": [TALL], "rejected": [SMALL]}
    with pytest.raises(DataError, match=r"`prompt\[0\]\.role` is 'human'"):
        tokenized([chance], with_template("qwen3"))


TEMPLATES = ["qwen3", "qwen2_5", "llama3", "llama3_1", "gemma", "gemma3", "phi3", "deepseekv3", "glm4moe", "gptoss"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_usual_conversation_is_shown_whole(with_template: Any, template: str) -> None:
    try:
        tokenizer = with_template(template)
    except FileNotFoundError:
        pytest.skip("TRL has no such template")
    several = {**ROW, "prompt": [USER, SMALL, USER]}
    pairs, report = tokenized([ROW, several], tokenizer)
    assert (len(pairs), report.left_out) == (2, ())


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "llama3", "gemma"])
@pytest.mark.parametrize("scored_turns", ["last", "all"])
def test_a_turn_that_is_begun_is_gone_on_with(with_template: Any, template: str, scored_turns: str) -> None:
    tokenizer = with_template(template)
    begun = {"role": "assistant", "content": '{"a":'}
    row = {"prompt": [USER, begun], "chosen": [{"role": "assistant", "content": " 1}"}], "rejected": [SMALL]}
    (pair,), _ = tokenized([row], tokenizer, scored_turns=scored_turns)
    prompt, chosen = tokenizer.decode(pair["prompt_ids"]), tokenizer.decode(pair["chosen_ids"])
    assert prompt.endswith('{"a":')
    assert prompt.count("{") == 1
    assert chosen.startswith(" 1}")
    whole = tokenizer.apply_chat_template([USER, {"role": "assistant", "content": '{"a": 1}'}], tokenize=False)
    assert prompt + chosen == whole
    if scored_turns == "all":
        assert pair["chosen_mask"] == [1] * len(pair["chosen_ids"])


def test_a_turn_that_cannot_be_left_open_is_a_bad_row(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer("</s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }} {{ m.content | lower }}{% endfor %}"
    row = {"prompt": [{**USER, "content": "X x"}, {**TALL, "content": "Qq"}], "chosen": [TALL], "rejected": [SMALL]}
    with pytest.raises(DataError, match=r"which the chat template cannot leave open|shows nothing"):
        tokenized([row], tokenizer)
