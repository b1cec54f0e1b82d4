"""LLaMA-Factory's real DPO trainer on fastdpo, in environments of its own (slow)."""

import json
import math
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
POSITIONS = 8 * 16  # of a batch of four pairs, padded

# releases of LLaMA-Factory with what they pin; torch and the rest come from the environment that runs the tests
RECIPES = {
    "0.9.3": ("trl==0.9.6", "transformers==4.52.4", "peft==0.15.2", "accelerate==1.7.0", "tokenizers==0.21.1"),
    "0.9.4": ("trl==0.24.0", "transformers==4.57.1", "peft==0.17.1", "accelerate==1.11.0", "tokenizers==0.22.2"),
}
COMMON = ("datasets==3.6.0", "huggingface_hub==0.36.2", "omegaconf", "requests", "urllib3", "certifi", "idna")
# what TRL 0.9 parses its command line with
TYRO = ("tyro==0.8.14", "docstring_parser", "shtab", "rich", "markdown-it-py", "mdurl", "pygments")
DRIVER = Path(__file__).with_name("llama_factory_driver.py").read_text()


@pytest.fixture(scope="module", params=RECIPES)
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a virtual environment with a release of LLaMA-Factory."""
    version = request.param
    folder = tmp_path_factory.mktemp(f"llamafactory-{version}")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "what_is_not_pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # 0.9.4 imports it for audio files; there is no build for every torch
    (packages / "torchaudio.py").touch()
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, f"llamafactory=={version}", *RECIPES[version], *COMMON, *TYRO],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no pip?"])[-1]
        pytest.skip(f"LLaMA-Factory {version} and what it pins cannot be installed here (no network?): {last}")
    return python


def run(python: Path, *arguments: str) -> str:
    # the interpreter of Triton is for our own kernels' tests
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [str(python), *arguments],
        cwd=python.parent,
        env={**variables, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def report(environment: Path) -> dict[str, Any]:
    run(environment, "-W", "ignore", "-c", DRIVER, str(environment.parent))
    return json.loads((environment.parent / "report.json").read_text())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return math.log(sigmoid(x))


def log_odds(logp: float) -> float:
    return logp - math.log(1 - math.exp(logp))


def expected_loss(name: str, logps: list[list[float]], beta: float = 0.1, gamma: float = 0.5) -> float:
    """The mean of a batch's losses, written out; `logps` as `compute_preference_loss` gets them."""
    policy_w, policy_l, ref_w, ref_l = logps
    if name in ("orpo", "simpo"):
        pairs = list(zip(policy_w, policy_l, strict=True))
        formulas = {
            "orpo": lambda a, b: -a - beta * log_sigmoid(log_odds(a) - log_odds(b)),
            "simpo": lambda a, b: -log_sigmoid(beta * (a - b) - gamma),
        }
    else:
        u_w = [a - b for a, b in zip(policy_w, ref_w, strict=True)]
        u_l = [a - b for a, b in zip(policy_l, ref_l, strict=True)]
        z_w, z_l = max(0.0, sum(u_w) / len(u_w)), max(0.0, sum(u_l) / len(u_l))
        pairs = list(zip(u_w, u_l, strict=True))
        formulas = {
            "sigmoid": lambda a, b: -log_sigmoid(beta * (a - b)),
            "hinge": lambda a, b: max(0.0, 1 - beta * (a - b)),
            "ipo": lambda a, b: (a - b - 1 / (2 * beta)) ** 2,
            "kto_pair": lambda a, b: 1 - (sigmoid(beta * (a - z_l)) + sigmoid(beta * (z_w - b))) / 2,
        }
    return sum(formulas[name](a, b) for a, b in pairs) / len(pairs)


