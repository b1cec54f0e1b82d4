"""What a model prefers among held-out pairs, and what it answers: before and after training, as plain text.

The log-probs come from the model's own logits, not from the code that trains it: the table is a second opinion.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastdpo.demo import SAMPLE_SEED


class PairScores(NamedTuple):
    """log p of the answers of B pairs under one model, nats, summed over an answer's tokens; (B,) fp64, CPU."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margins(self) -> Tensor:
        """log p(chosen) - log p(rejected), nats, (B,)."""
        return self.chosen - self.rejected

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer is the likelier one; a tie is half a hit."""
        return ((self.margins > 0).double() + 0.5 * (self.margins == 0)).mean().item()


@torch.no_grad()
def evaluate_pairs(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> PairScores:
    """log p of every answer in the batches of `DataCollatorForPreference`, pairs in their order.

    model: any causal LM, also a `PeftModel`; it runs in eval mode on its own device and is put back to the mode
        it was in. log-softmax is taken in fp32, the sums in fp64.

    Raises:
        ValueError: there is no batch.
    """
    training = model.training
    model.eval()
    try:
        sums = [_answer_logps(model, batch) for batch in batches]
    finally:
        model.train(training)
    if not sums:
        raise ValueError("evaluate_pairs got no batch; give it at least one pair.")
    halves = [s.chunk(2) for s in sums]
    return PairScores(torch.cat([chosen for chosen, _ in halves]), torch.cat([rejected for _, rejected in halves]))


def _answer_logps(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """(2B,) fp64 sums over each sequence's targets, on the CPU."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits.flatten(0, 1)[batch["rows"]]
    logps = torch.log_softmax(logits.float(), -1).gather(-1, batch["targets"][:, None])[:, 0].cpu()
    return torch.stack([part.double().sum() for part in logps.split(batch["offsets"].diff().tolist())])


@torch.no_grad()
def sample_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int = SAMPLE_SEED,
    *,
    temperature: float = 0.7,
    max_new_tokens: int = 48,
) -> list[str]:
    """One sampled answer to each question; the n-th is drawn from `seed + n`, whatever the model.

    tokenizer: one with a chat template. The caller's random state and the model's mode are left as they were.
    """
    training = model.training
    model.eval()
    answers = []
    try:
        for number, prompt in enumerate(prompts):
            turns = [{"role": "user", "content": prompt}]
            inputs: Any = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            inputs = inputs.to(model.device)
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(seed + number)
                ids = model.generate(
                    **inputs,
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                )
            answer = ids[0, inputs["input_ids"].shape[1] :]
            answers.append(str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
    finally:
        model.train(training)
    return answers


def summarize(before: PairScores, after: PairScores, beta: float) -> dict[str, dict[str, float]]:
    """{"before": ..., "after": ...} with accuracy, mean and median margin (nats), and the implicit rewards'.

    `before` is the reference: its rewards are zero, and a reward margin of zero counts as half a hit.
    """
    return {"before": _summary(before, before, beta), "after": _summary(after, before, beta)}


def _summary(scores: PairScores, reference: PairScores, beta: float) -> dict[str, float]:
    rewards = PairScores(beta * (scores.chosen - reference.chosen), beta * (scores.rejected - reference.rejected))
    return {
        "accuracy": scores.accuracy,
        "margin": scores.margins.mean().item(),
        "logps_chosen": scores.chosen.mean().item(),
        "logps_rejected": scores.rejected.mean().item(),
        "rewards_accuracy": rewards.accuracy,
        "rewards_margin": rewards.margins.mean().item(),
    }


_ROWS = {
    "prefers the chosen answer": ("accuracy", "{:.0%}"),
    "margin, log p(chosen) - log p(rejected), nats": ("margin", "{:+.2f}"),
    "log p(chosen), nats": ("logps_chosen", "{:.2f}"),
    "log p(rejected), nats": ("logps_rejected", "{:.2f}"),
    "reward margin, against the start model": ("rewards_margin", "{:+.2f}"),
}


def render_table(before: PairScores, after: PairScores, beta: float) -> str:
    """The means over the held-out pairs, before and after training, as an aligned plain-text table."""
    summary = summarize(before, after, beta)
    rows = [(f"held-out pairs ({len(before.chosen)})", "before", "after")]
    for title, (key, form) in _ROWS.items():
        rows.append((title, form.format(summary["before"][key]), form.format(summary["after"][key])))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{title:<{width}}  {first:>8}  {second:>8}" for title, first, second in rows)


def render_answers(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> str:
    """Each question with its answer before and after training."""
    return "\n\n".join(
        f"question: {prompt}\n  before: {first}\n  after:  {second}"
        for prompt, first, second in zip(prompts, before, after, strict=True)
    )
