"""A run that is killed and resumed logs what an undisturbed one logs; half-written checkpoints are never used."""

import csv
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastdpo.cli import main
from fastdpo.config.dpo_config import DPOConfig
from fastdpo.files import write_atomic
from fastdpo.training.checkpoints import folders as checkpoints
from fastdpo.training.checkpoints.content_hashes import MANIFEST
from fastdpo.training.trainer import DPOTrainer

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY = 61
STEPS = 12
# the first logged loss after a resume averages steps from before and after the checkpoint
OPTIONS: dict[str, Any] = {"max_steps": STEPS, "save_steps": 4, "logging_steps": 3}


class Killed(Exception):
    """Stands for a kill inside one process."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The model is too small for more: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(folder: Path, peft: bool = False, callbacks: Any = None, **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
            attention_dropout=0.1,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    generator = torch.Generator().manual_seed(1)

    def ids() -> list[int]:
        length = int(torch.randint(2, 9, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    rows = [{"prompt_ids": ids(), "chosen_ids": [*ids(), 0], "rejected_ids": [*ids(), 0]} for _ in range(18)]
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>", unk_token="w1"
    )
    args = DPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            # random numbers are drawn at every step, so that a wrong generator state shows
            "disable_dropout": False,
            "learning_rate": 1e-2,
            **OPTIONS,
            **options,
        }
    )
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return DPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=adapter if peft else None,
    )


def history(folder: Path, step: int = STEPS) -> list[dict[str, float]]:
    """The logged lines without what depends on the clock."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "loss" in line]
    return [{name: value for name, value in line.items() if not on_clock(name)} for line in lines]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    torch.set_num_threads(1)
    folders = {peft: tmp_path_factory.mktemp(f"undisturbed-{peft}") for peft in (False, True)}
    for peft, folder in folders.items():
        make(folder, peft).train()
    return folders


@pytest.mark.parametrize("peft", [False, True])
def test_resumed_run_logs_the_same(tmp_path: Path, undisturbed: dict[bool, Path], peft: bool) -> None:
    with pytest.raises(Killed):
        make(tmp_path, peft, [KillAt(11)]).train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    trainer = make(tmp_path, peft)
    output = trainer.train(resume_from_checkpoint=True)
    wanted = history(undisturbed[peft])
    assert [line["step"] for line in wanted] == [3, 6, 9, 12]
    assert history(tmp_path) == wanted
    assert len({line["loss"] for line in wanted}) == 4
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    resumed, whole = load_file(tmp_path / name), load_file(undisturbed[peft] / name)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    if not hasattr(trainer, "_initial_global_step"):
        return  # an older transformers divides by the steps of all calls
    # the mean over this call's steps, 9 to 12: not step 7 and 8, which the restored sum holds
    assert output.training_loss == pytest.approx(mean_of_steps(tmp_path.parent / "each", peft, 9), rel=1e-5)


def mean_of_steps(folder: Path, peft: bool, first: int) -> float:
    trainer = make(folder, peft, logging_steps=1, save_strategy="no")
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line][first - 1 :]
    return sum(losses) / len(losses)


def test_without_the_saved_sums_the_first_loss_would_be_wrong(
    tmp_path: Path, undisturbed: dict[bool, Path], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed[False] / "checkpoint-8", tmp_path / "checkpoint-8")
    for name in (checkpoints.STATE_NAME, MANIFEST):  # as another trainer writes it
        (tmp_path / "checkpoint-8" / name).unlink()
    make(tmp_path).train(resume_from_checkpoint=True)
    assert any("has no fastdpo_state.json" in line for line in caplog.messages)
    ours, wanted = history(tmp_path), history(undisturbed[False])
    assert ours[2]["loss"] != wanted[2]["loss"]
    assert ours[3]["loss"] == wanted[3]["loss"]


