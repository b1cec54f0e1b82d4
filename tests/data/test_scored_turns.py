"""`scored_turns`: which tokens of a conversation are scored, against minimind's rule and in the decoded text."""

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.formats import DataError, load_preferences, normalize_dataset
from fastdpo.data.rows.sides import SIDES, id_columns, mask_columns
from fastdpo.data.tokenize_dataset import tokenize_dataset
from fastdpo.training.reference.fingerprints import data_hash
from fastdpo.training.trainer import DPOTrainer

ID_COLUMNS = id_columns(SIDES)
MASK_COLUMNS = mask_columns(SIDES)

TURNS = (
    "{% if tools %}<tools>{{ tools | tojson }}</s>\n{% endif %}{% for message in messages %}<{{ message.role }}>"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOL_PAIR = {
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "2 + 2?"},
    ],
    "chosen": [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ],
    "rejected": [{"role": "assistant", "content": "5"}],
    "tools": '[{"type": "function", "function": {"name": "add"}}]',
}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture
def tokenizer(byte_tokenizer: Any) -> PreTrainedTokenizerFast:
    made = byte_tokenizer("</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = TURNS
    return made


def tokenized(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    dataset = normalize_dataset(Dataset.from_list(rows))
    return list(tokenize_dataset(dataset, tokenizer, **{"max_length": None, "scored_turns": "all", **options})[0])


def scored(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """The text of each column, its scored tokens as they are and the others as dots."""
    texts = {}
    for ids, mask in zip(ID_COLUMNS, MASK_COLUMNS, strict=True):
        assert len(row[ids]) == len(row[mask])
        texts[ids] = "".join(
            tokenizer.decode([token]) if mark else "." for token, mark in zip(row[ids], row[mask], strict=True)
        )
    return texts


def minimind_mask(ids: list[int], tokenizer: Any) -> list[int]:
    """minimind's rule (`DPODataset.generate_loss_mask`): from an assistant header to the EOS token and a newline;
    without the empty think block, which its data code takes out of most rows."""
    header, think, end = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<|im_start|>assistant\n", "<think>\n\n</think>\n\n", "<|im_end|>\n")
    )
    mask, place = [0] * len(ids), 0
    while place < len(ids):
        if ids[place : place + len(header)] != header:
            place += 1
            continue
        place += len(header)
        if ids[place : place + len(think)] == think:
            place += len(think)
        while ids[place : place + len(end)] != end:
            mask[place] = 1
            place += 1
        mask[place : place + len(end)] = [1] * len(end)
        place += len(end)
    return mask


def test_all_turns_are_minimind_s_on_real_conversations(shared_data):
    tokenizer: Any = AutoTokenizer.from_pretrained(shared_data / "minimind_tokenizer")
    rows = load_preferences(str(shared_data / "dpo_en_demo.json"))
    rows = rows.select([index for index, row in enumerate(rows) if len(row["prompt"]) > 2][:20])
    assert len(rows) == 20
    pairs, _ = tokenize_dataset(rows, tokenizer, max_length=None, scored_turns="all")
    in_prompts = 0
    for pair in pairs:
        for ids, mask in (("chosen_ids", "chosen_mask"), ("rejected_ids", "rejected_mask")):
            assert pair["prompt_mask"] + pair[mask] == minimind_mask(pair["prompt_ids"] + pair[ids], tokenizer)
        in_prompts += sum(pair["prompt_mask"])
    assert in_prompts > 1000
    last, _ = tokenize_dataset(rows, tokenizer, max_length=None)
    assert [{name: pair[name] for name in ID_COLUMNS} for pair in pairs] == list(last)


def test_minimind_rows(tokenizer):
    """dpo.jsonl has no prompt: the assistant's turns in what both sides share are scored too."""
    shared = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    row = {"chosen": [*shared, said("assistant", "yes")], "rejected": [*shared, said("assistant", "no")]}
    (pair,) = tokenized([row], tokenizer)
    assert scored(pair, tokenizer) == {
        "prompt_ids": "." * len("<user>a$\n<assistant>") + "b</s>\n" + "." * len("<user>c$\n<assistant>"),
        "chosen_ids": "yes</s>\n",
        "rejected_ids": "no</s>\n",
    }


def test_tool_results_and_users_are_not_scored(tokenizer):
    (pair,) = tokenized([TOOL_PAIR], tokenizer)
    texts = scored(pair, tokenizer)
    assert texts["prompt_ids"].replace(".", "") == "hello</s>\n"
    assert texts["chosen_ids"] == '[add {"a": 2}]</s>\n' + "." * len("<tool>4$\n<assistant>") + "It is 4.</s>\n"
    assert texts["rejected_ids"] == "5</s>\n"
    # TRL's: everything after the prompt
    (pair,) = tokenized([TOOL_PAIR], tokenizer, scored_turns="last")
    assert set(pair) == set(ID_COLUMNS)
    assert tokenizer.decode(pair["chosen_ids"]) == '[add {"a": 2}]</s>\n<tool>4</s>\n<assistant>It is 4.</s>\n'
    assert tokenizer.decode(pair["prompt_ids"]).startswith('<tools>[{"type": "function", "function": {"name": "add"}}]')


def test_a_template_that_wants_its_calls(tokenizer):
    """One that refuses a tool's result without a call before it."""
    strict = (
        "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('no call') }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = strict + TURNS
    row = {**TOOL_PAIR, "prompt": TOOL_PAIR["prompt"] + TOOL_PAIR["chosen"][:2], "chosen": TOOL_PAIR["chosen"][2:]}
    (pair,) = tokenized([row], tokenizer)
    text = scored(pair, tokenizer)["prompt_ids"]
    assert "hello</s>\n" in text
    assert '.[add {"a": 2}]</s>\n.' in text


def test_one_answer_is_the_same_either_way(tokenizer):
    for template in (TURNS, TURNS.replace("{% if add_generation_prompt %}", "{% if false %}")):
        tokenizer.chat_template = template
        rows = [
            {"prompt": [said("user", "q")], "chosen": [said("assistant", "x")], "rejected": [said("assistant", "xy")]}
        ]
        (pair,), (last,) = tokenized(rows, tokenizer), tokenized(rows, tokenizer, scored_turns="last")
        assert {name: pair[name] for name in ID_COLUMNS} == last
        assert sum(pair["prompt_mask"]) == 0
        assert 0 not in pair["chosen_mask"] + pair["rejected_mask"]


def test_texts_have_no_turns(tokenizer, caplog):
    (pair,) = tokenized([{"prompt": "q", "chosen": "a", "rejected": "b"}], tokenizer)
    assert set(pair) == set(ID_COLUMNS)
    assert "scored_turns='all' changes nothing: the rows are texts" in caplog.text
    tokenized([pair], tokenizer)
    assert "scored_turns='all' changes nothing: the rows are tokenized already, without masks" in caplog.text


def masked_row(**masks: list[int]) -> dict[str, Any]:
    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [7, 8]}
    return {**pair, "prompt_mask": [0, 1, 0], "chosen_mask": [0, 0, 1], "rejected_mask": [1, 1], **masks}


def test_given_masks_are_kept_cut_and_counted(tokenizer):
    rows = [masked_row(), masked_row(rejected_mask=[0, 1]), masked_row(chosen_mask=[0, 0, 0], rejected_mask=[0, 0])]
    for data in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        pairs, report = tokenize_dataset(data, tokenizer, max_length=5)
        assert list(pairs) == rows[:2]
        if report.rows is not None:
            # the third has nothing to score; max_length cuts the only scored token of both chosen
            assert (report.rows, report.dropped_unscored, report.empty_after_truncation) == (2, 1, 2)
        # a scored token at the end is left by keep_end, and by neither where all of it is cut
        ends, _ = tokenize_dataset(data, tokenizer, max_length=2, truncation_mode="keep_end")
        assert list(ends) == rows[:2]
        short, report = tokenize_dataset(data, tokenizer, max_length=None, max_prompt_length=2, max_completion_length=1)
        assert list(short) == [
            {
                "prompt_ids": [2, 3],
                "chosen_ids": [4],
                "rejected_ids": [7],
                "prompt_mask": [1, 0],
                "chosen_mask": [0],
                "rejected_mask": [1],
            }
        ]
        with_start = tokenize_dataset(data, tokenizer, max_length=4)[0]
        assert list(with_start) == rows[:1]


@pytest.mark.parametrize("bad", [{"chosen_mask": [0, 1]}, {"chosen_mask": [0, 0, 2]}], ids=["short", "two"])
def test_given_masks_are_checked(tokenizer, bad):
    rows = [masked_row(), masked_row(**bad)]
    message = r"train\[1\]: `chosen_mask` does not mark `chosen_ids`; wanted 0 or 1 for each of its tokens\."
    for data in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        with pytest.raises(DataError, match=message):
            list(tokenize_dataset(data, tokenizer, max_length=None)[0])


def test_the_collator_scores_what_the_masks_say(tokenizer):
    (pair,) = tokenized([TOOL_PAIR], tokenizer)
    for mode in ("keep_start", "keep_end"):
        for max_length in (None, 150, 90):
            batch = DataCollatorForPreference(257, max_length, mode)([pair])
            for side, start, end in zip(("chosen", "rejected"), batch["offsets"], batch["offsets"][1:], strict=False):
                ids = pair["prompt_ids"] + pair[f"{side}_ids"]
                mask = pair["prompt_mask"] + pair[f"{side}_mask"]
                kept = slice(max_length) if mode == "keep_start" else slice(-(max_length or len(ids)), None)
                expected = [token for token, mark in zip(ids[kept], mask[kept], strict=True) if mark]
                assert batch["targets"][start:end].tolist() == expected


def test_training_scores_the_assistant_s_turns(tokenizer, tmp_path):
    """The logged log-probs are the model's own, summed over the mask; precomputed references see the mask too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)
    model = LlamaForCausalLM(config)
    (pair,) = tokenized([TOOL_PAIR], tokenizer)
    expected = {}
    for side in ("chosen", "rejected"):
        ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
        mask = torch.tensor(pair["prompt_mask"] + pair[f"{side}_mask"])[1:].bool()
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        expected[side] = logps[mask].sum().item()
    losses = []
    for precompute in (False, True):
        args = DPOConfig(
            output_dir=str(tmp_path / str(precompute)),
            scored_turns="all",
            precompute_ref_log_probs=precompute,
            max_steps=2,
            learning_rate=0.01,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = Dataset.from_list([TOOL_PAIR] * 2)
        trainer = DPOTrainer(copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        first = trainer.state.log_history[0]
        for side, value in expected.items():
            assert first[f"logps/{side}"] == pytest.approx(value, abs=1e-3)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][1] < losses[0][0] == pytest.approx(0.693147, abs=1e-5)


def test_other_masks_are_other_data():
    """Stored reference log-probs are looked up by this hash."""
    hashes = {data_hash(Dataset.from_list([masked_row(**mask)])) for mask in ({}, {"prompt_mask": [0, 0, 0]})}
    bare = {name: masked_row()[name] for name in ID_COLUMNS}
    assert len(hashes | {data_hash(Dataset.from_list([bare]))}) == 3


def test_unknown_choice(tokenizer):
    with pytest.raises(ValueError, match="scored_turns is 'first'; wanted one of last, all"):
        tokenized([TOOL_PAIR], tokenizer, scored_turns="first")
