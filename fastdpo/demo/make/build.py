"""`python -m fastdpo.demo.make.build [FOLDER]`: makes every file of the demo again, in FOLDER or in this package.

Writes train.jsonl, heldout.jsonl and model/: a byte-level BPE tokenizer trained on the demo's own sentences,
and a small Llama trained from scratch, on one thread, to answer each question politely and carelessly in
equal shares. The pairs come out the same to the byte; the weights to rounding (torch promises no more from
one version or processor to another).
"""

import sys
from pathlib import Path
from random import Random
from typing import cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.demo.make.pairs import build_conversations, build_pairs, to_jsonl

SEED = 7
STEPS = 800
QUESTIONS_PER_STEP = 24
PEAK_LEARNING_RATE = 3e-3
VOCABULARY = 800

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant, got ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens on the demo's training sentences, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for turn in build_conversations(Random(SEED)) for text in turn), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, steps: int = STEPS) -> tuple[LlamaForCausalLM, float]:
    """Trains the start model, fp32, on one thread; (model, mean loss of the last 50 steps, nats)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = LlamaForCausalLM(_config(tokenizer))
        return model, _train(model, tokenizer, steps)
    finally:
        torch.set_num_threads(threads)


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps, pct_start=0.1)
    random, turns, recent = Random(SEED), [], []
    model.train()
    for step in range(steps):
        while len(turns) < QUESTIONS_PER_STEP:
            turns.extend(build_conversations(random))
        now, turns = turns[:QUESTIONS_PER_STEP], turns[QUESTIONS_PER_STEP:]
        answers = [(question, answer) for question, *both in now for answer in both]
        loss = _answer_loss(model, tokenizer, answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], loss.item()]
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} of {steps}: loss {sum(recent) / len(recent):.4f}", file=sys.stderr)
    model.eval()
    return sum(recent) / len(recent)


def _answer_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]) -> Tensor:
    """Mean negative log-prob of the answers' tokens, nats; the questions' tokens are not scored."""
    heads = [f"{BEGIN}<|user|>{question}{END}<|assistant|>" for question, _ in turns]
    tails = [f"{answer}{END}" for _, answer in turns]
    head_ids, tail_ids = tokenizer(heads)["input_ids"], tokenizer(tails)["input_ids"]
    ids = [torch.tensor(h + t) for h, t in zip(head_ids, tail_ids, strict=True)]
    labels = [torch.tensor([-100] * len(h) + t) for h, t in zip(head_ids, tail_ids, strict=True)]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    # right padding under a causal mask: no scored token sees it
    logits = model(input_ids=batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def write_pairs(folder: Path) -> None:
    train, heldout = build_pairs()
    (folder / "train.jsonl").write_bytes(to_jsonl(train).encode())
    (folder / "heldout.jsonl").write_bytes(to_jsonl(heldout).encode())


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    folder = Path(arguments[0]) if arguments else Path(__file__).parents[1]
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(folder)
    tokenizer = build_tokenizer()
    model, _ = build_model(tokenizer)
    model.generation_config.max_new_tokens = 48
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # safetensors writes for the owner alone; package data is for every user
    (folder / "model" / "model.safetensors").chmod(0o644)
    return 0


if __name__ == "__main__":
    sys.exit(main())
