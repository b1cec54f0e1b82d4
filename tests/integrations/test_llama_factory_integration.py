"""LLaMA-Factory's DPO trainer on fastdpo: its parts here, the real trainer in environments of its own (slow)."""

import json
import logging
import math
import os
import re
import subprocess
import sys
import sysconfig
import types
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fastdpo.integrations import llama_factory
from fastdpo.integrations.llama_factory import LlamaFactoryPatch, get_batch_logps, patch_llama_factory
from fastdpo.integrations.llama_factory_forward import RowMeansForward, forward_of

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

# trains with and without the patch in one process and writes what it saw
DRIVER = r'''
import copy, json, logging, os, pathlib, sys, warnings

warnings.simplefilter("ignore")
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import llamafactory
import llamafactory.train.dpo.trainer as theirs
from llamafactory.data.collator import PairwiseDataCollatorWithPadding
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import FinetuningArguments
from peft import LoraConfig, get_peft_model

from fastdpo.integrations.llama_factory import patch_llama_factory

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
folder = pathlib.Path(sys.argv[1])
LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
V = 97
vocabulary = {f"w{i}": i for i in range(V)}
words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
words.pre_tokenizer = WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")
shape = dict(
    vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.3, pad_token_id=1, bos_token_id=None, eos_token_id=2,
)
configs = {
    "llama": LlamaConfig(**shape, tie_word_embeddings=False),
    # whose softcap bends its logits
    "gemma2": Gemma2Config(**shape, head_dim=8, sliding_window=8, final_logit_softcapping=1.5),
}
random = torch.Generator().manual_seed(0)


def ids(count):
    return torch.randint(3, V, (count,), generator=random).tolist()


pairs = []
for i in range(8):
    prompt, row = ids(3 + i % 4), {"images": None, "videos": None, "audios": None}
    for side, completion in (("chosen", ids(4 + i % 5)), ("rejected", ids(6 - i % 5))):
        row[f"{side}_input_ids"] = prompt + completion + [2]
        row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
        row[f"{side}_labels"] = [-100] * len(prompt) + completion + [2]
    pairs.append(row)
dataset = Dataset.from_list(pairs)

class WithLossType(theirs.CustomDPOTrainer):
    """Unpatched, and TRL's dpo_loss is told the loss."""

    def dpo_loss(self, *logps):
        return theirs.DPOTrainer.dpo_loss(self, *logps, loss_type=self.loss_type)


def build(trainer=None, model="llama", lora=None, training=None, **options):
    # both remember the bf16 of an earlier trainer
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    kind = {"llama": LlamaForCausalLM, "gemma2": Gemma2ForCausalLM}[model]
    policy = kind(configs[model])
    finetuning = FinetuningArguments(stage="dpo", finetuning_type="full" if lora is None else "lora", **options)
    reference = None
    if lora is not None:
        policy = get_peft_model(policy, LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.1, **lora))
    elif finetuning.use_ref_model:
        reference = copy.deepcopy(policy).requires_grad_(False)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    arguments = dict(
        output_dir=str(folder / "out"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True, per_device_eval_batch_size=4,
    ) | (training or {})
    return (trainer or theirs.CustomDPOTrainer)(
        model=policy, ref_model=reference, finetuning_args=finetuning, processor=None, tokenizer=tokenizer,
        args=transformers.Seq2SeqTrainingArguments(**arguments), train_dataset=dataset, eval_dataset=dataset,
        data_collator=PairwiseDataCollatorWithPadding(
            template=TEMPLATES["default"], model=policy, tokenizer=tokenizer, pad_to_multiple_of=8
        ),
    )


def watched(trainer):
    """Trains and reports: losses unrounded, what each was made of, metrics, the most positions that a head got."""
    found = {"losses": [], "logps": [], "autocast": [], "head_rows": 0}
    heads = []
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
            heads += causal_lm.get_output_embeddings().modules()
            causal_lm.get_input_embeddings().register_forward_hook(
                lambda *_: found["autocast"].append(torch.is_autocast_enabled("cpu"))
            )
    linear = torch.nn.Linear.forward

    def forward(self, x):
        if self.out_features == V and any(self is head for head in heads):
            found["head_rows"] = max(found["head_rows"], x.numel() // x.shape[-1])
        return linear(self, x)

    torch.nn.Linear.forward = forward
    try:
        return train_and_look(trainer, found)
    finally:
        torch.nn.Linear.forward = linear


def train_and_look(trainer, found):
    compute, preference = trainer.compute_loss, trainer.compute_preference_loss

    def compute_loss(*args, **kwargs):
        loss = compute(*args, **kwargs)
        found["losses"].append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    def compute_preference_loss(*logps):
        found["logps"].append([x.tolist() if x is not None else None for x in logps])
        return preference(*logps)

    trainer.compute_loss, trainer.compute_preference_loss = compute_loss, compute_preference_loss
    trainer.train()
    trainer.evaluate()
    logs = trainer.state.log_history
    rounded = ("loss", "eval_loss", "train_loss")
    found["metrics"] = [
        {k: v for k, v in log.items() if k not in rounded and ("/" in k or "_loss" in k or k == "grad_norm")}
        for log in logs
    ]
    return found


def outcome(make, **options):
    try:
        return watched(make(**options))
    except (ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


lines = []


class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())


logging.getLogger("fastdpo").setLevel(logging.INFO)
logging.getLogger("fastdpo").addHandler(Lines())

VARIANTS = {
    **{loss: {"pref_loss": loss} for loss in LOSSES},
    "smoothing": {"dpo_label_smoothing": 0.2},
    "beta": {"pref_beta": 0.5},
    "ftx": {"pref_ftx": 0.5},
    "ld_alpha": {"ld_alpha": 0.3},
    "gamma": {"pref_loss": "simpo", "simpo_gamma": 1.5},
    "hinge_ftx": {"pref_loss": "hinge", "pref_ftx": 0.5},
    "orpo_ftx": {"pref_loss": "orpo", "pref_ftx": 0.5},
    "lora": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "lora_head": {"lora": {"target_modules": ["q_proj", "lm_head"]}},
    "saved_head": {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
    "dora_head": {"lora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True}},
    "gemma2": {"model": "gemma2"},
    "accumulated": {"training": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "bf16": {"training": {"bf16": True}},
}
if "pref_bco_weight" in FinetuningArguments.__dataclass_fields__:  # from 0.9.4 on
    VARIANTS["bco"] = {"pref_bco_weight": 0.5}
report = {"version": llamafactory.__version__, "plain": {}, "told": {}, "patched": {}, "lines": {}}
before = dict(vars(theirs.CustomDPOTrainer)), theirs.get_batch_logps
for name, options in VARIANTS.items():
    report["plain"][name] = outcome(build, **options)
    if name in ("hinge", "ipo") and theirs.DPOTrainer.dpo_loss.__code__.co_argcount > 5:
        report["told"][name] = outcome(build, trainer=WithLossType, **options)
early = build(pref_loss="hinge")

patch = patch_llama_factory()
inner = patch_llama_factory()
report["lines"]["patch"] = lines[:]
inner.undo()
for name, options in VARIANTS.items():
    lines.clear()
    report["patched"][name] = outcome(build, **options)
    report["lines"][name] = lines[:]

lines.clear()
report["patched"]["early"] = watched(early)
report["lines"]["early"] = lines[:]

lines.clear()
plain_forward = LlamaForCausalLM.forward
LlamaForCausalLM.forward = lambda self, *args, **kwargs: plain_forward(self, *args, **kwargs)
report["patched"]["replaced"] = outcome(build, pref_loss="hinge", ld_alpha=0.3)
LlamaForCausalLM.forward = plain_forward
report["patched"]["replaced_not"] = outcome(build, pref_loss="hinge", ld_alpha=0.3)
report["lines"]["replaced"] = lines[:]

lines.clear()
class Own(theirs.CustomDPOTrainer):
    def concatenated_forward(self, *args, **kwargs):
        return super().concatenated_forward(*args, **kwargs)
report["patched"]["own"] = outcome(build, trainer=Own, pref_loss="hinge")
report["lines"]["own"] = lines[:]

model = build().model
report["forward"] = {"before": "forward" in vars(model)}
trainer = build()
trainer.train()
report["forward"]["after"] = "forward" in vars(trainer.model)

patch.undo()
patch.undo()
report["restored"] = before == (dict(vars(theirs.CustomDPOTrainer)), theirs.get_batch_logps)
report["undone"] = watched(trainer)["head_rows"]

torch.manual_seed(0)
LlamaForCausalLM(configs["llama"]).save_pretrained(folder / "model")
tokenizer.save_pretrained(folder / "model")
(folder / "report.json").write_text(json.dumps(report))
'''


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
    run(environment, "-c", DRIVER, str(environment.parent))
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


