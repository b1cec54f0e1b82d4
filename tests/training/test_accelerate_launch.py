"""`accelerate launch -m fastdpo train` with two CPU processes (gloo, DDP) is one process with twice the batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastdpo.cli.train.checks import only_process_of_several

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "fastdpo" / "demo"
STEPS = 6
# the sums of a batch are added in another order: fp32's rounding, grown by Adam over the steps
RELATIVE, ABSOLUTE = 1e-4, 2e-5
COMPARED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
EXACT = ("step", "epoch", "num_tokens", "learning_rate")


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


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--use_peft", "--lora_r=4", "--loss_type=ipo"]], ids=["full", "lora, ipo"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, more: list[str]) -> None:
    # --multi_gpu is accelerate's name for several processes of torchrun; with --cpu it starts one
    several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    several += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    two = logged(several, tmp_path / "two", 4, *more)
    one = logged([], tmp_path / "one", 8, *more)
    half = logged([], tmp_path / "half", 4, *more)
    assert len(two) == len(one) == STEPS
    for mine, other in zip(two, one, strict=True):
        assert {name: mine[name] for name in EXACT} == {name: other[name] for name in EXACT}
        for name in COMPARED:
            assert mine[name] == pytest.approx(other[name], rel=RELATIVE, abs=ABSOLUTE), name
    # one process with the batch of one of the two is another run
    assert abs(half[-1]["loss"] - two[-1]["loss"]) > 100 * RELATIVE


def test_a_launcher_that_starts_one_process_of_several_is_noticed() -> None:
    # what `accelerate launch --cpu --num_processes 2` gives to the one process that it starts
    alone = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert only_process_of_several(alone)
    for other in ({"WORLD_SIZE": "2", "RANK": "0"}, {"PMI_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}):
        assert not only_process_of_several({**alone, **other})
    assert not only_process_of_several({"ACCELERATE_USE_CPU": "True"})
    assert not only_process_of_several({"MASTER_ADDR": "127.0.0.1"})
