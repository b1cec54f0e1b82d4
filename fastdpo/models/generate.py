"""An answer to a prompt: its ids, the model's answer, and where that ends."""

from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastdpo.data.rows.messages import Message, for_template
from fastdpo.data.template_bounds import check_template
from fastdpo.data.tokenize_row import template_ids
from fastdpo.models.forward import unwrap_peft

Prompt = str | list[Message]


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, raw: bool = False) -> list[int]:
    """Messages through the chat template with its generation prompt; text as a user message, or as it is.

    Text stays as it is where the tokenizer has no chat template, and with `raw`.
    Raises ValueError for messages where there is no template, or one that refuses them or never ends.
    """
    if isinstance(prompt, str):
        if raw or tokenizer.chat_template is None:
            encoded: Any = tokenizer(prompt)
            return encoded["input_ids"]
        prompt = [{"role": "user", "content": prompt}]
    elif tokenizer.chat_template is None:
        raise ValueError("a prompt is a list of messages, and the tokenizer has no chat template; give prompts as text")
    messages = for_template(prompt)
    check_template(tokenizer, [(messages, True)], {}, "the prompt")
    try:
        return template_ids(tokenizer, messages, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a prompt: {error}") from error


def generate_answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int], max_new_tokens: int, temperature: float, seed: int
) -> list[int]:
    """The answer's ids, its EOS token included; the generator is seeded.

    temperature 0 is greedy. The model answers in the mode that it is in.
    """
    ends = sorted(_end_ids(model, tokenizer))
    # in place of the model's own, whose sampling settings would come in beside ours
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
    )
    inner: Any = unwrap_peft(model)
    own_config, inner.generation_config = inner.generation_config, config
    torch.manual_seed(seed)
    prompt = torch.tensor([ids], device=model.device)
    try:
        with torch.no_grad():
            output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
    finally:
        inner.generation_config = own_config
    return output[0, len(ids) :].tolist()


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    config = getattr(unwrap_peft(model), "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {token for token in ids if isinstance(token, int)}
