"""What a trained policy and its reference answer to the same prompts, and the implicit reward of each answer.

The implicit reward of an answer y to a prompt x is beta * (log pi(y|x) - log pi_ref(y|x)), eq. 5 of arXiv:2305.18290
without its term of x alone, which is the same for both answers.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastdpo.data.collate import DataCollatorForPreference
from fastdpo.data.errors import RowError
from fastdpo.data.rows.messages import clean_messages
from fastdpo.json_text import parse_json
from fastdpo.models.adapters import adapter_off
from fastdpo.models.forward import LogprobForward
from fastdpo.models.generate import Prompt, _end_ids, generate_answer, prompt_ids
from fastdpo.models.saved import load_adapter, load_model, load_tokenizer_of
from fastdpo.ops.sequence import segment_sum
from fastdpo.runs.saved_run import SavedRun, no_base_model, reference_path
from fastdpo.training.reference.base import FrozenModel, Reference
from fastdpo.training.reference.inside_policy import AdapterOff


@dataclass(frozen=True)
class Contestants:
    """A policy and its reference; `ref_model` is None where the reference is the policy without its adapter."""

    policy: Any
    ref_model: Any
    tokenizer: PreTrainedTokenizerBase
    reference: str

    def off(self) -> AbstractContextManager[None]:
        return adapter_off(self.policy) if self.ref_model is None else nullcontext()


def load_contestants(
    run: SavedRun,
    *,
    base: str | None = None,
    ref_model: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Contestants:
    """The run's policy and reference on `device`, in `dtype` (as saved if None).

    base: the model under the run's adapter, where it is not the one that the adapter names. Raises ValueError with one
    sentence.
    """
    base = base or run.base
    if run.is_adapter and base is None:
        raise ValueError(no_base_model(run.folder))
    other = reference_path(run, ref_model)
    tokenizer = load_tokenizer_of([name for name in (run.folder, base) if name], trust_remote_code)
    if run.is_adapter and base is not None:
        policy: Any = load_adapter(load_model(base, dtype, trust_remote_code), run.folder, base)
    else:
        policy = load_model(run.folder, dtype, trust_remote_code)
    reference = None if other is None else load_model(other, dtype, trust_remote_code).to(device)
    if reference is not None:
        sizes = [model.get_input_embeddings().weight.shape[0] for model in (policy, reference)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the policy has {sizes[0]} tokens and the reference {other} has {sizes[1]}")
    description = f"{base}, the adapter switched off" if other is None else other
    return Contestants(policy.to(device), reference, tokenizer, description)


def read_prompts(path: str) -> list[Prompt]:
    """Prompts from a text file (one a line, blank lines left out) or from jsonl rows with a "prompt".

    A "prompt" is text or a list of messages. Raises ValueError that names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts {path} are not UTF-8 text") from error
    # not splitlines(), which also cuts at characters that JSON may hold
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"the prompts {path} are empty; wanted one prompt a line")
    if Path(path).suffix not in (".jsonl", ".json"):
        return [line.strip() for _, line in lines]
    return [_from_json(line, f"{path}:{number}") for number, line in lines]


def _from_json(line: str, place: str) -> Prompt:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}); wanted one object a line") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            f'{place}: wanted an object with a "prompt" that is text or a list of messages, got {line[:80]}'
        )
    try:
        return clean_messages(prompt, "prompt")
    except RowError as error:
        raise ValueError(f"{place}: {error}") from error


def compare_answers(
    contestants: Contestants,
    prompts: Iterable[Prompt],
    *,
    beta: float,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
) -> Iterator[dict[str, Any]]:
    """One dict for each prompt: "prompt", and "policy" and "reference" with text, tokens, finished and reward.

    temperature 0 is greedy; above it both sample from the same seed. A reward is the implicit one of that answer, in
    nats times beta: positive where the policy makes it likelier than the reference does.
    """
    policy, tokenizer = contestants.policy, contestants.tokenizer
    frozen = contestants.ref_model
    reference: Reference = AdapterOff() if frozen is None else FrozenModel(frozen, contestants.reference)
    forward = LogprobForward(policy)
    for prompt in prompts:
        ids = prompt_ids(prompt, tokenizer, raw)
        options = (max_new_tokens, temperature, seed)
        answers = {"policy": generate_answer(policy, tokenizer, ids, *options)}
        with contestants.off():
            answers["reference"] = generate_answer(frozen or policy, tokenizer, ids, *options)
        batch = DataCollatorForPreference(0)(
            [{"prompt_ids": ids, "chosen_ids": answers["policy"], "rejected_ids": answers["reference"]}]
        )
        batch = {name: tensor.to(policy.device) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        inputs |= {"logprob_rows": batch["rows"], "logprob_targets": batch["targets"]}
        with torch.no_grad(), forward.installed():
            difference = policy(**inputs)["logprob"] - reference(policy, inputs)
        rewards = (beta * segment_sum(difference, batch["offsets"])).tolist()
        ends = _end_ids(policy, tokenizer)
        sides = {
            side: {
                "text": tokenizer.decode(answer, skip_special_tokens=True),
                "tokens": len(answer),
                "finished": answer[-1] in ends,
                "reward": reward,
            }
            for (side, answer), reward in zip(answers.items(), rewards, strict=True)
        }
        yield {"prompt": prompt, **sides, "same": answers["policy"] == answers["reference"]}


def summarize_answers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the prompts: rewards and tokens of each side, and how often the policy's answer has more reward."""
    sides = ("reference", "policy")

    def mean(side: str, name: str) -> float:
        return sum(row[side][name] for row in rows) / len(rows)

    return {
        "prompts": len(rows),
        "same_answer": sum(row["same"] for row in rows),
        "policy_reward_higher": sum(row["policy"]["reward"] > row["reference"]["reward"] for row in rows),
        **{f"mean_{name}": {side: mean(side, name) for side in sides} for name in ("reward", "tokens", "finished")},
    }
