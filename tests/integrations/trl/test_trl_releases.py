"""Other releases of TRL, each in a folder of its own: trained alone and through the patch (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


RELEASES = {
    "0.20.0": (
        "transformers==4.55.4",
        "tokenizers==0.21.4",
        "huggingface_hub==0.34.4",
        "datasets==4.0.0",
        "peft==0.17.1",
        "accelerate==1.10.1",
        "requests",
        "urllib3",
        "certifi",
        "idna",
        "charset-normalizer",
    ),
    "1.13.0": (),
    "1.15.0": (),
}
# trains with TRL alone (where that runs on a CPU), then through the patch, and prints losses and the op's calls
SCRIPT = """
import json, sys, torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from fastdpo.demo import demo_paths
from fastdpo.integrations import trl as integration, trl_head

import trl
torch.set_num_threads(1)
paths, calls = demo_paths(), []
for module, name in ((integration, "logprob"), (trl_head, "linear_logprob_stats")):
    def counted(*args, run=getattr(module, name), **kwargs):
        calls.append(name)
        return run(*args, **kwargs)
    setattr(module, name, counted)
special = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
rows = [json.loads(line) for line in paths.train.read_text().splitlines()[:24]]
pairs = Dataset.from_list([{k: v[0]["content"] for k, v in row.items()} for row in rows])


def train():
    model, ref = (LlamaForCausalLM.from_pretrained(paths.model) for _ in range(2))
    args = trl.DPOConfig(
        sys.argv[1], use_cpu=True, bf16=False, disable_tqdm=True, report_to=[], save_strategy="no", max_steps=6,
        per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, gradient_checkpointing=False,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(paths.model / "tokenizer.json"), **special)
    running = trl.DPOTrainer(model, ref, args=args, train_dataset=pairs, processing_class=tokenizer)
    running.train()
    return [line["loss"] for line in running.state.log_history if "loss" in line]


plain = train() if sys.argv[2] == "plain" else None
untouched = len(calls)
with integration.patch_trl():
    ours = train()
result = {"version": trl.__version__, "plain": plain, "ours": ours, "untouched": untouched, "calls": len(calls)}
print("RESULT" + json.dumps(result))
"""


def run_script(folder: Path, extra: str, plain: bool) -> dict[str, Any]:
    path = os.pathsep.join(x for x in (extra, str(ROOT)) if x)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), "plain" if plain else "patched only"],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.slow
@pytest.mark.parametrize("version", RELEASES)
def test_other_releases_of_trl(version, tmp_path):
    folder = str(tmp_path / "packages")
    packages = [f"trl=={version}", *RELEASES[version]]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *packages]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {packages[0]} and what it needs here: {done.stderr.strip()[-200:]}")
    plain = version != "1.15.0"  # that one runs Triton kernels on any device
    result = run_script(tmp_path, folder, plain)
    assert result["version"] == version
    assert result["untouched"] == 0
    assert result["calls"] == 12  # policy and reference of each step
    theirs = result["plain"] if plain else run_script(tmp_path, "", True)["plain"]
    assert len(theirs) == 6
    assert theirs[0] - theirs[-1] > 0.1
    assert result["ours"] == pytest.approx(theirs, rel=1e-3)
