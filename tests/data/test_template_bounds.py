"""Chat templates that take too much are refused after one row; others are not held up, and not changed."""

import logging
import os
import subprocess
import time
from typing import Any

import pytest
from datasets import Dataset
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastdpo.data import template_bounds
from fastdpo.data.errors import DataError
from fastdpo.data.tokenize_dataset import tokenize_dataset

MESSAGES = [{"role": "user", "content": "hello"}]
PAIR = {
    "prompt": MESSAGES,
    "chosen": [{"role": "assistant", "content": "b"}],
    "rejected": [{"role": "assistant", "content": "c"}],
}
# what templates of released models use: transformers' own tags, filters and names
ORDINARY = (
    "{%- set ns = namespace(seen=0) -%}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
    "{% if m.role == 'nobody' %}{{ raise_exception('no') }}{% endif %}"
    "{% generation %}{{ m | tojson }}{% endgeneration %}"
    "{{ eos_token }}{{ strftime_now('%Y')[:1] }}{% set ns.seen = ns.seen + 1 %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "_tried", set())


@pytest.fixture
def tokenizer() -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<u>": 0, "</s>": 1}, "<u>")))
    made.eos_token = "</s>"
    return made


def check(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    template_bounds.check_template(tokenizer, [(MESSAGES, True)], {"tools": None}, "train[0]")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' | center(2000000000) }}", "memory"),
        ("{{ '%01999999999d' % 1 }}", "memory"),
        ("{{ ([0] * 1000000000) | length }}", "memory"),
        (
            "{% set ns = namespace(a='x') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
            "(memory|seconds)",  # the one that ends first: it writes all that it takes
        ),
        ("{{ range(99999) | list | map('string') | join('x' * 99999) | length }}", "memory"),
        ("{{ 'x' * 3000000 }}", "makes 3,000,000 characters"),
        ("{% if add_generation_prompt %}{{ 'x' * 2000000000 }}{% endif %}", "memory"),
    ],
)
def test_a_template_that_takes_too_much_is_refused(tokenizer: Any, template: str, reason: str) -> None:
    began = sum(os.times()[:4])
    with pytest.raises(DataError, match=rf"^train\[0\]: the tokenizer's chat template .*{reason}.* one row; give"):
        check(tokenizer, template)
    assert sum(os.times()[:4]) - began < 5


def test_time_is_the_processors(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "SECONDS", 1)
    macro = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}x{% endmacro %}{{ f(60) }}"
    with pytest.raises(DataError, match="takes more than 1 seconds for one row"):
        check(tokenizer, macro)


def test_an_ordinary_template_is_tried_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    began = time.perf_counter()
    check(tokenizer, ORDINARY)
    first = time.perf_counter() - began
    assert not caplog.records  # nothing of the template was unknown to the process that tried it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", None)
        check(tokenizer, ORDINARY)
    assert first < 3  # a tenth of that on an idle machine


def test_the_process_renders_what_transformers_does(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = ORDINARY
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    monkeypatch.setattr(template_bounds, "EXTRA_CHARACTERS", -1)
    monkeypatch.setattr(template_bounds, "TIMES_LONGER", 0)
    with pytest.raises(DataError, match=f"makes {len(text)} characters of one row"):
        check(tokenizer, ORDINARY)


def test_a_template_that_only_fails_is_left_to_the_rows(tokenizer: Any) -> None:
    check(tokenizer, "{{ 1 / 0 }}")
    check(tokenizer, "{{ raise_exception('never') }}")
    check(tokenizer, "{% if %}")
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(DataError, match="refuses this row: ZeroDivisionError: division by zero"):
        tokenize_dataset(Dataset.from_list([PAIR]), tokenizer, max_length=8)


def test_where_no_process_can_be_started_a_line_says_so(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with caplog.at_level(logging.WARNING):
        check(tokenizer, ORDINARY)
    assert "not tried on one row first" in caplog.text


def test_compares_prompts_are_rendered_under_the_same_rules(tokenizer: Any) -> None:
    from fastdpo.models.generate import prompt_ids

    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(ValueError, match="refuses a prompt: ZeroDivisionError") as caught:
        prompt_ids("hello", tokenizer)
    assert isinstance(caught.value.__cause__, TemplateError)
