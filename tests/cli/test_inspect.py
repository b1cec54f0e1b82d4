"""`fastdpo inspect`: counts and lengths as training has them, special tokens that are wrong, one picture."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from fastdpo.data.formats import load_preferences
from fastdpo.data.tokenize_dataset import tokenize_dataset

ROOT = Path(__file__).resolve().parents[2]
TEXT = [
    {"prompt": "What is two plus two?", "chosen": " Four.", "rejected": " Five, I think."},
    {"prompt": "What is two plus two?", "chosen": " Four.", "rejected": " Five, I think."},
    {"prompt": "Name a colour.", "chosen": " Red.", "rejected": " Red."},
    {"prompt": "Tell me a long story about a fox. " * 9, "chosen": " Once there was a fox.", "rejected": " No."},
]
Inspect = Callable[..., tuple[int, str, str]]


def chat(*answers: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": "Hello?"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for chosen, rejected in answers
    ]


@pytest.fixture(scope="module")
def tokenizer_dir(shared_data: Path) -> Path:
    return shared_data / "minimind_tokenizer"


@pytest.fixture
def inspect(fastdpo: Inspect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    monkeypatch.chdir(tmp_path)
    return partial(fastdpo, "inspect")


def test_the_help_of_every_small_command_is_grouped_and_imports_no_torch():
    code = (
        "import sys\nfrom importlib import import_module\n"
        "for name in ('inspect', 'merge', 'report', 'compare'):\n"
        "    assert import_module(f'fastdpo.cli.{name}').main(['--help']) == 0\n"
        "    assert import_module(f'fastdpo.cli.{name}').main(['--zzz']) == 2\n"
        "sys.exit(str({'torch', 'transformers', 'datasets', 'peft', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr.splitlines()[-1] == "set()", done.stderr
    assert "--zzz': see fastdpo inspect --help" in done.stderr
    for line in ("command:", "data:", "truncation:", "output:", "model:", "runs:", "models:", "generation:"):
        assert f"\n{line}\n" in done.stdout


def test_counts_and_lengths(inspect: Inspect, write: Callable[..., str], tokenizer_dir: Path):
    data = write("pairs.jsonl", *TEXT)
    code, text, err = inspect(data, "-m", tokenizer_dir, "--json", "--row", 1)
    assert code == 0, err
    report = json.loads(text)
    assert (report["rows"], report["identical"], report["duplicated"], report["distinct_prompts"]) == (4, 1, 1, 3)
    assert report["kind"] == "text"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompts, chosen, rejected = (
        [len(tokenizer(row[part])["input_ids"]) for row in TEXT] for part in ("prompt", "chosen", "rejected")
    )
    assert report["lengths"]["prompt"]["max"] == max(prompts)
    assert report["lengths"]["chosen"]["min"] == min(chosen) + 1  # EOS
    longer = [p + max(c, r) + 1 for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    assert report["lengths"]["longer sequence"]["max"] == max(longer)
    assert report["chosen_longer"] == sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 4
    assert "What is two plus two?" in report["example"]["text"]
    assert ">>> Five, I think.<|im_end|><<<" in report["example"]["text"]
    assert report["findings"] == []


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_the_table_is_what_training_reports(
    inspect: Inspect, write: Callable[..., str], tokenizer_dir: Path, mode: str
):
    data = write("pairs.jsonl", *TEXT)
    lengths = (10, 30, 1000)
    code, text, err = inspect(data, "-m", tokenizer_dir, "--max_length", *lengths, "--truncation-mode", mode, "--json")
    assert code == 0, err
    rows, tokenizer = load_preferences(data), AutoTokenizer.from_pretrained(tokenizer_dir)
    table = json.loads(text)["truncation"]
    for length, row in zip(lengths, table, strict=True):
        trained, report = tokenize_dataset(rows, tokenizer, max_length=length, truncation_mode=mode)
        assert row["rows"] == len(trained)
        counts = ("truncated_chosen", "truncated_rejected", "dropped_long_prompt", "dropped_unscored")
        assert {name: row[name] for name in counts} == {name: getattr(report, name) for name in counts}
    assert table[0]["truncated_chosen"] + table[0]["dropped_long_prompt"] > 0


def test_a_max_length_that_leaves_nothing_is_an_answer(
    inspect: Inspect, write: Callable[..., str], tokenizer_dir: Path
):
    code, text, err = inspect(write("pairs.jsonl", *TEXT), "-m", tokenizer_dir, "--max_length", 2, "--json")
    assert code == 0, err
    (cut,) = json.loads(text)["truncation"]
    assert (cut["rows"], cut["dropped_long_prompt"]) == (0, 4)


def test_what_is_too_long_and_what_is_scored(inspect: Inspect, write: Callable[..., str], tokenizer_dir: Path):
    data = write("pairs.jsonl", *TEXT)
    for how in ("truncate", "drop", "error"):
        code, text, err = inspect(data, "-m", tokenizer_dir, "--max_length", 14, 1000, "--on_overlong", how, "--json")
        assert code == 0, err
        short, whole = json.loads(text)["truncation"]
        assert (short["overlong"], whole["overlong"]) == (3, 0)
        assert short["dropped_overlong"] == (3 if how == "drop" else 0)
        assert short["rows"] + short["dropped_long_prompt"] + short["dropped_overlong"] == 4
    _, text, _ = inspect(data, "-m", tokenizer_dir, "--max_length", 14, "--on_overlong", "error")
    assert "on_overlong error: training would stop at the pairs that are longer" in text
    turns = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    answers = [[*turns, {"role": "assistant", "content": content}] for content in ("yes", "no")]
    data = write("minimind.jsonl", {"chosen": answers[0], "rejected": answers[1]})
    code, text, err = inspect(data, "-m", tokenizer_dir, "--scored_turns", "all")
    assert code == 0, err
    header = "<|im_start|>user\\nc<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n"
    assert f">>>b<|im_end|>\\n<<<{header}>>>yes<|im_end|>\\n<<<" in text
    assert f">>>b<|im_end|>\\n<<<{header}>>>no<|im_end|>\\n<<<" in text


def test_several_datasets(inspect: Inspect, write: Callable[..., str], tokenizer_dir: Path):
    one, two = write("pairs.jsonl", *TEXT), write("more.jsonl", *TEXT[:1])
    code, text, err = inspect(f"{one},{two}", "-m", tokenizer_dir, "--max_samples", 3, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert (report["name"], report["rows"], report["duplicated"]) == ("pairs.jsonl, more.jsonl", 4, 2)


def test_special_tokens_that_are_wrong_are_named(
    inspect: Inspect, write: Callable[..., str], tokenizer_dir: Path, tmp_path: Path
):
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_dir)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    data = write("pairs.jsonl", *chat(("Hi!", "Go away."), ("Good day.", "What?")))

    def findings(name: str, source: str) -> str:
        tokenizer.save_pretrained(tmp_path / name)
        code, text, err = inspect(source, "--model", tmp_path / name, "--json")
        assert code == 0, err
        return " ".join(json.loads(text)["findings"])

    turn = "{% for m in messages %}{{ m.role }}:{{ m.content }}END{% endfor %}"
    tokenizer.chat_template = turn.replace("END", "\n")
    said = findings("no_end", data)
    assert f"2 of 2 chosen and 2 of 2 rejected completions do not end with the EOS token {eos}" in said
    assert "ignores add_generation_prompt" in said
    tokenizer.chat_template = turn.replace("END", eos + eos) + "{% if add_generation_prompt %}assistant:{% endif %}"
    said = findings("two_ends", data)
    assert said == (
        f"2 of 2 chosen and 2 of 2 rejected completions end with the EOS token {eos} twice: take it out of the data or "
        "the template."
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    rows = [{**TEXT[0], "prompt": bos + "Hello?"}, TEXT[2]]
    said = findings("adds_bos", write("pairs.jsonl", *rows))
    assert f"1 of 2 prompts begin with {bos} twice" in said


def test_text_report_and_picture(inspect: Inspect, shared_data: Path, tokenizer_dir: Path, tmp_path: Path):
    data = shared_data / "dpo_en_demo.json"
    out = tmp_path / "deep" / "lengths.png"
    code, text, err = inspect(data, "-m", tokenizer_dir, "--max_length", 512, 2048, "--out", out)
    assert code == 0, err
    assert "dpo_en_demo.json: 300 pairs of messages" in text
    assert text.count(">>>") == text.count("<<<") == 3
    assert text.endswith(f"histogram: {out}\n")
    picture = matplotlib.image.imread(out)
    assert picture.shape[:2] == (450, 1100)
    assert picture[..., :3].std() > 0.1


def test_wrong_input_is_one_sentence(inspect: Inspect, write: Callable[..., str], tokenizer_dir: Path, tmp_path: Path):
    data = write("pairs.jsonl", *TEXT[:2])
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = write("bad.jsonl", {"prompt": "a", "chosen": "b"})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    for arguments, sentence in (
        ([], "DATA is missing"),
        ([data], "--model is missing"),
        ([data, "-m", data], "is a file; give the folder that holds its tokenizer"),
        ([data, "-m", tmp_path / "none"], "none does not exist"),
        ([data, "-m", empty], "empty holds no tokenizer"),
        ([data, "-m", broken], "broken has no tokenizer that can be read"),
        ([tmp_path / "no.jsonl", "-m", tokenizer_dir], "no.jsonl does not exist"),
        ([data, "-m", tokenizer_dir, "--row", 2], "--row 2 is not there"),
        ([data, "-m", tokenizer_dir, "--row", "x"], "--row: should be a whole number of 0 or more, got 'x'"),
        ([data, "-m", tokenizer_dir, "--max_length", 1], "--max_length: should be a whole number of 2 or more"),
        ([data, "-m", tokenizer_dir, "--truncation_mode", "middle"], "--truncation_mode: invalid choice: 'middle'"),
        ([data, "-m", tokenizer_dir, "--out", "x.pdf"], "--out should be a file that ends in .png, got x.pdf"),
        ([data, "-m", tokenizer_dir, "--max-lenght", 4], "did you mean '--max_length'?"),
    ):
        code, text, err = inspect(*arguments)
        assert (code, text) == (2, ""), err
        assert sentence in err, err
        assert len(err.strip().splitlines()) == 1, err
    code, text, err = inspect(bad, "-m", tokenizer_dir)
    assert (code, text) == (2, "")
    assert "bad.jsonl:1: missing column `rejected`" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.png"))


def test_rows_that_the_template_does_not_show_are_skipped_and_counted(
    inspect: Inspect, tmp_path: Path, tokenizer_dir: Path
) -> None:
    rows = chat(("Hi.", "No."), ("Yes.", "Off."), ("Good.", "Bad."))
    rows[1]["prompt"][0]["role"] = "human"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = inspect("pairs.jsonl", "-m", str(tokenizer_dir))
    assert code == 2
    assert "pairs.jsonl:2: `prompt[0].role` is 'human'" in err
    code, out, err = inspect("pairs.jsonl", "-m", str(tokenizer_dir), "--skip_bad_rows")
    assert code == 0, err
    assert "skipped 1 bad row of 3: pairs.jsonl:2:" in err
    assert "2 pairs of messages" in out
