"""One pair as it is trained on, as text: what is scored stands between >>> and <<<."""

from dataclasses import replace
from typing import Any

import torch

from fastdpo.data.rows.sides import sides_of
from fastdpo.wording import count


def example_pair(tokenizer: Any, collator: Any, example: dict[str, Any], limit: int = 400) -> str:
    """The example as it is trained on: decoded after truncation, the scored tokens between >>> and <<<."""
    batch = replace(collator, layout="padded")([example])
    offsets = batch["offsets"].tolist()
    lines = []
    for sequence, side in enumerate(sides_of(example)):
        start, end = offsets[sequence], offsets[sequence + 1]
        ids = batch["input_ids"][sequence][batch["attention_mask"][sequence].bool()]
        scored = batch["targets"][start:end]
        # a target's row is the position before it
        places = batch["rows"][start:end] + 1 - sequence * batch["input_ids"].shape[1]
        first = int(places[0]) if len(places) else len(ids)
        if sequence == 0:
            prompt = _shorten(tokenizer.decode(ids[:first]), limit)
            lines.append(f"  prompt      {count(len(ids[:first]), 'token')}: {prompt}")
        side = side if "label" not in batch else ("undesirable", "desirable")[int(batch["label"][0])]
        lines.append(f"  {side:<11} {count(len(scored), 'token')} scored: {_marked(tokenizer, ids, places, limit)}")
    return "\n".join(lines)


def _marked(tokenizer: Any, ids: Any, places: Any, limit: int) -> str:
    """The text from the first scored token on; each run of scored tokens (scored_turns=all has several) is marked."""
    scored = torch.zeros(len(ids), dtype=torch.bool)
    scored[places] = True
    texts, begin = [], int(places[0]) if len(places) else len(ids)
    while begin < len(ids):
        run = int((scored[begin:] == scored[begin]).long().cumprod(0).sum())
        text = _shorten(tokenizer.decode(ids[begin : begin + run]), limit)
        texts.append(f">>>{text}<<<" if scored[begin] else text)
        begin += run
    return "".join(texts) or ">>><<<"


def _shorten(text: str, limit: int) -> str:
    text = text.replace("\n", "\\n")
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} [... {len(text) - limit} characters ...] {text[-half:]}"
