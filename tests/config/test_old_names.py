"""Arguments of older TRL and transformers releases: each with its old meaning and one line; typos are answered."""

import dataclasses
import inspect
import logging
import os
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from fastdpo.config.dpo_config import DPOConfig
from fastdpo.config.old_names import OLD_NAMES, todays_init_kwargs
from fastdpo.data.tokenize_dataset import tokenize_dataset
from fastdpo.models.load import load_tokenizer
from fastdpo.training.trainer import DPOTrainer

VOCABULARY = 31


def config(**options: Any) -> DPOConfig:
    return DPOConfig(**{"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", **options})


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="</s>")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes))


def pairs(*rows: tuple[int, int, int]) -> Dataset:
    """Rows with that many tokens in prompt, chosen and rejected, numbered from 1."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([{c: list(range(1, n + 1)) for c, n in zip(columns, row, strict=True)} for row in rows])


class Divergence(Enum):
    JS = "js_divergence"


# name, value, today's arguments, words of the one line
CASES: list[tuple[str, Any, dict[str, Any], str]] = [
    ("max_target_length", 7, {"max_completion_length": 7}, "is max_completion_length today"),
    ("evaluation_strategy", "steps", {"eval_strategy": "steps"}, "is eval_strategy today"),
    ("warmup_ratio", 0.1, {"warmup_steps": 0.1}, "is a warmup_steps below 1 today"),
    ("group_by_length", False, {"train_sampling_strategy": "random"}, "is train_sampling_strategy"),
    ("group_by_length", True, {"train_sampling_strategy": "group_by_length"}, "is train_sampling_strategy"),
    ("no_cuda", True, {"use_cpu": True}, "is use_cpu today"),
    ("per_gpu_train_batch_size", 3, {"per_device_train_batch_size": 3}, "is per_device_train_batch_size today"),
    ("per_gpu_eval_batch_size", 3, {"per_device_eval_batch_size": 3}, "is per_device_eval_batch_size today"),
    ("push_to_hub_token", "secret", {"hub_token": "secret"}, "is hub_token today"),
    ("base_model_attribute_name", "model", {}, "has no effect"),
    ("force_use_ref_model", True, {}, "is always the reference"),
    ("is_encoder_decoder", False, {}, "every model is a causal one"),
    ("label_pad_token_id", -100, {}, "no labels"),
    ("padding_value", 0, {}, "padding is masked"),
    ("use_liger_loss", True, {}, "no logits but those of scored tokens"),
    ("use_logits_to_keep", True, {}, "no logits but those of scored tokens"),
    ("overwrite_output_dir", True, {}, "never resumed unasked"),
    ("save_safetensors", False, {}, "always saved as safetensors"),
    ("fp16_backend", "auto", {}, "autocast"),
    ("fp16_opt_level", "O1", {}, "autocast"),
    ("half_precision_backend", "auto", {}, "autocast"),
    ("include_inputs_for_metrics", True, {}, "compute_metrics gets"),
    ("use_mps_device", True, {}, "has no effect"),
    ("logging_dir", "runs", {}, "TENSORBOARD_LOGGING_DIR"),
]


def test_every_old_name_has_a_case() -> None:
    assert {name for name, *_ in CASES} == OLD_NAMES.keys()


@pytest.mark.parametrize(("name", "value", "today", "words"), CASES, ids=[f"{n}={v}" for n, v, *_ in CASES])
def test_an_old_name_keeps_its_meaning_and_says_one_line(
    name: str, value: Any, today: dict[str, Any], words: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in DPOConfig.__dataclass_fields__:
        pytest.skip("this transformers release has it still")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")
    new = "use_cpu" if name != "no_cuda" else "fp16"
    args = DPOConfig(**{new: new == "use_cpu", "bf16": False, "eval_steps": 5, name: value})
    (line,) = [line for line in caplog.messages if line.startswith(f"{name} ")]
    assert words in line
    assert line.endswith(".")
    for field, wanted in today.items():
        found = getattr(args, field)
        assert getattr(found, "value", found) == wanted
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == ("runs" if name == "logging_dir" else "before")
    caplog.clear()
    assert DPOConfig(use_cpu=True, bf16=False, **{name: None})
    assert caplog.messages == []


def test_warmup_ratio_gives_the_steps_that_it_gave() -> None:
    for ratio, wanted in ((0.0, 0), (0.03, 6), (0.5, 100), (1.0, 200)):
        assert config(warmup_ratio=ratio).get_warmup_steps(200) == wanted
    assert config(warmup_ratio=0.5, warmup_steps=0).get_warmup_steps(200) == 100
    # warmup_steps always went first
    assert config(warmup_ratio=0.5, warmup_steps=7).get_warmup_steps(200) == 7
    with pytest.raises(ValueError, match=r"warmup_ratio must be in \[0, 1\], got 1.5"):
        config(warmup_ratio=1.5)


def test_today_s_name_goes_first(caplog: Any) -> None:
    args = config(max_target_length=5, max_completion_length=9)
    assert args.max_completion_length == 9
    assert caplog.messages == ["max_target_length is max_completion_length today, which is given too and goes first."]


def test_unknown_names_are_answered_with_the_closest() -> None:
    for name, near in (("max_lenght", "max_length"), ("max_promt_length", "max_prompt_length"), ("betta", "beta")):
        with pytest.raises(TypeError, match=f"^DPOConfig has no argument '{name}'; did you mean '{near}'\\?$"):
            config(**{name: 1})
        with pytest.raises(TypeError, match=f"^DPOTrainer has no argument '{name}'; did you mean '{near}'\\?$"):
            DPOTrainer(model(), args=config(), processing_class=tokenizer(), **{name: 1})
    with pytest.raises(TypeError, match=r"^DPOConfig has no argument 'qqqqq'"):
        config(qqqqq=1)
    with pytest.raises(TypeError, match=r"^DPOTrainer has no argument 'qqqqq'; it takes model, ref_model, args"):
        DPOTrainer(model(), qqqqq=1)
    with pytest.raises(ValueError, match="is_encoder_decoder is True, and fastdpo trains causal"):
        config(is_encoder_decoder=True)


def test_the_constructor_is_still_a_dataclass_s(tmp_path: Path) -> None:
    args = config(max_target_length=5, beta=0.3)
    again = dataclasses.replace(args, beta=0.5)
    assert (again.beta, again.max_completion_length) == (0.5, 5)
    assert dataclasses.replace(config(), max_target_length=6).max_completion_length == 6
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
    names = inspect.signature(DPOConfig).parameters
    assert "beta" in names
    assert "max_target_length" not in names
    (parsed,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(
        ["--use_cpu", "--max_prompt_length", "9", "--tools", '[{"name": "a, b"}]', "--output_dir", str(tmp_path)]
    )
    assert (parsed.max_prompt_length, parsed.tools) == (9, '[{"name": "a, b"}]')
    assert DPOConfig(str(tmp_path), use_cpu=True).output_dir == str(tmp_path)


def test_trl_s_arguments_that_change_nothing_say_so(caplog: Any) -> None:
    config(padding_free=False, activation_offloading=False)
    assert caplog.messages == []
    config(padding_free=True, activation_offloading=True)
    assert caplog.messages[0] == "padding_free has no effect; batch_layout='auto' decides."
    assert caplog.messages[1].startswith("activation_offloading is not used")
    assert len(caplog.messages) == 2


def test_a_divergence_of_trl_s_old_enum_is_taken() -> None:
    assert config(f_divergence_type=Divergence.JS).f_divergence_type == "js_divergence"


# from_pretrained


def test_dropped_arguments_of_from_pretrained(caplog: Any) -> None:
    args = config(model_init_kwargs={"torch_dtype": "bfloat16", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert args.model_init_kwargs == {"dtype": "bfloat16", "quantization_config": wanted}
    assert len(caplog.messages) == 2
    caplog.clear()
    dataclasses.replace(args, beta=0.2)
    assert caplog.messages == []
    from_text = config(ref_model_init_kwargs='{"torch_dtype": "float16", "load_in_8bit": false}')
    assert from_text.ref_model_init_kwargs == {"dtype": "float16"}
    with pytest.raises(ValueError, match="model_init_kwargs has a quantization_config and load_in_4bit"):
        config(model_init_kwargs={"quantization_config": wanted, "load_in_4bit": True})
    assert todays_init_kwargs({"torch_dtype": "float16", "dtype": "float32"}, "x") == {"dtype": "float32"}


def test_the_quantization_config_is_one_that_transformers_reads() -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig

    options = todays_init_kwargs({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, "x")
    read: Any = AutoQuantizationConfig.from_dict(options["quantization_config"])
    assert read.load_in_4bit
    assert not read.load_in_8bit
    assert read.bnb_4bit_compute_dtype == torch.bfloat16


def test_the_reference_is_loaded_with_its_own_arguments(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "base")
    path = str(tmp_path / "base")
    for own, wanted in ((None, torch.float16), ({"dtype": "float32"}, torch.float32), ({}, torch.bfloat16)):
        args = config(output_dir=str(tmp_path), model_init_kwargs={"dtype": "float16"}, ref_model_init_kwargs=own)
        policy = model().to(torch.bfloat16) if own == {} else path
        if own == {}:
            args.model_init_kwargs = None
        trainer = DPOTrainer(policy, path, args, train_dataset=pairs((2, 2, 3)), processing_class=tokenizer())
        assert trainer._reference.model.dtype == wanted  # pyright: ignore[reportAttributeAccessIssue] a FrozenModel


# data


def test_prompts_lose_their_start_and_completions_their_end() -> None:
    rows = pairs((6, 5, 2), (2, 2, 4), (3, 2, 2))
    limits: Any = {"max_length": 16, "max_prompt_length": 3, "max_completion_length": 3}
    cut, report = tokenize_dataset(rows, tokenizer(), **limits)
    assert cut.to_list()[0] == {"prompt_ids": [4, 5, 6], "chosen_ids": [1, 2, 3], "rejected_ids": [1, 2]}
    assert cut.to_list()[1:] == pairs((2, 2, 3), (3, 2, 2)).to_list()
    assert (report.shortened_prompts, report.shortened_chosen, report.shortened_rejected) == (1, 1, 1)
    assert "max_prompt_length cuts 1 prompt from the left" in str(report)
    assert "max_completion_length cuts 1 chosen and 1 rejected" in str(report)

    def stream() -> Any:
        yield from rows

    streamed, _ = tokenize_dataset(IterableDataset.from_generator(stream), tokenizer(), **limits)
    assert list(streamed) == cut.to_list()
    # a prompt that would fill max_length stays, since it is cut first
    limits["max_length"] = 5
    kept, report = tokenize_dataset(rows, tokenizer(), **limits)
    assert len(kept) == 3
    assert report.dropped_long_prompt == 0
    assert (report.truncated_chosen, report.truncated_rejected) == (1, 0)
    unlimited, report = tokenize_dataset(rows, tokenizer(), max_length=5)
    assert len(unlimited) == 2
    assert "cuts 1 prompt" not in str(report)


def test_the_trainer_cuts_prompts_and_says_so(tmp_path: Path, caplog: Any) -> None:
    args = config(output_dir=str(tmp_path), max_prompt_length=3)
    trainer = DPOTrainer(model(), args=args, train_dataset=pairs((6, 5, 2)), processing_class=tokenizer())
    assert trainer.train_dataset[0]["prompt_ids"] == [4, 5, 6]
    assert any("max_prompt_length cuts 1 prompt from the left" in line for line in caplog.messages)
    for name in ("max_prompt_length", "max_completion_length"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            config(**{name: 0})


def test_tools_of_the_config_are_for_rows_without_any() -> None:
    def weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name.
        """
        return city

    args = config(tools=[weather, {"name": "other"}])
    assert '"name": "weather"' in str(args.tools)
    assert dataclasses.replace(args, beta=0.2).tools == args.tools
    chat = tokenizer()
    chat.chat_template = "{% for tool in tools or [] %}w2{% endfor %}{{ messages[-1]['content'] }}"
    turns = {"prompt": [{"role": "user", "content": "w3"}]}
    turns |= {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "w4"), ("rejected", "w5"))}
    own = '[{"name": "a"}, {"name": "b"}, {"name": "c"}]'
    seen = []

    def spy(messages: Any, tools: Any = None, tokenize: bool = True, **_: Any) -> Any:
        if not tokenize:
            return str([messages, tools])
        seen.append(len(tools or []))
        return {"input_ids": [3] if len(messages) == 1 else [3, 4]}

    chat.apply_chat_template = spy  # pyright: ignore[reportAttributeAccessIssue]
    rows = Dataset.from_list([{**turns, "tools": None}, {**turns, "tools": own}])
    tokenize_dataset(rows, chat, max_length=None, tools=str(args.tools))
    assert seen[-6:] == [2, 2, 2, 3, 3, 3]
    with pytest.raises(ValueError, match="tools is not JSON"):
        config(tools="[{")
    with pytest.raises(ValueError, match="tools must be a list of tools, got dict"):
        config(tools="{}")


