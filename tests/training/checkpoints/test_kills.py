"""Processes that are killed and started again, a trainer's and the command's: they log what an undisturbed one logs."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import WhitespaceSplit

from fastdpo.cli import main
from fastdpo.training.checkpoints import folders as checkpoints
from resumable_runs import history, make, on_clock
from tiny_runs import ENVIRONMENT, ROOT, VOCABULARY, KillAt, Killed


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


SCRIPT = """
import importlib.util, sys, torch
from pathlib import Path
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("resume_tests", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

from transformers import TrainerCallback

class Ready(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)

# without the curves, whose first drawing takes as long as twenty steps: kills are to hit saves
options = dict(max_steps=int(sys.argv[3]), save_steps=int(sys.argv[4]), save_total_limit=3, metric_files=False)
module.make(Path(sys.argv[2]), callbacks=[Ready()], **options).train(resume_from_checkpoint=True)
"""


def start(folder: Path, steps: int, save_steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, __file__, str(folder), str(steps), str(save_steps)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
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
    for folder, stop in (("two", []), ("killed", ["7"]), ("killed", [])):
        subprocess.run(
            [*launcher, __file__, str(tmp_path / folder), *stop],
            cwd=ROOT,
            env=ENVIRONMENT,
            check=True,
            timeout=200,
        )
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert history(tmp_path / "killed") == two
    for mine, other in zip(two, one, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)


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
    return subprocess.Popen(
        [sys.executable, "-m", "fastdpo", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
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
