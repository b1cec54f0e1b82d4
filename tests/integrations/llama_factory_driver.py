"""Trains by LLaMA-Factory, with and without the patch in one process, and writes what it saw to FOLDER/report.json.

Run by test_llama_factory_trainer.py, in an environment that has LLaMA-Factory: python llama_factory_driver.py FOLDER.
"""

# pyright: reportMissingImports=false
import copy
import json
import logging
import os
import pathlib
import sys

import llamafactory
import llamafactory.train.dpo.trainer as theirs
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from llamafactory.data.collator import PairwiseDataCollatorWithPadding
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import FinetuningArguments
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

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
shape = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 2,
}
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
    """Unpatched, and TRL's dpo_loss gets the loss."""

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
    arguments = {
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "per_device_eval_batch_size": 4,
    } | (training or {})
    return (trainer or theirs.CustomDPOTrainer)(
        model=policy,
        ref_model=reference,
        finetuning_args=finetuning,
        processor=None,
        tokenizer=tokenizer,
        args=transformers.Seq2SeqTrainingArguments(**arguments),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=PairwiseDataCollatorWithPadding(
            template=TEMPLATES["default"], model=policy, tokenizer=tokenizer, pad_to_multiple_of=8
        ),
    )


def watched(trainer):
    """Trains and reports: losses unrounded, what each was made of, metrics, the most positions that a head got."""
    seen = {"losses": [], "logps": [], "autocast": [], "head_rows": 0}
    heads = []
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
            heads += causal_lm.get_output_embeddings().modules()
            causal_lm.get_input_embeddings().register_forward_hook(
                lambda *_: seen["autocast"].append(torch.is_autocast_enabled("cpu"))
            )
    linear = torch.nn.Linear.forward

    def forward(self, x):
        if self.out_features == V and any(self is head for head in heads):
            seen["head_rows"] = max(seen["head_rows"], x.numel() // x.shape[-1])
        return linear(self, x)

    torch.nn.Linear.forward = forward
    try:
        return train_and_look(trainer, seen)
    finally:
        torch.nn.Linear.forward = linear


def train_and_look(trainer, seen):
    compute, preference = trainer.compute_loss, trainer.compute_preference_loss

    def compute_loss(*args, **kwargs):
        loss = compute(*args, **kwargs)
        seen["losses"].append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    def compute_preference_loss(*logps):
        seen["logps"].append([x.tolist() if x is not None else None for x in logps])
        return preference(*logps)

    trainer.compute_loss, trainer.compute_preference_loss = compute_loss, compute_preference_loss
    trainer.train()
    trainer.evaluate()
    logs = trainer.state.log_history
    rounded = ("loss", "eval_loss", "train_loss")
    seen["metrics"] = [
        {k: v for k, v in log.items() if k not in rounded and ("/" in k or "_loss" in k or k == "grad_norm")}
        for log in logs
    ]
    return seen


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
report = {"version": llamafactory.__version__, "plain": {}, "with_loss_type": {}, "patched": {}, "lines": {}}
before = dict(vars(theirs.CustomDPOTrainer)), theirs.get_batch_logps
for name, options in VARIANTS.items():
    report["plain"][name] = outcome(build, **options)
    if name in ("hinge", "ipo") and theirs.DPOTrainer.dpo_loss.__code__.co_argcount > 5:
        report["with_loss_type"][name] = outcome(build, trainer=WithLossType, **options)
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
