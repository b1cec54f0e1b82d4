"""`fastdpo compare`: answers are what the models generate, rewards are what their logits say."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo.cli.compare import _pad, _width, _wrap
from fastdpo.runs.answers import load_contestants
from fastdpo.runs.saved_run import SavedRun, read_run, reference_path

BETA = 0.3
QUESTION = "What colour is the sky?"
Compare = Callable[..., tuple[int, str, str]]


def write_summary(folder: Path, kind: str, model: str, trained_as: str, beta: float | None = BETA) -> None:
    (folder / "dpo_metrics").mkdir(exist_ok=True)
    summary = {
        "model": {"name_or_path": model, "trained_as": trained_as},
        "reference": {"kind": kind},
        "settings": {} if beta is None else {"beta": beta},
    }
    (folder / "dpo_metrics" / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> dict[str, Path]:
    """A base model, a LoRA run over it, and a full run from it, all with random weights."""
    root = tmp_path_factory.mktemp("compare")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "minimind_tokenizer")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2, **sizes
    )
    paths = {name: root / name for name in ("base", "lora", "full")}
    for seed, name in enumerate(("base", "full")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # settings that would come in beside those that are asked for
        model.generation_config.update(do_sample=True, temperature=0.5, repetition_penalty=1.5)
        model.save_pretrained(paths[name])
    base = AutoModelForCausalLM.from_pretrained(paths["base"])
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "lm_head"])
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(paths["lora"])
    for folder in paths.values():
        tokenizer.save_pretrained(folder)
    write_summary(paths["lora"], "base", str(paths["base"]), "lora")
    write_summary(paths["full"], "start", str(paths["base"]), "full")
    return paths


@pytest.fixture
def compare(fastdpo: Compare) -> Compare:
    return partial(fastdpo, "compare")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{QUESTION}\n\n  Name a fruit.\n")
    return path


def load(folders: dict[str, Path], name: str) -> Any:
    if name != "lora":
        return AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    return PeftModel.from_pretrained(load(folders, "base"), folders["lora"]).eval()


def ids_of(folders: dict[str, Path], text: str = QUESTION) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["base"])
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def greedy(model: Any, ids: list[int], tokens: int, eos: int) -> list[int]:
    """The argmax of the model's own logits, token by token."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < tokens and (not answer or answer[-1] != eos):
            answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


