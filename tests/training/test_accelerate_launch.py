"""`accelerate launch -m fastdpo train` with two CPU processes (gloo, DDP) is one process with twice the batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastdpo.cli.train.checks import only_process_of_several
from tiny_runs import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "fastdpo" / "demo"
STEPS = 6
# the sums of a batch are added in another order: fp32's rounding, grown by Adam over the steps
RELATIVE, ABSOLUTE = 1e-4, 2e-5
COMPARED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
EXACT = ("step", "epoch", "num_tokens", "learning_rate")
CLOCK = {"tokens_per_second", "peak_memory_gb"}


def logged(launcher: list[str], output: Path, pairs: int, *more: str) -> list[dict[str, float]]:
    """The log of a run of the embedded model and pairs, `pairs` of them a batch and process."""
    options = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True}
    options |= {"per_device_train_batch_size": pairs, "output_dir": output, "disable_tqdm": True}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = ["train", "-m", str(DEMO / "model"), "-d", str(DEMO / "train.jsonl"), *arguments, *more]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "fastdpo", *command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained to step") == 1
    assert done.stderr.count("reference: ") == 1
    history = json.loads((output / "dpo_metrics" / "log_history.json").read_text())
    return [line for line in history if "loss" in line]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_processes() -> list[str]:
    # --multi_gpu is accelerate's name for several processes of torchrun; with --cpu it starts one
    several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    return [*several, "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [[], ["--use_peft", "--lora_r=4", "--loss_type=ipo"], ["--loss_type=bco"]],
    ids=["full", "lora, ipo", "single answers, bco"],
)
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, more: list[str]) -> None:
    two = logged(two_processes(), tmp_path / "two", 4, *more)
    one = logged([], tmp_path / "one", 8, *more)
    half = logged([], tmp_path / "half", 4, *more)
    assert len(two) == len(one) == STEPS
    for mine, other in zip(two, one, strict=True):
        assert {name: mine[name] for name in EXACT} == {name: other[name] for name in EXACT}
        assert mine.keys() - CLOCK == other.keys() - CLOCK
        for name in mine.keys() & set(COMPARED):
            assert mine[name] == pytest.approx(other[name], rel=RELATIVE, abs=ABSOLUTE), name
    # one process with the batch of one of the two is another run
    assert abs(half[-1]["loss"] - two[-1]["loss"]) > 20 * RELATIVE


KTO = """
import json, sys
from datasets import Dataset
import tiny_runs
from fastdpo.training.unpaired_rows import with_mismatched

rows = [
    {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 3 > 0}
    for number, row in enumerate(tiny_runs.pairs(16))
]
# partners of blocks of 4, whatever the batch is; the policy has moved away from the reference
data, size = with_mismatched(Dataset.from_list(rows), 4), int(sys.argv[2])
trainer = tiny_runs.make(
    sys.argv[1], tiny_runs.model(seed=5), data, ref_model=tiny_runs.model(seed=3), eval_dataset=data,
    loss_type="kto", per_device_train_batch_size=size, per_device_eval_batch_size=size,
    eval_strategy="steps", eval_steps=2,
)
trainer.train()
if trainer.is_world_process_zero():
    with open(sys.argv[3], "w") as file:
        json.dump(trainer.state.log_history, file)
"""


@pytest.mark.slow
def test_the_estimate_of_the_kl_is_that_of_all_processes(tmp_path: Path) -> None:
    script = tmp_path / "kto.py"
    script.write_text(KTO)

    def run(launcher: list[str], size: int) -> list[dict[str, float]]:
        log = tmp_path / f"{size}.json"
        command = [sys.executable, *launcher, str(script), str(tmp_path / str(size)), str(size), str(log)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(log.read_text())

    two, one, half = run(two_processes(), 4), run([], 8), run([], 4)
    assert sum(line["kl"] > 0.1 for line in one if "kl" in line) > 1
    for name in ("loss", "kl", "rewards/chosen", "rewards/rejected", "eval_loss", "eval_kl", "eval_logps/chosen"):
        mine, theirs, other = ([line[name] for line in log if name in line] for log in (two, one, half))
        assert mine == pytest.approx(theirs, rel=RELATIVE, abs=ABSOLUTE), name
        assert mine != pytest.approx(other, rel=RELATIVE, abs=ABSOLUTE)


def test_a_launcher_that_starts_one_process_of_several_is_noticed() -> None:
    # what `accelerate launch --cpu --num_processes 2` gives to the one process that it starts
    alone = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert only_process_of_several(alone)
    for other in ({"WORLD_SIZE": "2", "RANK": "0"}, {"PMI_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}):
        assert not only_process_of_several({**alone, **other})
    assert not only_process_of_several({"ACCELERATE_USE_CPU": "True"})
    assert not only_process_of_several({"MASTER_ADDR": "127.0.0.1"})