def assert_trained_alike(outcome: dict[str, Any], expected: dict[str, Any]) -> None:
    assert outcome["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert len(outcome["metrics"]) == len(expected["metrics"])
    for ours, theirs in zip(outcome["metrics"], expected["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_without_the_patch_pref_loss_does_not_take_effect(report: dict[str, Any]):
    plain = report["plain"]
    for loss in ("sigmoid", "orpo", "simpo"):
        assert plain[loss]["losses"][0] == pytest.approx(expected_loss(loss, plain[loss]["logps"][0]), rel=1e-5)
    if report["version"] != "0.9.3":  # its TRL takes no loss type
        assert plain["hinge"]["losses"] == plain["kto_pair"]["losses"] == plain["sigmoid"]["losses"]
        assert plain["ipo"]["losses"][0] == pytest.approx(expected_loss("sigmoid", plain["ipo"]["logps"][0]), rel=1e-5)
        assert plain["hinge_ftx"]["losses"] == plain["ftx"]["losses"]
    else:
        assert "Unknown loss type: kto_pair" in plain["kto_pair"]["error"]
        assert "modified by an inplace operation" in plain["hinge_ftx"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_pref_loss_takes_effect(report: dict[str, Any], loss: str):
    outcome = report["patched"][loss]
    assert len(outcome["losses"]) == 4
    for value, logps in zip(outcome["losses"], outcome["logps"], strict=False):
        assert value == pytest.approx(expected_loss(loss, logps), rel=1e-5)


@pytest.mark.slow
def test_what_worked_before_gives_the_same_losses_and_metrics(report: dict[str, Any]):
    expected = {name: outcome for name, outcome in report["plain"].items() if "error" not in outcome}
    if report["version"] != "0.9.3":
        ignored = {name: expected.pop(name) for name in ("hinge", "ipo", "kto_pair", "hinge_ftx")}
        for name, outcome in ignored.items():
            assert abs(report["patched"][name]["losses"][0] - outcome["losses"][0]) > 0.1 * outcome["losses"][0]
        expected |= report["with_loss_type"]
    assert len(expected) >= 18
    del expected["bf16"]  # below
    for name, outcome in expected.items():
        assert_trained_alike(report["patched"][name], outcome)


@pytest.mark.slow
def test_bf16_autocast_stays_around_both_models(report: dict[str, Any]):
    patched, plain = report["patched"], report["plain"]
    assert patched["bf16"]["losses"] == pytest.approx(plain["bf16"]["losses"], rel=1e-2)
    assert patched["bf16"]["autocast"] == plain["bf16"]["autocast"] == [True] * 12
    assert patched["sigmoid"]["autocast"] == [False] * 12


@pytest.mark.slow
def test_the_sft_term_is_added_to_hinge_too(report: dict[str, Any]):
    patched, plain = report["patched"], report["plain"]
    term = plain["ftx"]["losses"][0] - plain["sigmoid"]["losses"][0]
    assert term > 1
    assert patched["hinge_ftx"]["losses"][0] - patched["hinge"]["losses"][0] == pytest.approx(term, rel=1e-5)


@pytest.mark.slow
def test_logits_of_all_positions_exist_only_where_a_line_says_why(report: dict[str, Any]):
    sizes = {name: outcome["head_rows"] for name, outcome in report["patched"].items()}
    # a softcap needs logits for their mean, in blocks that are larger than this batch
    assert sizes.pop("gemma2") == report["plain"]["gemma2"]["head_rows"] == POSITIONS
    # elsewhere it is that of a mean: one row per sequence
    logits = {name for name, rows in sizes.items() if rows != 8}
    assert all(sizes[name] == report["plain"]["sigmoid"]["head_rows"] == POSITIONS for name in logits)
    # PEFT 0.15 lacks an attribute that tells a plain LoRA from others
    assert logits == {"dora_head", "early", "replaced"} | ({"lora_head"} if report["version"] == "0.9.3" else set())
    lines = report["lines"]
    assert {name for name in lines if lines[name]} == {*logits, "patch", "own"}
    assert len(lines["patch"]) == 1
    assert "pref_loss" in lines["patch"][0]
    (dora,) = lines["dora_head"]
    assert "policy (LlamaForCausalLM)" in dora
    assert "its head is under" in dora
    (early,) = lines["early"]
    assert "built before" in early
    for who, line in zip(("policy", "reference"), lines["replaced"], strict=True):
        assert f"the log-probs of the {who} (LlamaForCausalLM) are computed from full logits" in line
        assert "replaced its forward" in line
    (own,) = lines["own"]
    assert "concatenated_forward of its own" in own


@pytest.mark.slow
def test_log_probs_from_full_logits_are_the_same(report: dict[str, Any]):
    assert_trained_alike(report["patched"]["early"], report["patched"]["hinge"])
    assert_trained_alike(report["patched"]["replaced"], report["patched"]["replaced_not"])
    assert report["patched"]["own"] == report["patched"]["hinge"]


@pytest.mark.slow
def test_undone_nothing_is_left(report: dict[str, Any]):
    assert report["restored"] is True
    assert report["forward"] == {"before": False, "after": False}
    assert report["undone"] == POSITIONS


@pytest.mark.slow
def test_the_command_trains_a_configuration_file(report: dict[str, Any], environment: Path):
    folder = environment.parent
    rows = [
        {"instruction": f"w{i} w9", "chosen": f"w{i + 20} w30 w31", "rejected": f"w{i + 40} w50"} for i in range(4, 8)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    (folder / "dataset_info.json").write_text(
        json.dumps({"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}})
    )
    config = {
        "model_name_or_path": str(folder / "model"),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "pref_loss": "ipo",
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "default",
        "cutoff_len": 64,
        "output_dir": str(folder / "trained"),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    (folder / "train.yaml").write_text(json.dumps(config))
    said = run(environment, "-m", "fastdpo.integrations.llama_factory", "train", str(folder / "train.yaml"))
    assert "pref_loss of its DPO trainer compute through fastdpo" in said
    assert "full logits" not in said
    history = json.loads((folder / "trained" / "trainer_state.json").read_text())["log_history"]
    # policy and reference are equal before the first step: (1 / (2 beta))^2, where sigmoid gives log 2
    assert history[0]["loss"] == pytest.approx(25.0, abs=1e-3)