def assert_trained_alike(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
    assert len(found["metrics"]) == len(wanted["metrics"])
    for ours, theirs in zip(found["metrics"], wanted["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_without_the_patch_pref_loss_does_not_take_effect(report: dict[str, Any]):
    plain = report["plain"]
    for loss in ("sigmoid", "orpo", "simpo"):
        assert plain[loss]["losses"][0] == pytest.approx(expected_loss(loss, plain[loss]["logps"][0]), rel=1e-5)
    if report["version"] != "0.9.3":  # its TRL is not told
        assert plain["hinge"]["losses"] == plain["kto_pair"]["losses"] == plain["sigmoid"]["losses"]
        assert plain["ipo"]["losses"][0] == pytest.approx(expected_loss("sigmoid", plain["ipo"]["logps"][0]), rel=1e-5)
        assert plain["hinge_ftx"]["losses"] == plain["ftx"]["losses"]
    else:
        assert "Unknown loss type: kto_pair" in plain["kto_pair"]["error"]
        assert "modified by an inplace operation" in plain["hinge_ftx"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_pref_loss_takes_effect(report: dict[str, Any], loss: str):
    found = report["patched"][loss]
    assert len(found["losses"]) == 4
    for value, logps in zip(found["losses"], found["logps"], strict=False):
        assert value == pytest.approx(expected_loss(loss, logps), rel=1e-5)


@pytest.mark.slow
def test_what_worked_before_gives_the_same_losses_and_metrics(report: dict[str, Any]):
    wanted = {name: found for name, found in report["plain"].items() if "error" not in found}
    if report["version"] != "0.9.3":
        ignored = {name: wanted.pop(name) for name in ("hinge", "ipo", "kto_pair", "hinge_ftx")}
        for name, found in ignored.items():
            assert abs(report["patched"][name]["losses"][0] - found["losses"][0]) > 0.1 * found["losses"][0]
        wanted |= report["told"]
    assert len(wanted) >= 18
    del wanted["bf16"]  # below
    for name, found in wanted.items():
        assert_trained_alike(report["patched"][name], found)


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
    sizes = {name: found["head_rows"] for name, found in report["patched"].items()}
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


# what needs no LLaMA-Factory


def fake_llama_factory(monkeypatch: pytest.MonkeyPatch, version: str, **methods: Any) -> type:
    trainer = type("CustomDPOTrainer", (Base,), methods)
    module = types.SimpleNamespace(CustomDPOTrainer=trainer, get_batch_logps=None)
    monkeypatch.setitem(sys.modules, "llamafactory", types.SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "llamafactory.train.dpo.trainer", module)
    return trainer


class Base:
    """What CustomDPOTrainer inherits."""

    def __init__(self, model: Any, ref_model: Any) -> None: ...

    def train(self) -> str:
        return "trained"

    evaluate = predict = train

    def concatenated_forward(self, model: Any, batch: Any, is_ref_model: bool = False) -> dict[str, Tensor]: ...

    dpo_loss = simpo_loss = odds_ratio_loss = train


def test_without_llama_factory_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(
        ImportError, match=r"^patch_llama_factory needs LLaMA-Factory 0\.9\.3 to 0\.9\.5, and no .* imported .*\.$"
    ):
        patch_llama_factory()
    assert LlamaFactoryPatch._in_force == []


@pytest.mark.parametrize("version", ["0.8.3", "0.9.2", "0.9.6.dev0", "0.9.30", "1.0.0", "of long ago"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str):
    fake_llama_factory(monkeypatch, version)
    said = f"works with LLaMA-Factory 0.9.3 to 0.9.5, {version} is installed."
    with pytest.raises(ImportError, match=re.escape(said)):
        patch_llama_factory()


def test_a_trainer_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch):
    fake_llama_factory(monkeypatch, "0.9.5")
    monkeypatch.delattr(Base, "simpo_loss")
    with pytest.raises(ImportError, match=r"0\.9\.5 is installed, whose DPO trainer has no simpo_loss\.$"):
        patch_llama_factory()


def test_patches_nest_and_leave_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    trainer = fake_llama_factory(monkeypatch, "0.9.4", odds_ratio_loss=lambda self: 1)
    before = dict(vars(trainer))
    with caplog.at_level(logging.INFO, "fastdpo"):
        outer = patch_llama_factory()
        with pytest.raises(RuntimeError, match="inside"), patch_llama_factory():
            raise RuntimeError("inside")
    assert len(caplog.records) == 1
    assert trainer.dpo_loss is llama_factory.dpo_loss
    assert trainer(None, None).train() == "trained"
    outer.undo()
    outer.undo()
    assert dict(vars(trainer)) == before
    assert trainer.dpo_loss is Base.dpo_loss


def test_the_command_without_a_file_says_how(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["llama_factory", "train"])
    with pytest.raises(SystemExit, match=r"CONFIG\.yaml"):
        llama_factory.main()


def labels_of(prompts: list[int], completions: list[int], length: int) -> Tensor:
    """Rows with a prompt, a completion and padding, as LLaMA-Factory's collator makes them."""
    labels = torch.full((len(prompts), length), -100)
    for row, (start, count) in enumerate(zip(prompts, completions, strict=True)):
        labels[row, start : start + count] = torch.randint(0, 11, (count,))
    return labels


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_log_probs_from_logits_are_the_formula(dtype: torch.dtype, ld_alpha: float | None):
    completions = [5, 2, 0, 3, 4, 4]
    labels = labels_of([3, 1, 2, 4, 2, 3], completions, 9)
    logits = torch.randn(6, 9, 11).mul(5).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    sums = []
    for row, count in enumerate(completions):
        shared = min(count, completions[(row + 3) % 6])
        places = (labels[row] != -100).nonzero().flatten().tolist()
        logps = [wide[row, t - 1].log_softmax(-1)[labels[row, t]] for t in places]
        weights = [1.0 if i < shared or ld_alpha is None else ld_alpha for i in range(count)]
        sums.append(sum((w * x for w, x in zip(weights, logps, strict=True)), wide.sum() * 0))
    found, lengths = get_batch_logps(logits, labels, ld_alpha=ld_alpha)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lengths.tolist() == completions
    torch.testing.assert_close(found.double(), torch.stack(sums), rtol=1e-6, atol=1e-6)
    upstream = torch.randn(6).double()
    found.backward(upstream.to(found.dtype))
    torch.stack(sums).backward(upstream)
    torch.testing.assert_close(
        logits.grad.double(), wide.grad, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-9
    )


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must be \(2, 5\) like logits, got \(2, 4\)"):
        get_batch_logps(torch.randn(2, 5, 7), torch.zeros(2, 4, dtype=torch.int64))


TINY: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2", "bias"])
def test_the_forward_gives_log_probs_and_means_of_logits(name: str):
    if name == "cohere":
        model: Any = CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.25))
    elif name == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=1.5))
    else:
        model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False))
    if name == "bias":
        model.lm_head = torch.nn.Linear(16, 37)
    forward = forward_of(model.eval())
    assert isinstance(forward, RowMeansForward)
    ids = torch.randint(0, 37, (4, 6))
    rows, targets = torch.tensor([1, 2, 9, 22]), torch.tensor([5, 0, 36, 7])
    with forward.installed():
        found = model(input_ids=ids, logprob_rows=rows, logprob_targets=targets)
    logits = model(input_ids=ids).logits
    logps = logits.flatten(0, 1)[rows].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found["logprob"], logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["all_logits"], logits.detach().mean((1, 2)), rtol=1e-4, atol=1e-6)
    assert not found["all_logits"].requires_grad


def test_models_of_another_form_are_named(monkeypatch: pytest.MonkeyPatch):
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    assert isinstance(forward_of(model), RowMeansForward)
    model.forward = lambda *args, **kwargs: None
    assert forward_of(model) == "something else has replaced its forward"
    del model.forward
    theirs = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, *args, **kwargs: theirs(self, *args, **kwargs))
    assert forward_of(model) == "something else has replaced its forward"
    monkeypatch.undo()
    model.lm_head.weight.ds_id = 0
    assert "ZeRO-3" in str(forward_of(model))
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert forward_of(model) == "its head is a torch.nn.modules.container.Sequential"
    model.config.is_encoder_decoder = True
    assert forward_of(model) == "it is not a text-only causal language model"


def test_logits_that_are_not_the_heads_are_noticed():
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    # a final layer of which `logit_transform` knows nothing
    model.lm_head.forward = lambda hidden: 3 * torch.nn.functional.linear(hidden, model.lm_head.weight)
    assert forward_of(model) == "they are not what the head's weight gives"