def logp(model: Any, ids: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0].double()
    rows = logits.log_softmax(-1)[len(ids) - 1 : -1]
    return float(rows.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("run", ["lora", "full"])
def test_answers_and_rewards_are_the_models_own(
    compare: Compare, folders: dict[str, Path], prompts: Path, tmp_path: Path, run: str
):
    out = tmp_path / "answers.json"
    code, text, err = compare(folders[run], "--prompts", prompts, "--max-new-tokens", 8, "--out", out)
    assert code == 0, err
    result = json.loads(out.read_text())
    assert [row["prompt"] for row in result["answers"]] == [QUESTION, "Name a fruit."]
    assert result["beta"] == BETA
    assert str(folders["base"]) in result["reference"]
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    policy, reference, ids = load(folders, run), load(folders, "base"), ids_of(folders)
    for side, model in (("policy", policy), ("reference", reference)):
        answer = greedy(model, ids, 8, tokenizer.eos_token_id)
        answered = result["answers"][0][side]
        assert answered["text"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert (answered["tokens"], answered["finished"]) == (len(answer), answer[-1] == tokenizer.eos_token_id)
        expected = BETA * (logp(policy, ids, answer) - logp(reference, ids, answer))
        assert abs(expected) > 0.01
        assert answered["reward"] == pytest.approx(expected, abs=1e-4)
    summary = result["summary"]
    rewards = [row["policy"]["reward"] for row in result["answers"]]
    assert summary["mean_reward"]["policy"] == pytest.approx(sum(rewards) / 2)
    assert summary["prompts"] == 2
    assert f"1. {QUESTION}\n" in text
    first = result["answers"][0]
    assert f"reference: reward {first['reference']['reward']:+.4f}, " in text
    assert f"| policy: reward {first['policy']['reward']:+.4f}, " in text
    assert text.endswith(f"written: {out}\n")


def test_a_reference_and_a_beta_that_are_given_win(compare: Compare, folders: dict[str, Path], prompts: Path):
    arguments = (folders["lora"], "--prompts", prompts, "--max_new_tokens", 4, "--json")
    code, text, err = compare(*arguments, "--ref_model", folders["full"], "--beta", 1)
    assert code == 0, err
    result = json.loads(text)
    assert (result["reference"], result["beta"]) == (str(folders["full"]), 1.0)
    ids = ids_of(folders)
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    policy, reference = load(folders, "lora"), load(folders, "full")
    answer = greedy(reference, ids, 4, tokenizer.eos_token_id)
    expected = logp(policy, ids, answer) - logp(reference, ids, answer)
    assert result["answers"][0]["reference"]["reward"] == pytest.approx(expected, abs=1e-4)
    # a model is its own reference's equal
    code, text, err = compare(folders["full"], *arguments[1:], "--ref_model", folders["full"])
    assert code == 0, err
    result = json.loads(text)
    assert result["summary"]["same_answer"] == 2
    assert [row["policy"]["reward"] for row in result["answers"]] == [0.0, 0.0]


def test_sampling_follows_the_seed(compare: Compare, folders: dict[str, Path], prompts: Path):
    def answers(seed: int) -> list[str]:
        options = ("--max_new_tokens", 8, "--temperature", 1.2, "--seed", seed, "--json")
        code, text, err = compare(folders["lora"], "--prompts", prompts, *options)
        assert code == 0, err
        return [row["policy"]["text"] for row in json.loads(text)["answers"]]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_messages_raw_text_and_markdown(compare: Compare, folders: dict[str, Path], tmp_path: Path):
    rows = [
        {"prompt": [{"role": "user", "content": QUESTION}]},
        {"prompt": QUESTION},
        {"prompt": "Name a | fruit.\nOr two <b>."},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (folders["lora"], "--prompts", file, "--max_new_tokens", 4)
    out = tmp_path / "answers.md"
    code, text, err = compare(*arguments, "--json", "--out", out)
    assert code == 0, err
    chat = json.loads(text)["answers"]
    assert chat[0]["policy"] == chat[1]["policy"]
    lines = out.read_text().splitlines()
    assert lines[0] == "| prompt | reference | reward | policy | reward |"
    assert lines[2].startswith(f"| user: {QUESTION} | ")
    assert lines[4].startswith("| Name a \\| fruit.<br>Or two &lt;b&gt;. | ")
    code, text, err = compare(*arguments, "--json", "--raw")
    raw = json.loads(text)["answers"]
    assert raw[0]["policy"] == chat[0]["policy"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["base"])
    answer = greedy(load(folders, "lora"), tokenizer(QUESTION)["input_ids"], 4, tokenizer.eos_token_id)
    assert raw[1]["policy"]["text"] == tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("is_adapter", "reference", "path", "said"),
    [
        (True, {}, None, ""),
        (True, {"kind": "base"}, None, ""),
        (True, {"kind": "base", "precomputed": "/x"}, None, ""),
        (True, {"kind": "model", "path": "sft/model"}, "sft/model", ""),
        (True, {"kind": "model", "path": "m", "precomputed": "/a from b"}, "m", ""),
        (True, {"kind": "adapter", "name": "r", "description": "the adapter 'r'"}, None, "was the adapter 'r', which"),
        (True, {"kind": "start", "description": "the start"}, None, "was the start, which is not kept"),
        (True, {"kind": "model"}, None, "which is not kept"),
        (True, {"kind": "none", "description": "none"}, None, "was none, which is not kept"),
        (False, {"kind": "start"}, "start", ""),
        (False, {"kind": "start", "synced": True, "description": "a copy"}, "start", "was a copy, which is not kept"),
        (False, {"kind": "model", "path": "m", "synced": True}, "m", "moved"),
    ],
)
def test_the_reference_is_the_runs_or_a_line_says_so(
    caplog: pytest.LogCaptureFixture, is_adapter: bool, reference: dict[str, Any], path: str | None, said: str
):
    run = SavedRun("run", is_adapter, "start", 0.1, reference)
    assert reference_path(run) == path
    assert (said in caplog.text) if said else not caplog.text
    assert reference_path(run, "other") == "other"


def test_a_run_without_a_summary(folders: dict[str, Path], tmp_path: Path):
    copy = tmp_path / "copy"
    load(folders, "lora").save_pretrained(copy)
    run = read_run(str(copy))
    assert run == SavedRun(str(copy), True, str(folders["base"]), None, {})
    assert load_contestants(run).reference == f"{folders['base']}, the adapter switched off"


def test_columns_fit_the_terminal():
    lines = _wrap("one two three four\n\n" + "\u4f60\u597d" * 8, 10)
    assert lines[:3] == ["one two", "three four", ""]
    assert [len(line) for line in lines[3:]] == [5, 5, 5, 1]
    assert "".join(lines[3:]) == "\u4f60\u597d" * 8
    assert {_width(_pad(line, 10)) for line in lines} == {10}


def test_wrong_input_is_one_sentence(compare: Compare, folders: dict[str, Path], prompts: Path, tmp_path: Path):
    lora, full = folders["lora"], folders["full"]

    def write(name: str, content: str) -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    empty = tmp_path / "empty"
    empty.mkdir()
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(full).save_pretrained(bare)
    bad = write("bad.jsonl", '{"prompt": "a"}\n{"question": "b"}\n')
    for arguments, sentence in (
        ([], "RUN is missing"),
        ([lora], "--prompts is missing"),
        ([tmp_path / "none", "--prompts", prompts], "none does not exist"),
        ([empty, "--prompts", prompts], "holds neither a model (config.json) nor an adapter"),
        ([bare, "--prompts", prompts], "has no dpo_metrics/summary.json that says beta; give --beta"),
        ([bare, "--prompts", prompts, "--beta", 1], "that says which model was trained; give the ref_model"),
        ([bare, "--prompts", prompts, "--beta", 1, "--ref_model", full], "there is no tokenizer in"),
        ([lora, "--prompts", tmp_path / "no.txt"], "no.txt cannot be read: No such file"),
        ([lora, "--prompts", write("blank.txt", "\n \n")], "blank.txt are empty; wanted one prompt a line"),
        ([lora, "--prompts", bad], 'bad.jsonl:2: wanted an object with a "prompt"'),
        ([lora, "--prompts", write("half.jsonl", "{")], "half.jsonl:1 is not JSON"),
        ([lora, "--prompts", write("role.jsonl", '{"prompt": [{"text": "a"}]}')], "role.jsonl:1: `prompt[0]` is not"),
        ([lora, "--prompts", prompts, "--ref_model", tmp_path / "gone"], "gone cannot be loaded"),
        ([lora, "--prompts", prompts, "--base", tmp_path / "gone"], "gone does not exist"),
        ([lora, "--prompts", prompts, "--beta", 0], "--beta: should be a number above 0, got '0'"),
        ([lora, "--prompts", prompts, "--temperature", -1], "--temperature: should be a number of 0 or more"),
        ([lora, "--prompts", prompts, "--temperature", "hot"], "--temperature: should be a number of 0 or more"),
        ([lora, "--prompts", prompts, "--max_new_tokens", 0], "--max_new_tokens: should be a whole number of 1 or"),
        ([lora, "--prompts", prompts, "--out", "x.html"], "--out should be a file that ends in .json or .md"),
        ([lora, "--prompt", prompts], "there is no argument '--prompt': did you mean '--prompts'?"),
    ):
        code, text, err = compare(*arguments)
        assert (code, text) == (2, ""), err
        assert sentence in err, err
        assert "Traceback" not in err
        assert err.strip().splitlines()[-1].startswith("fastdpo compare: error: ")
