"""What the mistakes are made with: a tiny model, its adapter, pairs, a finished run; and one command run on copies.

Models are imported in the fixtures: a conftest.py is read before Triton's interpreter is switched on.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli import COMMANDS, main

PAIRS = [
    {"prompt": "What is two plus two?", "chosen": " Four.", "rejected": " Five, I think."},
    {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Monday."},
]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `adapter` (of it), an `other` model (wider, with more tokens), `pairs.jsonl`, `saved` (the
    same, one split) and `run` (LoRA, two steps)."""
    import torch
    from datasets import Dataset, DatasetDict
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("workshop")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({"</s>": 0, **{letter: i for i, letter in enumerate(letters, start=1)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue] untyped setter
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue] as above
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    own = {"model": {"vocab_size": len(tokenizer)}, "other": {"vocab_size": 300, "hidden_size": 32}}
    for name in own:
        config = LlamaConfig(eos_token_id=0, bos_token_id=None, **{**sizes, **own[name]})
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "adapter")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "model"), lora)
    adapted.save_pretrained(str(folder / "adapter"))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    DatasetDict({"train": Dataset.from_list(PAIRS)}).save_to_disk(folder / "saved")
    options = "--max_steps 2 --save_steps 1 --logging_steps 1 --use_peft --lora_r 2"
    command = f"train -m {folder}/model -d {folder}/pairs.jsonl --output_dir {folder}/run {options}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(command.split()) == 0
    return folder


def write(path: Path, content: Any) -> None:
    """Text as it is, a list as one row per line (texts as they are), an object as JSON, None as a folder."""
    if content is None:
        path.mkdir(parents=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content)
    elif isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    """What is left of a file whose copy was broken off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@contextlib.contextmanager
def disk(free: int | None = None, largest_file: int | None = None) -> Iterator[None]:
    """A disk with `free` bytes left, as far as anybody asks it; one where no file gets larger than `largest_file`."""
    resource = pytest.importorskip("resource", reason="limits on file sizes are Unix's")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        if free is not None:
            usage = shutil.disk_usage("/")._replace(free=free)
            patch.setattr(shutil, "disk_usage", lambda path: usage)
        if largest_file is not None:
            # a write past the limit fails, as on a full disk: python ignores the signal
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limit[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@contextlib.contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Seconds of a processor, this process's and its children's: a machine that is busy elsewhere does not count."""
    before = sum(os.times()[:4])
    yield
    assert seconds is None or sum(os.times()[:4]) - before < seconds


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def answer(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """answer(mistake): make the mistake, and check exit code, last sentence and what is left on the disk.

    A mistake (a row of a table) has `run`, `says`, and where needed `code` (2), `copies` of what is in the workshop,
    `files`, `links`, `edits` of JSON files, files that are `removed` or `cut`, the `disk`, what it `leaves`, and the
    `seconds` that the answer may take.
    """
    here, hidden = tmp_path / "here", tmp_path / "hidden"
    for folder in (here, hidden / "temporary"):
        folder.mkdir(parents=True)
    # whatever is written where nobody looks would be left there
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(hidden / "temporary"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    places = {name: str(workshop / name) for name in ("model", "adapter", "other", "saved", "run", "pairs.jsonl")}
    places |= {"here": str(here), "out": str(here / "out"), "pairs": places["pairs.jsonl"]}
    places |= {"deep": "[" * 100_000 + "]" * 100_000, "deep yaml": "[" * 5000 + "]" * 5000}
    places["train"] = "train -m {model} -d {pairs} --output_dir {out} --max_steps 1".format(**places)

    def fill(text: Any) -> Any:
        if isinstance(text, str):
            return re.sub(r"\{([\w ]+)\}", lambda found: places.get(found[1], found[0]), text)
        return [fill(item) for item in text] if isinstance(text, list) else text

    def check(mistake: dict[str, Any]) -> None:
        for name, source in mistake.get("copies", {}).items():
            copy = shutil.copytree if Path(places[source]).is_dir() else shutil.copyfile
            copy(places[source], here / name)
        for name, content in mistake.get("files", {}).items():
            write(here / name, fill(content))
        for name, changes in mistake.get("edits", {}).items():
            edit(here / name, {key: fill(value) for key, value in changes.items()})
        for name in mistake.get("cut", ()):
            cut(here / name)
        for name in mistake.get("removed", ()):
            (here / name).unlink()
        for name, target in mistake.get("links", {}).items():
            (here / name).symlink_to(target)
        before, command = tree(here), shlex.split(fill(mistake["run"]))
        capsys.readouterr()
        with disk(**mistake.get("disk", {})), at_most(mistake.get("seconds")):
            code = main(command)
        out, err = capsys.readouterr()
        assert code == mistake.get("code", 2), err
        assert out == ""
        assert "Traceback" not in err
        pattern = re.escape(beginning(mistake) + fill(mistake["says"])).replace(re.escape("{any}"), "[^\n]+")
        assert re.search(rf"(?:^|\n){pattern}\n$", err), err
        after = tree(here)
        left = set(mistake.get("leaves", ()))
        # an output folder may have been made; it is empty
        made = {name for name in after if name not in before and (name not in ("out", "output") or after[name])}
        assert made == left
        assert {name: after.get(name) for name in before} == before
        assert tree(hidden) == {"temporary": None}

    return check


def beginning(mistake: dict[str, Any]) -> str:
    """What a command's last line begins with."""
    command = mistake["run"].split()[0].strip("{}")
    name = f"fastdpo {command}" if command in COMMANDS else "fastdpo"
    return f"{name}: {'failed' if mistake.get('code') == 1 else 'error'}: "