def test_kill_while_a_checkpoint_is_written(
    tmp_path: Path,
    undisturbed: dict[bool, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def die(self: DPOTrainer, folder: str) -> None:
        if self.state.global_step == 8:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "_save_scaler", die)
        with pytest.raises(Killed):
            make(tmp_path).train()
    # weights and optimizer are there already, the rest is not
    assert names(tmp_path) == ["_incomplete-checkpoint-8", "checkpoint-4"]
    assert (tmp_path / "_incomplete-checkpoint-8" / "checkpoint-8" / "model.safetensors").is_file()
    with caplog.at_level(logging.WARNING, logger="fastdpo"):
        make(tmp_path).train(resume_from_checkpoint=True)
    assert any("removed _incomplete-checkpoint-8" in line for line in caplog.messages)
    assert any(line.endswith("checkpoint-4.") and "going on from" in line for line in caplog.messages)
    assert history(tmp_path) == history(undisturbed[False])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("trainer_state.json", "remove", "trainer_state.json is missing"),
        ("trainer_state.json", "cut", "trainer_state.json is not readable"),
        ("model.safetensors", "remove", "the weights are missing"),
        ("model.safetensors", "cut", "model.safetensors is not readable"),
        ("optimizer.pt", "remove", "optimizer.pt is missing"),
        ("optimizer.pt", "cut", "optimizer.pt is not readable"),
        ("scheduler.pt", "cut", "scheduler.pt is not readable"),
        ("rng_state.pth", "remove", "rng_state.pth is missing"),
    ],
)
def test_incomplete_checkpoint_is_passed_over_and_named(
    tmp_path: Path,
    undisturbed: dict[bool, Path],
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
    reason: str,
) -> None:
    for step in (4, 8):
        shutil.copytree(undisturbed[False] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-8" / name
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = checkpoints.resolve_resume(True, tmp_path)
    assert found == str(tmp_path / "checkpoint-4")
    assert any(f"passed over {tmp_path / 'checkpoint-8'}: {reason}" in line for line in caplog.messages)
    with pytest.raises(ValueError, match=f"cannot resume from .*checkpoint-8: {reason}"):
        checkpoints.resolve_resume(str(tmp_path / "checkpoint-8"), tmp_path)


def test_training_goes_past_an_incomplete_checkpoint(tmp_path: Path, undisturbed: dict[bool, Path]) -> None:
    for step in (4, 8):
        shutil.copytree(undisturbed[False] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    # as transformers leaves it: weights, and no state
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    make(tmp_path).train(resume_from_checkpoint=True)
    assert history(tmp_path) == history(undisturbed[False])
    assert checkpoints.incomplete_reason(tmp_path / "checkpoint-8") is None


def test_resume_without_a_checkpoint_starts_from_scratch(
    tmp_path: Path, undisturbed: dict[bool, Path], caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "new").train(resume_from_checkpoint=True)
    assert any("starting from scratch" in line for line in caplog.messages)
    assert history(tmp_path / "new") == history(undisturbed[False])


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path, undisturbed: dict[bool, Path]) -> None:
    shutil.copytree(undisturbed[False], tmp_path / "done")
    trainer = make(tmp_path / "done")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert history(tmp_path / "done") == history(undisturbed[False])
    weights = load_file(tmp_path / "done" / "model.safetensors")
    wanted = load_file(undisturbed[False] / "model.safetensors")
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("peft", [False, True])
def test_a_checkpoint_of_the_other_kind_is_named(tmp_path: Path, undisturbed: dict[bool, Path], peft: bool) -> None:
    shutil.copytree(undisturbed[not peft] / "checkpoint-8", tmp_path / "checkpoint-8")
    kinds = ("the whole model", "an adapter")
    wanted = f"it is a checkpoint of {kinds[not peft]} and this run trains {kinds[peft]}; go on with"
    for resume in (True, str(tmp_path / "checkpoint-8")):
        with pytest.raises(checkpoints.CheckpointError, match=wanted):
            make(tmp_path, peft).train(resume_from_checkpoint=resume)


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    make(tmp_path, save_steps=2, save_total_limit=2).train()
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12"]


def test_rotation_protects_the_best_and_goes_by_age(tmp_path: Path) -> None:
    for age, step in enumerate((90, 2, 4, 6)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (1000 + age, 1000 + age))
    checkpoints.rotate(tmp_path, 2, [tmp_path / "checkpoint-6", tmp_path / "checkpoint-2"])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]
    checkpoints.rotate(tmp_path, None, [])
    assert len(names(tmp_path)) == 2


def test_sharded_weights_and_adapter_folders_count_as_weights(tmp_path: Path, undisturbed: dict[bool, Path]) -> None:
    folder = tmp_path / "checkpoint-8"
    shutil.copytree(undisturbed[False] / "checkpoint-8", folder)
    (folder / "model.safetensors").unlink()
    (folder / MANIFEST).unlink()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(2)}, folder / "model-1-of-2.safetensors")
    assert checkpoints.incomplete_reason(folder) == "model-2-of-2.safetensors is missing"
    save_file({"b": torch.zeros(2)}, folder / "model-2-of-2.safetensors")
    assert checkpoints.incomplete_reason(folder) is None
    (folder / "model.safetensors.index.json").unlink()
    (folder / "policy").mkdir()
    save_file({"a": torch.zeros(2)}, folder / "policy" / "adapter_model.safetensors")
    assert checkpoints.incomplete_reason(folder) is None