def test_pad_token_of_the_config() -> None:
    tokens = tokenizer()
    assert load_tokenizer(tokens, None, config(pad_token="w3")).pad_token_id == 3
    assert load_tokenizer(tokenizer(), None, config()).pad_token == "</s>"
    with pytest.raises(ValueError, match="pad_token is 'pad', which the tokenizer does not have"):
        load_tokenizer(tokens, None, config(pad_token="pad"))


# the trainer


def test_the_trainer_takes_what_trl_s_takes_in_its_order() -> None:
    trl = pytest.importorskip("trl")
    theirs = list(inspect.signature(trl.DPOTrainer.__init__).parameters)
    assert list(inspect.signature(DPOTrainer.__init__).parameters) == [*theirs, "tokenizer", "old_arguments"]


def test_arguments_of_the_old_trainer(tmp_path: Path, caplog: Any) -> None:
    args = config(output_dir=str(tmp_path), beta=0.3, max_length=64)
    trainer = DPOTrainer(
        model(),
        None,
        args=args,
        train_dataset=pairs((6, 5, 2)),
        tokenizer=tokenizer(),
        beta=0.05,
        max_length=12,
        max_prompt_length=4,
        max_target_length=3,
        loss_type="ipo",
        label_pad_token_id=-100,
        model_init=None,
        preprocess_logits_for_metrics=None,
    )
    assert (trainer.args.beta, trainer.args.max_length, trainer.args.loss_type) == (0.05, 12, ["ipo"])
    assert trainer._objective.options.beta == 0.05
    assert trainer.train_dataset[0] == pairs((6, 3, 2))[0] | {"prompt_ids": [3, 4, 5, 6]}
    (line,) = [line for line in caplog.messages if "in DPOConfig; using the value" in line]
    assert line.startswith(
        "Pass beta, max_length, max_prompt_length, max_target_length, loss_type, label_pad_token_id in "
    )
    assert "tokenizer= is now processing_class=; using it." in caplog.messages
    assert args.beta == 0.3
    for name, words in (("model_init", "pass the model itself"), ("preprocess_logits_for_metrics", "logits are never")):
        with pytest.raises(TypeError, match=f"DPOTrainer takes no {name}: {words}"):
            DPOTrainer(model(), args=args, **{name: len})


