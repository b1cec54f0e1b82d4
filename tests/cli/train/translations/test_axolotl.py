"""axolotl configurations: what keys become together, and the texts that its dataset types write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.parsing import parse
from fastdpo.cli.train.translations.axolotl_data import TEMPLATES, read_dataset
from fastdpo.cli.train.translations.templates import CHATML, LLAMA3
from fastdpo.data.mixtures import load_mixture, parse_mixture

ALWAYS = {
    "model_name_or_path": "m",
    "max_length": 512,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "lr_scheduler_type": "cosine",
    "on_overlong": "drop",
    "save_strategy": "epoch",
    "eval_strategy": "no",
    "warmup_steps": 0.03,
}


@pytest.fixture
def values(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """values(text, *arguments): the arguments of a configuration of the model m that says rl: dpo and `text`."""

    def read(text: str, *arguments: str) -> dict[str, Any]:
        path = tmp_path / "dpo.yaml"
        path.write_text(f"base_model: m\n{'' if text.startswith('rl:') else 'rl: dpo'}\n{text}\n")
        return parse([str(path), *arguments]).values

    return read


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("", {}),
        ("rl: ipo", {"loss_type": "ipo"}),
        ("rl: orpo\norpo_alpha: 0.2", {"loss_type": "orpo", "beta": 0.2}),
        (
            "rl: simpo\nrl_beta: 2\nsimpo_gamma: 1",
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "rpo_alpha": 1.0},
        ),
        ("rl: simpo\ncpo_alpha: 0", {"loss_type": "simpo", "rpo_alpha": 0.0}),
        (
            "rl: kto\nkto_desirable_weight: 0.2\nkto_undesirable_weight: 1",
            {"loss_type": "kto", "desirable_weight": 0.2, "undesirable_weight": 1.0},
        ),
        (
            "dpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [1, 0.1]",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
        ),
        ("trl:\n  beta: 0.3\n  sync_ref_model: true", {"beta": 0.3, "sync_ref_model": True}),
        (
            "sequence_len: 64\nmicro_batch_size: 4",
            {"max_length": 64, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
        ),
        ("excess_length_strategy: raise", {"on_overlong": "error"}),
        ("warmup_steps: 10", {"warmup_steps": 10.0}),
        ("warmup_ratio: 0.2", {"warmup_steps": 0.2}),
        ("lr_scheduler: linear\noptimizer: adamw_torch", {"lr_scheduler_type": "linear", "optim": "adamw_torch"}),
        (
            "cosine_min_lr_ratio: 0.1\nlr_scheduler: cosine",
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        ("bf16: auto\ntf32: auto\nfp16: null", {}),
        ("bf16: full\ngradient_checkpointing: offload", {"bf16": True, "gradient_checkpointing": True}),
        ("flash_attention: true\nsdp_attention: false", {"attn_implementation": "flash_attention_2"}),
        ("fsdp: [full_shard, auto_wrap]", {"fsdp": "full_shard auto_wrap"}),
        (
            "adapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_target_linear: true\nlora_target_modules: [q_proj]",
            {
                "use_peft": True,
                "load_in_4bit": True,
                "use_bnb_nested_quant": True,
                "lora_r": 8,
                "lora_dropout": 0.0,
                "lora_target_modules": "all-linear",
            },
        ),
        ("adapter: lora\nlora_model_dir: sft\nlora_r: 8", {"adapter_name_or_path": ["sft"]}),
        ("lora_r: 8\nlora_dropout: 0.1", {}),
        (
            "val_set_size: 0.05\nevals_per_epoch: 4\nnum_epochs: 2",
            {"test_split_size": 0.05, "eval_strategy": "steps", "eval_steps": 0.125, "num_train_epochs": 2.0},
        ),
        ("val_set_size: 0.0\nevals_per_epoch: 4", {}),
        ("val_set_size: 10", {"test_split_size": 10.0, "eval_strategy": "epoch"}),
        ("saves_per_epoch: 1", {"save_strategy": "steps", "save_steps": 0.999}),
        ("save_steps: 50", {"save_strategy": "steps", "save_steps": 50.0}),
        ("use_wandb: true\nwandb_name: a\nwandb_project: p", {"report_to": "wandb", "run_name": "a"}),
        ("special_tokens:\n  pad_token: <pad>\n  eos_token: <eos>", {"pad_token": "<pad>"}),
        ("chat_template: chatml", {"chat_template": CHATML}),
        ("chat_template: tokenizer_default", {}),
        ("chat_template: jinja\nchat_template_jinja: my.jinja", {"chat_template": "my.jinja"}),
        ("context_parallel_size: 1\ntensor_parallel_size: 1", {}),
        (
            "test_datasets:\n- path: held.jsonl\n  split: train\n  type: chatml.ultra",
            {"eval_dataset_name": "held.jsonl", "dataset_test_split": "train", "eval_strategy": "epoch"},
        ),
        (
            "datasets:\n- path: a\n  type: chatml.intel\n  split: train\n- path: b\n  type: chatml.argilla",
            {
                "datasets": [
                    {"path": "a", "split": "train", "columns": {"instruction": "question"}},
                    {"path": "b", "columns": {"chosen": "chosen_response", "rejected": "rejected_response"}},
                ],
                "chat_template": CHATML,
            },
        ),
    ],
)
def test_what_keys_become(values: Callable[..., dict[str, Any]], text: str, becomes: dict[str, Any]):
    assert values(text) == {**ALWAYS, **becomes}


def test_the_command_line_goes_before_the_file(values: Callable[..., dict[str, Any]]):
    text = "rl_beta: 0.1\ndatasets:\n- path: a\n  type: chatml.intel"
    arguments = values(text, "-d", "other.jsonl", "--rl_beta", "0.3", "micro_batch_size=4")
    assert (arguments["dataset_name"], arguments["beta"], arguments["per_device_train_batch_size"]) == (
        "other.jsonl",
        0.3,
        4,
    )
    assert "datasets" not in arguments


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rl: grpo", "rl is grpo, and fastdpo trains dpo, ipo, orpo, simpo, kto"),
        ("adapter: llama-adapter", "adapter is llama-adapter, which is not supported: use lora or qlora"),
        ("context_parallel_size: 2", "context_parallel_size is not supported: start one process for each GPU instead"),
        (
            "datasets:\n- path: a\n  type: chatml.mine",
            r"datasets\[0\]: type chatml.mine is not supported: use one of default",
        ),
        (
            "datasets:\n- path: a\n  type: my.module",
            r"datasets\[0\]: type my.module is not supported: use one of chatml",
        ),
        (
            "datasets:\n- path: a\n  type:\n    prompt_format: '[INST] {prompt}'",
            r"datasets\[0\]: prompt_format '\[INST\] \{prompt\}' is not supported: use type chat_template.default",
        ),
        (
            "datasets:\n- path: a\n  type: chatml.intel\n- path: b\n  type: llama3.intel",
            "datasets: types of several chat templates do not mix",
        ),
        (
            "datasets:\n- path: a\n  type: chat_template\n  roles:\n    user: [asker]",
            r"datasets\[0\]: roles gives user the names asker: rename them in the rows",
        ),
        ("datasets:\n- path: a\n  type: chatml\n  shards: 4", r"datasets\[0\]: shards is not supported"),
        ("micro_batch_sze: 4", "there is no key 'micro_batch_sze': did you mean 'micro_batch_size'"),
    ],
)
def test_a_wrong_key_is_one_sentence(values: Callable[..., dict[str, Any]], text: str, sentence: str):
    with pytest.raises(UsageError, match=rf"dpo\.yaml:\d: {sentence}"):
        values(text)


def test_without_rl_it_is_another_training(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("base_model: m\nmicro_batch_size: 1\n")
    with pytest.raises(
        UsageError, match=r"a\.yaml:1: base_model is axolotl's, without rl it trains on texts: add `rl: "
    ):
        parse([str(tmp_path / "a.yaml")])


# the texts that a type writes: of the question Q, the answers A and B, and the system message S

MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
WORSE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chatml", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("chatml.default", {"input": "Q", "chosen_response": "A", "rejected_response": "B"}),
        ("chatml", {"question": "Q", "chosen": "A", "rejected": "B"}),
        ("llama3", {"instruction": "Q", "chosen": "A", "rejected": "B"}),
        ("chatml.argilla", {"instruction": "Q", "chosen_response": "A", "rejected_response": "B"}),
        ("chatml.icr", {"input": "Q", "chosen": "A", "rejected": "B"}),
        ("chatml.intel", {"question": "Q", "chosen": "A", "rejected": "B"}),
        ("intel_apply_chatml", {"question": "Q", "chosen": "A", "rejected": "B"}),
        ("llama3.prompt_pairs", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("chatml.ultra", {"prompt": "Q", "chosen": MESSAGES, "rejected": WORSE}),
        ("llama3.argilla_chat", {"chosen": MESSAGES, "rejected": WORSE}),
        ("chat_template.argilla", {"prompt": "Q", "chosen": MESSAGES, "rejected": WORSE}),
        ("chat_template", {"messages": MESSAGES[:1], "chosen": MESSAGES[1], "rejected": WORSE[1]}),
        ("zephyr.nectar", {"prompt": "Q", "answers": [{"answer": "A", "rank": 1}, {"answer": "B", "rank": 2}]}),
    ],
)
@pytest.mark.parametrize("system", [False, True])
def test_the_text_of_each_type(write: Callable[..., str], kind: str, row: dict[str, Any], system: bool):
    from transformers.utils.chat_template_utils import render_jinja_template

    if system and "prompt" not in row and kind.split(".")[-1] in ("argilla_chat", "chat_template"):
        pytest.skip("its system message is a turn")
    row = {**row, "system": "S"} if system else row
    spec, template = read_dataset({"path": write("rows.jsonl", row), "type": kind}, "datasets[0]", "dpo")
    pair = load_mixture(parse_mixture([spec]))[0]
    assert template == TEMPLATES["chatml" if "chatml" in kind else kind.split(".")[0]]
    turns = [*([{"role": "system", "content": "S"}] if system else []), MESSAGES[0]]
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in pair["prompt"]]
    assert prompt == turns
    assert [pair[side][-1]["content"] for side in ("chosen", "rejected")] == ["A", "B"]
    if template is None:
        return
    texts, _ = render_jinja_template(conversations=[[*prompt, pair["chosen"][-1]]], chat_template=template)
    written = {
        CHATML: ("<|im_start|>{}\n{}<|im_end|>\n", "<|im_start|>assistant\nA<|im_end|>\n"),
        LLAMA3: (
            "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        ),
    }[template]
    assert texts[0] == "".join(written[0].format(turn["role"], turn["content"]) for turn in turns) + written[1]


@pytest.mark.parametrize(
    ("kind", "column"), [("chatml.argilla", "instruction"), ("llama3.ultra", "prompt"), ("chatml.intel", "question")]
)
def test_rows_of_kto_become_messages(write: Callable[..., str], kind: str, column: str):
    rows = [{column: "Q", "completion": "A", "label": True}, {column: "Q", "completion": "B", "label": False}]
    spec, _ = read_dataset({"path": write("rows.jsonl", *rows), "type": kind}, "datasets[0]", "kto")
    dataset = load_mixture(parse_mixture([spec]))
    assert [row["label"] for row in dataset] == [True, False]
    assert [row["prompt"][0]["content"] for row in dataset] == ["Q", "Q"]
    assert [row["completion"][0]["content"] for row in dataset] == ["A", "B"]


def test_fields_under_other_names(write: Callable[..., str]):
    path = write("rows.jsonl", {"ask": "Q", "good": " A", "bad": " B"})
    kind = {"field_prompt": "ask", "field_chosen": "good", "field_rejected": "bad"}
    spec, template = read_dataset({"path": path, "type": kind}, "datasets[0]", "dpo")
    assert template is None
    assert load_mixture(parse_mixture([spec]))[0] == {"prompt": "Q", "chosen": " A", "rejected": " B"}
    turns = [{"from": "human", "value": "Q"}]
    path = write(
        "turns.jsonl", {"talk": turns, "good": {"from": "gpt", "value": "A"}, "bad": {"from": "gpt", "value": "B"}}
    )
    entry = {"path": path, "type": "chat_template.default", "field_messages": "talk", "field_chosen": "good"}
    mapping = {"message_property_mappings": {"role": "from", "content": "value"}, "roles": {"user": ["human"]}}
    spec, _ = read_dataset({**entry, "field_rejected": "bad", **mapping}, "datasets[0]", "dpo")
    assert load_mixture(parse_mixture([spec]))[0]["prompt"][0]["content"] == "Q"
