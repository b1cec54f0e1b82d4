"""The collator against TRL 1.16's, whose completion mask is rebuilt from rows, targets and offsets."""

import random

import pytest
import torch

from fastdpo.data.collate import DataCollatorForPreference

EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12, 13]},
]


def completion_mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2B, T) ones where a token is scored, checking on the way that rows, targets and offsets agree."""
    ids, rows, offsets = batch["input_ids"], batch["rows"], batch["offsets"]
    count, length = ids.shape
    mask = torch.zeros_like(ids)
    assert len(offsets) == count + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(rows) == len(batch["targets"])
    for sequence in range(count):
        for index in range(int(offsets[sequence]), int(offsets[sequence + 1])):
            row, position = divmod(int(rows[index]), length)
            assert row == sequence
            assert ids[row, position + 1] == batch["targets"][index]
            mask[row, position + 1] = 1
    return mask


def trl_batch(examples: list[dict], **options) -> dict[str, torch.Tensor]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference as TRLCollator

    batch = TRLCollator(**options)(examples)
    batch["completion_mask"][:, 0] = 0  # TRL's shift drops what is at position 0
    return batch


def random_examples(generator: random.Random) -> list[dict]:
    def ids(shortest: int) -> list[int]:
        return [generator.randrange(1, 99) for _ in range(generator.randrange(shortest, 9))]

    return [
        {"prompt_ids": ids(0), "chosen_ids": ids(1), "rejected_ids": ids(1)} for _ in range(generator.randrange(1, 5))
    ]


def test_docstring_example():
    batch = DataCollatorForPreference(pad_token_id=0)(EXAMPLES)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 0],
        [7, 8, 9, 0, 0, 0],
        [1, 2, 3, 6, 0, 0],
        [7, 8, 10, 11, 12, 13],
    ]
    assert batch["rows"].tolist() == [2, 3, 7, 14, 19, 20, 21, 22]
    assert batch["targets"].tolist() == [4, 5, 9, 6, 10, 11, 12, 13]
    assert batch["offsets"].tolist() == [0, 2, 3, 4, 8]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert "labels" not in batch


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 2, 3, 5, 9])
@pytest.mark.parametrize("pad_to_multiple_of", [None, 8])
def test_equals_trl(truncation_mode, max_length, pad_to_multiple_of):
    generator = random.Random(f"{truncation_mode} {max_length} {pad_to_multiple_of}")
    options = {"max_length": max_length, "truncation_mode": truncation_mode, "pad_to_multiple_of": pad_to_multiple_of}
    for _ in range(10):
        examples = random_examples(generator)
        ours = DataCollatorForPreference(pad_token_id=0, **options)(examples)
        theirs = trl_batch(examples, pad_token_id=0, **options)
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
        assert torch.equal(completion_mask(ours), theirs["completion_mask"])


def test_the_comparison_sees_a_shifted_mask():
    batch = DataCollatorForPreference(pad_token_id=0)(EXAMPLES)
    expected = trl_batch(EXAMPLES, pad_token_id=0)["completion_mask"]
    assert torch.equal(completion_mask(batch), expected)
    # a mask from the prompt's last token on, as a collator that forgets the shift would score
    batch["rows"] = batch["rows"] - 1
    batch["targets"] = batch["input_ids"].flatten()[batch["rows"] + 1]
    assert not torch.equal(completion_mask(batch), expected)


def test_a_pad_token_that_is_the_eos_stays_visible_and_scored():
    batch = DataCollatorForPreference(pad_token_id=5)(EXAMPLES)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 4, 6]
    assert batch["targets"][1] == 5


def test_position_0_is_not_scored_and_empty_segments_stay():
    no_prompt = [{"prompt_ids": [], "chosen_ids": [4], "rejected_ids": [5, 6]}]
    batch = DataCollatorForPreference(pad_token_id=0)(no_prompt)
    assert batch["offsets"].tolist() == [0, 0, 1]
    assert batch["targets"].tolist() == [6]

    long_prompt = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}]
    batch = DataCollatorForPreference(pad_token_id=0, max_length=3)(long_prompt)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert batch["offsets"].tolist() == [0, 0, 0]
    assert batch["rows"].dtype == batch["targets"].dtype == torch.int64
    assert len(batch["rows"]) == len(batch["targets"]) == 0


def test_only_ids_are_collated():
    examples = [{**example, "ref_chosen_logps": None, "note": "x"} for example in EXAMPLES]
    batch = DataCollatorForPreference(pad_token_id=0)(examples)
    assert set(batch) == {"input_ids", "attention_mask", "rows", "targets", "offsets", "lengths"}


def test_ids_may_be_tensors():
    tensors = [{name: torch.tensor(ids) for name, ids in example.items()} for example in EXAMPLES]
    expected = DataCollatorForPreference(pad_token_id=0)(EXAMPLES)
    for name, tensor in DataCollatorForPreference(pad_token_id=0)(tensors).items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation_mode": "keep_middle"}, "'keep_middle'; wanted one of keep_start, keep_end"),
        ({"max_length": 1}, "max_length is 1; wanted at least 2"),
        ({"max_length": 0}, "max_length is 0; wanted at least 2"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForPreference(pad_token_id=0, **options)