def test_a_used_folder_is_named_when_training_starts_anew(
    tmp_path: Path, undisturbed: dict[bool, Path], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(undisturbed[False] / "checkpoint-8", tmp_path / "checkpoint-8")
    make(tmp_path, max_steps=1).train()
    assert any("checkpoints of an earlier run, up to checkpoint-8" in line for line in caplog.messages)


def test_write_atomic_leaves_the_old_content_on_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


SCRIPT = """
import importlib.util, sys, torch
from pathlib import Path
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("resume_tests", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

class Ready(module.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)

# without the curves, whose first drawing takes as long as twenty steps: kills are to hit saves
options = dict(max_steps=int(sys.argv[3]), save_steps=int(sys.argv[4]), save_total_limit=3, metric_files=False)
module.make(Path(sys.argv[2]), callbacks=[Ready()], **options).train(resume_from_checkpoint=True)
"""


def start(folder: Path, steps: int, save_steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, __file__, str(folder), str(steps), str(save_steps)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill_after(process: subprocess.Popen[str], steps: int, delay: float) -> None:
    """SIGKILL `delay` seconds after the process has printed `steps` steps."""
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += line.startswith("step")
        if seen == steps:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a Unix signal")
def test_sigkill_and_resume(tmp_path: Path) -> None:
    steps = 40
    make(tmp_path / "whole", max_steps=steps, save_steps=3).train()
    process = start(tmp_path / "killed", steps, 3)
    kill_after(process, 5, 0.02)
    assert process.returncode == -signal.SIGKILL
    done = checkpoints.checkpoints_by_step(tmp_path / "killed")
    assert done
    assert done[-1][0] < steps - 1
    make(tmp_path / "killed", max_steps=steps, save_steps=3).train(resume_from_checkpoint=True)
    assert history(tmp_path / "killed", steps) == history(tmp_path / "whole", steps)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a Unix signal")
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    steps, kills = 2000, 20
    chance = random.Random(0)
    inside_a_save = 0
    for _ in range(kills):
        process = start(tmp_path / "killed", steps, 1)
        # a save at every step: most moments are inside one
        kill_after(process, 1, chance.uniform(0.0, 1.0))
        assert process.returncode == -signal.SIGKILL, "the run ended before the kill; give it more steps"
        inside_a_save += any(name.startswith("_") for name in names(tmp_path / "killed"))
        for _, path in checkpoints.checkpoints_by_step(tmp_path / "killed"):
            assert checkpoints.incomplete_reason(path) is None
    assert inside_a_save >= kills // 4
    last = checkpoints.checkpoints_by_step(tmp_path / "killed")[-1][0]
    assert last >= kills
    end = 3 * (last // 3) + 6
    # the learning rate follows max_steps, so both runs plan `steps` and stop early
    for folder in ("killed", "whole"):
        stop = [KillAt(end + 1)]
        with pytest.raises(Killed):
            make(tmp_path / folder, callbacks=stop, max_steps=steps, save_steps=3, save_total_limit=3).train(
                resume_from_checkpoint=True
            )
    assert history(tmp_path / "killed", end) == history(tmp_path / "whole", end)


TWO_PROCESSES = """
import importlib.util, os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("resume_tests", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
options = dict(per_device_train_batch_size=1, disable_dropout=True, ddp_find_unused_parameters=False)
stop = [module.KillAt(int(sys.argv[3]))] if len(sys.argv) > 3 else None
try:
    module.make(Path(sys.argv[2]), callbacks=stop, **options).train(resume_from_checkpoint=True)
except module.Killed:
    pass
torch.distributed.barrier()
os._exit(0)  # all is written; threads of gloo sometimes abort a process that ends by the book
"""


@pytest.mark.slow
def test_two_processes_log_what_one_logs_also_when_resumed(tmp_path: Path) -> None:
    make(tmp_path / "one", per_device_train_batch_size=2, disable_dropout=True).train()
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for folder, stop in (("two", []), ("killed", ["7"]), ("killed", [])):
        subprocess.run(
            [*launcher, __file__, str(tmp_path / folder), *stop],
            cwd=ROOT,
            env=environment,
            check=True,
            timeout=200,
        )
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert history(tmp_path / "killed") == two
    for mine, other in zip(two, one, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


# the command itself


def tiny_command(folder: Path, out: str, *more: str) -> list[str]:
    """The arguments of `fastdpo train` for a tiny model and pairs, written to `folder` when they are not there."""
    source, pairs = folder / "model", folder / "pairs.jsonl"
    if not pairs.is_file():
        trainer = make(folder / "unused")
        trainer.model.save_pretrained(source)
        trainer.tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
        trainer.tokenizer.save_pretrained(source)
        chance = random.Random(0)

        def words() -> str:
            return " ".join(f"w{chance.randrange(1, VOCABULARY)}" for _ in range(chance.randrange(2, 9)))

        rows = [{"prompt": words(), "chosen": f" {words()}", "rejected": f" {words()}"} for _ in range(18)]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_total_limit": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 5, "eval_dataset_name": pairs, "gradient_checkpointing": False}
    flags = [f"--{name}={value}" for name, value in {**options, "output_dir": folder / out}.items()]
    return ["train", "-m", str(source), "-d", str(pairs), *flags, *more]


def start_command(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastdpo", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for_steps(process: subprocess.Popen[str], steps: int) -> None:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        steps -= line.startswith("step ")
        if steps == 0:
            return
    pytest.fail("".join(lines))


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before the kill; give it more steps"


def on_clock(name: str) -> bool:
    """Whether a metric is of the machine, not of the training."""
    return name.endswith(("runtime", "_per_second", "peak_memory_gb"))


def metric_files(out: Path) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """training_metrics.csv, its header first, and the steps of log_history.json, both without run times."""
    with open(out / "dpo_metrics" / "training_metrics.csv", newline="") as file:
        table = list(csv.reader(file))
    kept = [index for index, name in enumerate(table[0]) if not on_clock(name)]
    log = json.loads((out / "dpo_metrics" / "log_history.json").read_text())
    log = [
        {name: value for name, value in row.items() if not on_clock(name)} for row in log if "train_runtime" not in row
    ]
    return [[row[index] for index in kept] for row in table], log


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a Unix signal")
def test_the_command_killed_and_resumed_leaves_the_same_metric_files(tmp_path: Path) -> None:
    more = ["--max_steps=20", "--save_steps=4", "--eval_on_start"]
    process = start_command(tiny_command(tmp_path, "killed", *more))
    wait_for_steps(process, 9)
    kill(process)
    assert checkpoints.newest_complete(tmp_path / "killed")
    assert main(tiny_command(tmp_path, "killed", *more, "--resume_from_checkpoint")) == 0
    assert main(tiny_command(tmp_path, "whole", *more)) == 0
    table, log = metric_files(tmp_path / "killed")
    assert [row[0] for row in table] == ["step", *map(str, range(21))]
    assert [row["step"] for row in log if "eval_loss" in row] == [0, 5, 10, 15, 20]
    assert (table, log) == metric_files(tmp_path / "whole")

    # the run is finished: once more trains no step, and what the files say of the run stays
    before = {name: json.loads((tmp_path / "killed/dpo_metrics" / name).read_text()) for name in JSON_FILES}
    assert main(tiny_command(tmp_path, "killed", *more, "--resume_from_checkpoint")) == 0
    after = {name: json.loads((tmp_path / "killed/dpo_metrics" / name).read_text()) for name in JSON_FILES}
    assert after == before
    assert "train_runtime" in before["summary.json"]["runtime"]
    # a mean over the steps after the kill would pass for that of the run
    assert "train_loss" not in before["summary.json"]["runtime"]
    whole = json.loads((tmp_path / "whole/dpo_metrics/summary.json").read_text())
    assert whole["runtime"]["train_loss"] == pytest.approx(
        sum(row["loss"] for row in log if "loss" in row) / 20, rel=1e-5
    )


JSON_FILES = ("log_history.json", "summary.json")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a Unix signal")
@pytest.mark.parametrize("mode", ["full", "peft"])
def test_the_command_survives_twenty_kills(tmp_path: Path, mode: str) -> None:
    more = ["--max_steps=300", *(["--use_peft", "--lora_r=4"] if mode == "peft" else [])]
    chance = random.Random(0)
    inside_a_save = 0
    for count in range(20):
        process = start_command(tiny_command(tmp_path, "killed", *more, "--save_steps=1", "--resume_from_checkpoint"))
        wait_for_steps(process, 1)
        time.sleep(chance.uniform(0.0, 1.0))
        if count % 2:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not list((tmp_path / "killed").glob("_incomplete-*")):
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.02))
        kill(process)
        inside_a_save += any(name.startswith("_") for name in names(tmp_path / "killed"))
        for _, path in checkpoints.checkpoints_by_step(tmp_path / "killed"):
            assert checkpoints.incomplete_reason(path) is None
    assert inside_a_save >= 5
    assert checkpoints.newest_complete(tmp_path / "killed")
    assert main(tiny_command(tmp_path, "killed", *more, "--save_steps=50", "--resume_from_checkpoint")) == 0
    assert main(tiny_command(tmp_path, "whole", *more, "--save_steps=50")) == 0
    table, log = metric_files(tmp_path / "killed")
    assert [row[0] for row in table[1:]] == [str(step) for step in range(1, 301)]
    assert (table, log) == metric_files(tmp_path / "whole")
