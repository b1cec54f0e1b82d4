"""Several datasets as one: TRL's `datasets` list, shares, samples, columns, what is split off, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli.train.data import dataset_names, load_data
from fastdpo.cli.train.parsing import UsageError, parse
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.data.errors import DataError
from fastdpo.data.formats import load_preferences
from fastdpo.data.mixtures import DatasetSpec, load_mixture, names_of, parse_mixture, split_off, stream_mixture
from fastdpo.data.rows.messages import for_template


def pair(name: str) -> dict[str, Any]:
    return {"prompt": f"q{name}", "chosen": f"good {name}", "rejected": f"bad {name}"}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.jsonl has 10 pairs, b.jsonl 4, chat.jsonl one of messages."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [pair(f"a{n}") for n in range(10)])
    write(tmp_path / "b.jsonl", [pair(f"b{n}") for n in range(4)])
    said = {role: [{"role": role, "content": role}] for role in ("user", "assistant")}
    chat = {"prompt": said["user"], "chosen": said["assistant"], "rejected": [{"role": "assistant", "content": "no"}]}
    write(tmp_path / "chat.jsonl", [chat])
    return tmp_path


def prompts(dataset: Any) -> list[str]:
    return list(dataset["prompt"])


def load(*specs: dict[str, Any], **options: Any) -> list[str]:
    return prompts(load_mixture(parse_mixture(list(specs)), **options))


@pytest.mark.parametrize("shares", [(None, None), (0.5, 0.5), (3, 1), (0.9, 0.1), (2, 8)], ids=str)
def test_a_mixture_is_trl_s(folder, tmp_path_factory, monkeypatch, shares):
    trl = pytest.importorskip("trl")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    items = [
        {"path": "json", "data_files": name, "columns": ["prompt", "chosen", "rejected"], "fraction": share}
        for name, share in zip(("a.jsonl", "b.jsonl"), shares, strict=True)
    ]
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=[dict(item) for item in items]))["train"]
    assert load(*items) == prompts(theirs)
    plain = [{"path": name, "fraction": share} for name, share in zip(("a.jsonl", "b.jsonl"), shares, strict=True)]
    assert load(*plain) == prompts(theirs)


def test_data_files_and_data_dir(folder):
    (folder / "parts" / "deep").mkdir(parents=True)
    write(folder / "parts" / "x.jsonl", [pair("x")])
    write(folder / "parts" / "deep" / "y.json", [pair("y")])
    assert load({"path": "json", "data_dir": "parts"}) == ["qx"]
    assert load({"path": "json", "data_files": "parts/**/*.json*"}) == ["qy", "qx"]
    assert load({"path": "json", "data_files": ["parts/x.jsonl", "parts/deep/y.json"]}) == ["qx", "qy"]
    assert load({"path": "parts", "data_files": "x.jsonl"}) == ["qx"]
    assert load({"path": "parts", "data_dir": "deep", "data_files": "y.json"}) == ["qy"]
    splits = {"train": "parts/x.jsonl", "dev": "parts/deep/y.json"}
    assert load({"path": "json", "data_files": splits, "split": "dev"}) == ["qy"]


def test_columns_select_or_rename(folder):
    rows = [{"question": "why?", "good": "so", "bad": "no", "prompt": "not this", "system": "lost"}]
    write(folder / "named.jsonl", rows)
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    with pytest.raises(DataError, match=r"named\.jsonl:1: `system` would be lost beside a text `prompt`"):
        load({"path": "named.jsonl", "columns": columns})
    del rows[0]["system"]
    write(folder / "named.jsonl", rows)
    assert load_preferences("named.jsonl", columns=columns).to_list() == [
        {"prompt": "why?", "chosen": "so", "rejected": "no"}
    ]
    assert DatasetSpec("json", data_files=["a", "b"]).label == "a, b"
    assert DatasetSpec("json", data_files={"train": "a", "dev": "b"}, split="dev").label == "b"
    # a list, as TRL's, selects: without prompt there is none
    with pytest.raises(DataError, match=r"a\.jsonl: none of the 10 rows can be used; each: no `prompt`"):
        load({"path": "a.jsonl", "columns": ["chosen", "rejected"]})
    with pytest.raises(DataError, match=r"each: has no column `answer`, which columns names; found `prompt`, `chosen`"):
        load({"path": "b.jsonl", "columns": {"chosen": "answer"}})


def test_samples_of_each_dataset(folder):
    both = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    assert load(*both, max_samples=3) == ["qa0", "qa1", "qa2", "qb0", "qb1", "qb2"]
    assert len(load(*both, max_samples=7)) == 11
    drawn = load(*both, data_scale_rate=0.5, seed=1)
    assert [name[1] for name in drawn] == ["a"] * 5 + ["b"] * 2
    assert len(set(drawn)) == 7
    assert drawn == load(*both, data_scale_rate=0.5, seed=1) != load(*both, data_scale_rate=0.5, seed=2)
    assert load(*both, data_scale_rate=0.5, max_samples=1, seed=1) == [drawn[0], drawn[5]]


def test_a_rate_is_a_share_of_one_datasets_rows(folder):
    drawn = load({"path": "a.jsonl", "rate": 0.5}, {"path": "b.jsonl"}, seed=1)
    assert [name[1] for name in drawn] == ["a"] * 5 + ["b"] * 4
    assert drawn[:5] == load({"path": "a.jsonl"}, data_scale_rate=0.5, seed=1)
    assert load({"path": "a.jsonl", "rate": 0.5}, data_scale_rate=0.5, seed=1) == drawn[:2]
    with pytest.raises(DataError, match=r"b\.jsonl: rate 0\.2 of 4 rows is none"):
        load({"path": "b.jsonl", "rate": 0.2})
    with pytest.raises(DataError, match=r"b\.jsonl: rate needs all of the rows, and a stream has none yet"):
        stream_mixture(parse_mixture([{"path": "b.jsonl", "rate": 0.5}]))


def test_a_column_may_have_one_of_several_names(folder):
    write(folder / "two.jsonl", [{"prompt": "q1", "yes": "a", "no": "b"}, {"prompt": "q2", "good": "a", "no": "b"}])
    columns = {"chosen": ["yes", "good"], "rejected": "no"}
    assert load({"path": "two.jsonl", "columns": columns}) == ["q1", "q2"]
    with pytest.raises(DataError, match=r"has no column `fine` or `nice`, which columns names; found `prompt`"):
        load({"path": "two.jsonl", "columns": {**columns, "chosen": ["fine", "nice"]}})


def test_datasets_whose_messages_have_other_keys(folder):
    row = json.loads((folder / "chat.jsonl").read_text())
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    row["chosen"][0] |= {"content": "", "tool_calls": [call]}
    write(folder / "tools.jsonl", [{**row, "tools": [{"type": "function", "function": {"name": "f"}}]}])
    mixed = load_mixture([DatasetSpec("chat.jsonl"), DatasetSpec("tools.jsonl")])
    assert mixed.column_names == ["prompt", "chosen", "rejected", "tools"]
    assert mixed[0]["tools"] is None
    assert json.loads(mixed[1]["tools"])[0]["function"]["name"] == "f"
    assert for_template(mixed[1]["chosen"])[0]["tool_calls"][0]["function"]["name"] == "f"


def test_llama_factory_s_num_samples(folder):
    entry = {"file_name": "b.jsonl", "ranking": True, "columns": {"prompt": "prompt"}}
    for rows in (2, 6):
        (folder / "dataset_info.json").write_text(json.dumps({"some": {**entry, "num_samples": rows}}))
        names = [row["prompt"][0]["content"] for row in load_preferences("some", dataset_dir=".")]
        assert len(names) == rows
        assert len(set(names)) == min(rows, 4)


def test_split_off(folder):
    whole = load_preferences("a.jsonl")
    for size, rows in ((0.25, 3), (3, 3), (3.0, 3), (1, 1)):
        train, test = split_off(whole, size, seed=7)
        assert (len(train), len(test)) == (10 - rows, rows)
        assert sorted(prompts(train) + prompts(test)) == sorted(prompts(whole))
        theirs = whole.train_test_split(test_size=int(size) if size >= 1 else size, seed=7)
        assert prompts(test) == prompts(theirs["test"])
    for size, said in ((0, "got 0"), (-1, "got -1"), (2.5, "got 2.5"), (10, "10 is 10 rows of 10, which leaves none")):
        with pytest.raises(DataError, match=said):
            split_off(whole, size)


def test_one_argument_may_name_several(folder):
    assert names_of("a.jsonl, b.jsonl") == ["a.jsonl", "b.jsonl"]
    write(folder / "a,b.jsonl", [pair("c")])
    assert names_of("a,b.jsonl") == ["a,b.jsonl"]
    with pytest.raises(DataError, match="leave out the comma too many"):
        names_of("a.jsonl,")


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "datasets should be a list of datasets, each with a `path`, got []"),
        (["a.jsonl"], "datasets[0] is str; wanted keys path, name"),
        ([{"name": "x"}], "datasets[0] has no `path`."),
        (
            [{"path": "a.jsonl"}, {"path": "b.jsonl", "fractoin": 1}],
            "datasets[1] has the unknown key `fractoin`; did you",
        ),
        ([{"path": "a.jsonl", "zzz": 1}], "datasets[0] has the unknown key `zzz`; wanted path, name"),
        ([{"path": 3}], "datasets[0]: path is int; wanted text."),
        ([{"path": "json", "data_files": 3}], "datasets[0]: data_files is 3; wanted a file"),
        ([{"path": "a.jsonl", "columns": "prompt"}], "datasets[0]: columns is 'prompt'; wanted a list of names"),
        ([{"path": "a.jsonl", "fraction": 0}], "datasets[0]: fraction is 0; wanted a number above 0."),
        ([{"path": "a.jsonl", "rate": 1.5}], "datasets[0]: rate is 1.5; wanted a share in (0, 1]."),
        ([{"path": "a.jsonl", "columns": {"prompt": [3]}}], "datasets[0]: columns is {'prompt': [3]}; wanted a list"),
        ([{"path": "a.jsonl", "fraction": 1}, {"path": "b.jsonl"}], "b.jsonl has no fraction, and other datasets have"),
        (
            [{"path": "a.jsonl", "fraction": 99}, {"path": "b.jsonl", "fraction": 1}][::-1],
            "b.jsonl: its fraction of the",
        ),
        ([{"path": "json"}], "`path: json` reads files of that type: give their names as data_files, or a data_dir."),
        ([{"path": "json", "data_files": "c.jsonl"}], "c.jsonl does not exist."),
        ([{"path": "json", "data_files": "c*.json"}], "json: no file in . matches c*.json."),
        ([{"path": "csv", "data_files": "a.jsonl"}], "a.jsonl is not of the type that `path` names; wanted .csv."),
        ([{"path": "json", "data_dir": "none"}], "json: the data_dir none does not exist."),
        ([{"path": "json", "data_files": {"dev": "a.jsonl"}}], "json: data_files has no split 'train'; it has dev."),
        ([{"path": "a.jsonl"}, {"path": "chat.jsonl"}], "a.jsonl has rows of plain text and chat.jsonl of messages"),
    ],
)
def test_mixtures_that_cannot_be_used(folder, items, said):
    with pytest.raises(DataError) as caught:
        load(*items)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_scale_rate": 0}, r"data_scale_rate should be a share in \(0, 1\], got 0"),
        ({"data_scale_rate": 1.5}, r"got 1\.5"),
        ({"data_scale_rate": 0.2}, r"b\.jsonl: data_scale_rate 0\.2 of 4 rows is none"),
        ({"max_samples": 0}, "max_samples should be at least 1, got 0"),
    ],
)
def test_samples_that_leave_nothing(folder, options, said):
    with pytest.raises(DataError, match=said):
        load({"path": "b.jsonl"}, **options)


def test_a_bad_row_is_named_by_its_own_file(folder):
    write(folder / "bad.jsonl", [pair("x"), {"prompt": "q", "chosen": "c"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: missing column `rejected`"):
        load({"path": "a.jsonl"}, {"path": "bad.jsonl"})
    assert load({"path": "bad.jsonl"}, skip_bad_rows=True) == ["qx"]


def command_data(tmp_path: Path, *arguments: str) -> Any:
    """What `fastdpo train` with these arguments trains and evaluates on."""
    from fastdpo.cli.train.command import DEFAULTS

    request = parse(["-m", "model", *arguments])
    option = {**DEFAULTS, **request.values}
    own = {name: option[name] for name in ("eval_strategy", "do_eval", "seed")}
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, **own)
    return load_data(option, args)


def test_the_command_s_data(folder, tmp_path, capsys):
    train, test = command_data(
        tmp_path, "-d", "a.jsonl,b.jsonl", "--test_split_size", "0.5", "--eval_strategy", "steps"
    )
    assert test is not None
    assert (len(train), len(test)) == (7, 7)
    train, test = command_data(tmp_path, "-d", "a.jsonl", "--test_split_size", "2")
    assert (len(train), test) == (8, None)
    assert "eval: the 2 pairs split off by test_split_size are not used" in capsys.readouterr().err
    _, test = command_data(tmp_path, "-d", "a.jsonl", "--test_split_size", "2", "--do_eval")
    assert test is not None
    assert len(test) == 2
    train, test = command_data(
        tmp_path, "-d", "a.jsonl", "--eval_dataset_name", "b.jsonl,b.jsonl", "--max_samples", "3"
    )
    assert test is not None
    assert (len(train), len(test)) == (3, 6)
    train, test = command_data(tmp_path, "-d", "a.jsonl", "--data_scale_rate", "0.3", "--eval_dataset_name", "b.jsonl")
    assert test is not None
    assert (len(train), len(test)) == (3, 4)
    (folder / "mix.yaml").write_text(
        "datasets:\n  - path: json\n    data_files: a.jsonl\n    fraction: 0.2\n  - path: b.jsonl\n    fraction: 0.8\n"
    )
    train, _ = command_data(tmp_path, "--config", "mix.yaml", "-d", "chat.jsonl")
    assert prompts(train) == ["qa0", "qb0", "qb1", "qb2", "qb3"]
    assert "dataset_name chat.jsonl is not used, since `datasets` is given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-d", "a.jsonl", "--streaming"], "dataset_streaming needs max_steps"),
        (
            ["-d", "a.jsonl", "--test_split_size", "2", "--eval_dataset_name", "b.jsonl"],
            "both name pairs to evaluate on",
        ),
        (["-d", "a.jsonl", "--eval_strategy", "steps"], "there are no pairs to evaluate on"),
        (
            ["--datasets", '[{"path": "a.jsonl"}]', "--eval_strategy", "steps"],
            "`datasets` names training pairs. Give --test_split_size",
        ),
    ],
)
def test_the_command_refuses(folder, tmp_path, arguments, said):
    with pytest.raises(UsageError) as caught:
        command_data(tmp_path, *arguments)
    assert said in str(caught.value)


def test_names_for_reports():
    items = [{"path": "json", "data_files": ["a.jsonl"]}, {"path": "hub/name"}]
    assert dataset_names({"datasets": items, "dataset_name": None}) == ["a.jsonl", "hub/name"]
    assert dataset_names({"datasets": None, "dataset_name": "a, b"}) == ["a", "b"]


def test_real_pairs_of_two_kinds_of_file(shared_data, folder):
    real = str(shared_data / "dpo_en_demo.json")
    mixed = load_mixture([DatasetSpec(real, fraction=0.9), DatasetSpec("chat.jsonl", fraction=0.1)])
    assert len(mixed) == 10
    assert prompts(mixed)[:9] == prompts(load_preferences(real))[:9]
