"""`fastdpo train --demo`: the same run on the embedded model and pairs, measured before and after on held-out ones."""

from dataclasses import replace
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.parsing import Request
from fastdpo.demo import DEMO_ARGUMENTS, DEMO_LORA_ARGUMENTS, SAMPLE_PROMPTS, demo_paths


def with_demo_arguments(request: Request) -> Request:
    """The request with the demo's model, pairs and settings; what the user gave goes first."""
    for name in ("model_name_or_path", "dataset_name", "eval_dataset_name"):
        if name in request.values:
            raise UsageError(f"--demo brings its own model and pairs: leave out {request.sources[name]}, or --demo")
    paths = demo_paths()
    own = {"model_name_or_path": paths.model, "dataset_name": paths.train, "eval_dataset_name": paths.heldout}
    lora = DEMO_LORA_ARGUMENTS if request.values.get("use_peft") else {}
    values = {**{name: str(path) for name, path in own.items()}, **DEMO_ARGUMENTS, **lora, **request.values}
    return request._replace(values=values)


def run_demo(session: Any) -> str:
    """Train `session`; its table, sampled answers and result as text, "" on other processes than the first."""
    import torch

    # so small a model gains nothing from more threads, and loses much where others want the cores
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train_and_compare(session)
    finally:
        torch.set_num_threads(threads)


def _train_and_compare(session: Any) -> str:
    from fastdpo.demo.evaluate import evaluate_pairs, render_answers, render_table, sample_answers, summarize

    trainer, args = session.trainer, session.args
    size = args.per_device_eval_batch_size
    # measured by the model's own forward, which takes padded rows
    collator = replace(trainer.data_collator, layout="padded")

    def measure() -> tuple[Any, list[str]]:
        pairs = trainer.eval_dataset
        batches = (
            collator([pairs[row] for row in range(start, min(start + size, len(pairs)))])
            for start in range(0, len(pairs), size)
        )
        return evaluate_pairs(trainer.model, batches), sample_answers(trainer.model, session.tokenizer, SAMPLE_PROMPTS)

    scores_before, answers_before = measure()
    result = session.train()
    scores_after, answers_after = measure()
    if not session.main:
        return ""
    session.report.details["demo"] = {
        "held_out": summarize(scores_before, scores_after, args.beta),
        "answers": [
            {"question": question, "before": before, "after": after}
            for question, before, after in zip(SAMPLE_PROMPTS, answers_before, answers_after, strict=True)
        ],
    }
    session.report.write(args, trainer.state)
    table = render_table(scores_before, scores_after, args.beta)
    return f"{table}\n\n{render_answers(SAMPLE_PROMPTS, answers_before, answers_after)}\n\n{result}"
