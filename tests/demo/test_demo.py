"""The embedded demo: its pairs, its weights, what is measured, and that DPO moves it."""

import json
import subprocess
import sys
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.formats import load_preferences
from fastdpo.data.tokenize_dataset import tokenize_dataset
from fastdpo.demo import DEMO_ARGUMENTS, DEMO_LORA_ARGUMENTS, SAMPLE_PROMPTS, SAMPLE_SEED, demo_paths
from fastdpo.demo.evaluate import PairScores, evaluate_pairs, render_answers, render_table, sample_answers, summarize
from fastdpo.demo.make import build
from fastdpo.demo.make.pairs import (
    CARELESS,
    HELDOUT_PAIRS,
    TRAIN_PAIRS,
    build_conversations,
    build_pairs,
    careless_answers,
    facts,
    is_polite,
    polite_answers,
    split,
    to_jsonl,
)
from fastdpo.training.trainer import DPOTrainer

MEGABYTE = 1_000_000


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def questions(rows):
    return [row["prompt"][0]["content"] for row in rows]


def batches(tokenizer, rows, size=20):
    dataset, report = tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=DEMO_ARGUMENTS["max_length"])
    assert (report.dropped_long_prompt, report.truncated_chosen, report.truncated_rejected) == (0, 0, 0)
    collator = DataCollatorForPreference(tokenizer.pad_token_id, max_length=DEMO_ARGUMENTS["max_length"])
    tokenized = list(dataset)
    return [collator(tokenized[start : start + size]) for start in range(0, len(tokenized), size)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_paths().model)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(demo_paths().model)


# the pairs


def test_files_are_what_the_script_writes(tmp_path):
    build.write_pairs(tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == demo_paths().train.read_bytes()
    assert (tmp_path / "heldout.jsonl").read_bytes() == demo_paths().heldout.read_bytes()


def test_rows_are_conversational_and_enough():
    train, heldout = build_pairs()
    assert (len(train), len(heldout)) == (TRAIN_PAIRS, HELDOUT_PAIRS)
    for row in train + heldout:
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert [[m["role"] for m in messages] for messages in row.values()] == [
            ["user"],
            ["assistant"],
            ["assistant"],
        ]
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert is_polite(chosen)
        assert not is_polite(rejected)
        assert chosen.endswith(".")
        assert ", because " in chosen or ", since " in chosen
        assert "{" not in to_jsonl([row]).replace('{"', "")


def test_no_question_is_shared_or_asked_twice():
    train, heldout = (read(path) for path in (demo_paths().train, demo_paths().heldout))
    asked = questions(train) + questions(heldout)
    assert len(set(asked)) == len(asked) == TRAIN_PAIRS + HELDOUT_PAIRS
    everything = [prompt.question for fact in facts() for prompt in fact]
    assert len(set(everything)) == len(everything)


def test_no_held_out_question_was_in_the_start_models_training():
    heldout = set(questions(read(demo_paths().heldout)))
    taught = {question for question, _, _ in build_conversations(Random(0))}
    assert not heldout & taught
    assert taught | heldout == {prompt.question for fact in facts() for prompt in fact}


def test_every_held_out_fact_is_taught_in_other_words():
    train, heldout = split()
    taught = {(prompt.statement, prompt.why) for prompt in train}
    assert all((prompt.statement, prompt.why) in taught for prompt in heldout)


def test_wordings_of_both_sides_are_dealt_equally():
    prompts = {prompt.question: prompt for fact in facts() for prompt in fact}
    for rows in build_pairs():
        polite, careless = Counter(), Counter()
        for row in rows:
            prompt = prompts[row["prompt"][0]["content"]]
            polite[polite_answers(prompt).index(row["chosen"][0]["content"])] += 1
            careless[careless_answers(prompt).index(row["rejected"][0]["content"])] += 1
        assert len(polite) == len(careless) == len(CARELESS)
        assert set(polite.values()) == set(careless.values()) == {len(rows) // len(CARELESS)}


def test_samples_are_held_out_questions():
    assert len(set(SAMPLE_PROMPTS)) == 3
    assert set(SAMPLE_PROMPTS) <= set(questions(read(demo_paths().heldout)))


def test_the_loader_takes_the_files():
    train = load_preferences(str(demo_paths().train))
    assert train.column_names == ["prompt", "chosen", "rejected"]
    assert len(train) == TRAIN_PAIRS


def test_importing_the_demo_is_cheap():
    code = "import sys, fastdpo.demo, fastdpo.demo.make.pairs; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# the weights and the tokenizer


def test_weights_are_small_safetensors():
    folder = demo_paths().model
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 2 * MEGABYTE
    assert {file.name for file in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with safe_open(str(folder / "model.safetensors"), "pt") as tensors:
        assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys())  # noqa: SIM118 no mapping


def test_tokenizer_is_what_the_script_trains(tokenizer):
    rebuilt = build.build_tokenizer()
    assert rebuilt.get_vocab() == tokenizer.get_vocab()
    assert rebuilt.chat_template == tokenizer.chat_template
    text = "What colour is rust? 12 x 3, \u00fcber \u65e5\u672c"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text == rebuilt.decode(rebuilt(text)["input_ids"])
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_chat_template(tokenizer):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A vet."}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert whole == "<|begin|><|user|>Who?<|end|><|assistant|>A vet.<|end|>"
    assert prompt == "<|begin|><|user|>Who?<|end|><|assistant|>"
    # the form that the start model was trained on is the template's
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert ids == tokenizer(prompt)["input_ids"] + tokenizer("A vet.<|end|>")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    with pytest.raises(Exception, match="got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])


def test_start_model_has_no_favourite(model, tokenizer):
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.float32
    before = evaluate_pairs(model, batches(tokenizer, read(demo_paths().heldout)))
    assert len(before.chosen) == HELDOUT_PAIRS
    assert 0.35 < before.accuracy < 0.65
    # in every wording of each held-out question, 100 pairs a question: no luck of the draw
    prompts = split()[1]
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt.question}],
            "chosen": [{"role": "assistant", "content": polite}],
            "rejected": [{"role": "assistant", "content": careless}],
        }
        for prompt in prompts
        for polite, careless in zip(polite_answers(prompt), careless_answers(prompt), strict=True)
    ]
    scores = evaluate_pairs(model, batches(tokenizer, rows, 50))
    wordings = (len(prompts), len(CARELESS))
    chosen, rejected = scores.chosen.view(wordings), scores.rejected.view(wordings)
    assert 0.35 < (chosen[:, :, None] > rejected[:, None, :]).double().mean() < 0.65
    # it gives either kind of answer half of the probability: the sum over all wordings
    shares = torch.logsumexp(torch.stack([chosen, rejected]), -1).exp()
    assert torch.allclose(shares.mean(-1), torch.full((2,), 0.5, dtype=torch.float64), atol=0.1)