def test_plain_training_arguments_are_taken_as_they_are(tmp_path: Path, caplog: Any) -> None:
    plain: Any = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=1, report_to="none"
    )
    options: Any = {"train_dataset": pairs((2, 2, 3), (3, 3, 2)), "processing_class": tokenizer()}
    with caplog.at_level(logging.WARNING):
        trainer = DPOTrainer(model(), args=plain, **options, beta=0.2)
    assert isinstance(trainer.args, DPOConfig)
    assert (trainer.args.beta, trainer.args.max_steps, trainer.args.learning_rate) == (0.2, 2, plain.learning_rate)
    assert any(line.startswith("args are TrainingArguments: ") for line in caplog.messages)
    trainer.train()
    assert trainer.state.global_step == 2
    wrong: Any = {"beta": 0.1}
    with pytest.raises(TypeError, match="args must be a fastdpo DPOConfig, got dict"):
        DPOTrainer(model(), args=wrong)


def test_trl_s_own_config_is_taken(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    theirs = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.7, loss_type=["ipo"], max_steps=1)
    trainer = DPOTrainer(model(), args=theirs, train_dataset=pairs((2, 2, 3)), processing_class=tokenizer())
    assert (trainer.args.beta, trainer.args.loss_type, trainer.args.max_steps) == (0.7, ["ipo"], 1)