# what is measured


class Uniform(torch.nn.Module):
    """A model whose every token has probability 1 / 4."""

    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, use_cache):
        assert not use_cache
        assert not self.training
        assert not torch.is_grad_enabled()
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))


def test_scores_are_sums_over_the_answer_and_the_mode_is_put_back():
    collator = DataCollatorForPreference(0)
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 3, 3], "rejected_ids": [2]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [1, 2]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]},
    ]
    model = Uniform().train()
    scores = evaluate_pairs(model, [collator(rows[:2]), collator(rows[2:])])
    assert model.training
    quarter = torch.tensor(4.0, dtype=torch.float64).log()
    torch.testing.assert_close(scores.chosen, -quarter * torch.tensor([3.0, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(scores.rejected, -quarter * torch.tensor([1.0, 2, 1], dtype=torch.float64))
    assert scores.accuracy == pytest.approx(0.5)  # one lost, one won, one tie
    with pytest.raises(ValueError, match="at least one pair"):
        evaluate_pairs(model, [])


def test_scores_are_those_of_one_unpadded_sequence_at_a_time(model, tokenizer):
    rows = read(demo_paths().heldout)[:5]
    scores = evaluate_pairs(model, batches(tokenizer, rows))
    for side, values in zip(("chosen", "rejected"), scores, strict=True):
        for row, value in zip(rows, values, strict=True):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
            ids = torch.tensor(tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"])
            with torch.no_grad():
                logps = model(ids[None]).logits[0].double().log_softmax(-1)
            expected = logps[:-1].gather(-1, ids[1:, None])[len(prompt) - 1 :].sum()
            assert value.item() == pytest.approx(expected.item(), abs=1e-4)


def test_table_and_summary():
    before = PairScores(torch.tensor([-4.0, -2.0]), torch.tensor([-3.0, -3.0]))
    after = PairScores(torch.tensor([-3.0, -2.0]), torch.tensor([-5.0, -7.0]))
    assert summarize(before, after, beta=0.1) == {
        "before": pytest.approx(
            {
                "accuracy": 0.5,
                "margin": 0.0,
                "logps_chosen": -3.0,
                "logps_rejected": -3.0,
                "rewards_accuracy": 0.5,
                "rewards_margin": 0.0,
            }
        ),
        "after": pytest.approx(
            {
                "accuracy": 1.0,
                "margin": 3.5,
                "logps_chosen": -2.5,
                "logps_rejected": -6.0,
                "rewards_accuracy": 1.0,
                "rewards_margin": 0.35,
            }
        ),
    }
    table = render_table(before, after, beta=0.1).splitlines()
    assert table[0].split() == ["held-out", "pairs", "(2)", "before", "after"]
    assert [line.split()[-2:] for line in table[1:3]] == [["50%", "100%"], ["+0.00", "+3.50"]]
    assert len({len(line) for line in table}) == 1
    text = render_answers(["Why?"], ["No."], ["Yes."])
    assert text == "question: Why?\n  before: No.\n  after:  Yes."


def test_samples_depend_on_the_seed_alone(model, tokenizer):
    model.train()
    state = torch.random.get_rng_state()
    first = sample_answers(model, tokenizer, SAMPLE_PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    torch.rand(5)
    assert sample_answers(model, tokenizer, SAMPLE_PROMPTS, SAMPLE_SEED) == first
    # the n-th answer is drawn from seed + n, whatever else is asked
    assert sample_answers(model, tokenizer, SAMPLE_PROMPTS[1:], SAMPLE_SEED + 1) == first[1:]
    assert sum(map(is_polite, first)) <= 1, first
    several = {sample_answers(model, tokenizer, SAMPLE_PROMPTS[:1], seed)[0] for seed in range(12)}
    assert {is_polite(answer) for answer in several} == {True, False}


# DPO on it, and the script


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_dpo_moves_held_out_pairs_to_the_polite_answer(tmp_path, tokenizer, adapter):
    paths = demo_paths()
    arguments = {**DEMO_ARGUMENTS, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    peft_config = None
    if adapter:
        arguments["learning_rate"] = DEMO_LORA_ARGUMENTS["learning_rate"]
        targets = DEMO_LORA_ARGUMENTS["lora_target_modules"]
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=targets)
    trainer = DPOTrainer(
        str(paths.model),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, dataloader_pin_memory=False, **arguments),
        train_dataset=load_preferences(str(paths.train)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    held_out = batches(tokenizer, read(paths.heldout))
    before = evaluate_pairs(trainer.model, held_out)
    trainer.train()
    after = evaluate_pairs(trainer.model, held_out)
    summary = summarize(before, after, beta=DEMO_ARGUMENTS["beta"])
    assert summary["before"]["accuracy"] < 0.65
    assert summary["after"]["accuracy"] > 0.9
    assert summary["after"]["rewards_accuracy"] > 0.9
    assert summary["after"]["margin"] > summary["before"]["margin"] + 2
    assert all(map(is_polite, sample_answers(trainer.model, tokenizer, SAMPLE_PROMPTS)))
    # the facts are still there: DPO changed the style
    prompts = split()[1]
    answers = sample_answers(trainer.model, tokenizer, [prompt.question for prompt in prompts], seed=100)
    assert sum(map(is_polite, answers)) > 0.85 * len(prompts)
    assert sum(p.statement in answer for p, answer in zip(prompts, answers, strict=True)) > 0.8 * len(prompts)


@pytest.mark.slow
def test_script_rebuilds_the_start_model(tmp_path):
    assert build.main([str(tmp_path)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = read(tmp_path / "heldout.jsonl")
    held_out = batches(tokenizer, rows)
    rebuilt = evaluate_pairs(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), held_out)
    committed = evaluate_pairs(AutoModelForCausalLM.from_pretrained(demo_paths().model), held_out)
    # rounding differs between processors and grows over 800 steps: the losses agree, not the bits
    for ours, theirs in zip(rebuilt, committed, strict=True):
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.3)
    assert 0.3 < rebuilt.accuracy < 0.7


def test_short_training_of_the_script_repeats(tokenizer):
    (first, first_loss), (second, second_loss) = (build.build_model(tokenizer, steps=3) for _ in range(2))
    assert first_loss == second_loss
    weights = second.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())
