"""`fastdpo compare`: answers of a trained policy and of its reference side by side, with their implicit rewards."""

import argparse
import json
import shutil
import textwrap
import unicodedata
from pathlib import Path
from typing import Any

from fastdpo.cli.command import CommandParser, check_output_file, count_from, number_from, run_command, write_result
from fastdpo.cli.errors import UsageError
from fastdpo.cli.model_folder import check_model_folder
from fastdpo.escaping import markdown_text

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 failed, 2 the input was wrong."""
    return run_command(_build_parser(), argv, work, render)


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "compare",
        "RUN --prompts FILE [arguments]",
        "Let a run's policy and its reference answer the same prompts. The implicit reward of an answer is beta times\n"
        "the log-prob that the policy gives it minus the reference's: what DPO has trained to be high.",
    )
    models = parser.add_argument_group("models")
    models.add_argument("run", metavar="RUN", nargs="?", help="output_dir of a run: an adapter or a whole model")
    models.add_argument("--base", metavar="MODEL", help="model under the adapter (default: the one that it names)")
    models.add_argument(
        "--ref_model",
        metavar="MODEL",
        help="reference (default: what the run's summary.json says; an adapter's base model where it says nothing)",
    )
    models.add_argument(
        "--beta", type=number_from(0, above=True), metavar="FLOAT", help="of the rewards (default: summary.json's)"
    )
    models.add_argument("--dtype", choices=DTYPES, help="of both models in memory (default: as they are saved)")
    models.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    models.add_argument("--trust_remote_code", action="store_true", help="run code that the model's folder brings")

    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts", metavar="FILE", help='a text file, one prompt a line, or jsonl with "prompt" (text or messages)'
    )
    prompts.add_argument(
        "--raw", action="store_true", help="continue text as it is, not as a user message of the chat template"
    )
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--max_new_tokens", type=count_from(1), default=128, metavar="INT", help="of an answer (default: 128)"
    )
    generation.add_argument(
        "--temperature", type=number_from(0), default=0.0, metavar="FLOAT", help="0 is greedy (default: 0)"
    )
    generation.add_argument(
        "--seed", type=count_from(0), default=0, metavar="INT", help="of each answer's sampling (default: 0)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="also write the result: a .json or .md file")
    return parser


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """The answers and their means, with --out written."""
    for name, value in (("RUN", arguments.run), ("--prompts", arguments.prompts)):
        if value is None:
            raise UsageError(f"{name} is missing: fastdpo compare RUN --prompts FILE")
    out = Path(arguments.out) if arguments.out else None
    if out is not None and (out.suffix not in (".json", ".md") or out.is_dir()):
        raise UsageError(f"--out should be a file that ends in .json or .md, got {arguments.out}")
    if out is not None:
        check_output_file(out)
    if arguments.base is not None:
        check_model_folder(arguments.base)

    import torch
    from tqdm.auto import tqdm

    from fastdpo.cli.terminal import no_bars_without_terminal
    from fastdpo.models.generate import prompt_ids
    from fastdpo.runs.answers import compare_answers, load_contestants, read_prompts, summarize_answers
    from fastdpo.runs.saved_run import read_run

    run = read_run(arguments.run)
    beta = run.beta if arguments.beta is None else arguments.beta
    if beta is None:
        raise UsageError(f"{arguments.run} has no dpo_metrics/summary.json that says beta; give --beta")
    prompts = read_prompts(arguments.prompts)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is cuda, and torch sees no GPU")
    quiet = no_bars_without_terminal()
    models = load_contestants(
        run,
        base=arguments.base,
        ref_model=arguments.ref_model,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        device=device,
        trust_remote_code=arguments.trust_remote_code,
    )
    for prompt in prompts:  # one that cannot be tokenized is named before any answer is waited for
        prompt_ids(prompt, models.tokenizer, arguments.raw)
    settings = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "seed", "raw")}
    answers = compare_answers(models, prompts, beta=beta, **settings)
    rows = list(tqdm(answers, total=len(prompts), desc="Answering", disable=quiet))
    result = {
        "policy": arguments.run,
        "reference": models.reference,
        "beta": beta,
        **settings,
        "summary": summarize_answers(rows),
        "answers": rows,
    }
    if out is not None:
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n" if out.suffix == ".json" else markdown(result)
        write_result(out, text)
        result["written"] = str(out)
    return result


def render(result: dict[str, Any]) -> str:
    """Two columns, as wide as the terminal."""
    half = (max(shutil.get_terminal_size((110, 24)).columns, 60) - 3) // 2
    lines = []
    for number, row in enumerate(result["answers"], start=1):
        lines += _wrap(f"{number}. {prompt_text(row['prompt'])}", 2 * half + 3)
        columns = []
        for side in ("reference", "policy"):
            answer = row[side]
            more = "" if answer["finished"] else ", cut"
            head = f"{side}: reward {answer['reward']:+.4f}, {answer['tokens']} tokens{more}"
            columns.append([head, "-" * half, *_wrap(answer["text"], half)])
        height = max(map(len, columns))
        left, right = ([*column, *[""] * (height - len(column))] for column in columns)
        lines += [f"{_pad(a, half)} | {b}".rstrip() for a, b in zip(left, right, strict=True)]
        lines.append("")
    return "\n".join([*lines, *_summary_lines(result), *([f"written: {w}"] if (w := result.get("written")) else [])])


def markdown(result: dict[str, Any]) -> str:
    """The result as a table of Markdown."""
    lines = ["| prompt | reference | reward | policy | reward |", "|---|---|---:|---|---:|"]
    for row in result["answers"]:
        cells = [prompt_text(row["prompt"])]
        for side in ("reference", "policy"):
            cells += [row[side]["text"], f"{row[side]['reward']:+.4f}"]
        lines.append("| " + " | ".join(markdown_text(cell.strip(), "<br>") for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"- {markdown_text(line)}" for line in _summary_lines(result)), ""])


def prompt_text(prompt: Any) -> str:
    """Messages as `role: content` lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)


def _summary_lines(result: dict[str, Any]) -> list[str]:
    summary = result["summary"]
    reward, tokens = summary["mean_reward"], summary["mean_tokens"]
    return [
        f"policy: {result['policy']}; reference: {result['reference']}; beta {result['beta']:g}",
        f"{summary['prompts']} prompts, the same answer to {summary['same_answer']}; the policy's answer has the "
        f"higher reward in {summary['policy_reward_higher']}",
        f"mean reward: reference's answers {reward['reference']:+.4f}, policy's {reward['policy']:+.4f}; "
        f"mean tokens: {tokens['reference']:.0f}, {tokens['policy']:.0f}",
    ]


def _width(text: str) -> int:
    """Columns on a terminal: Chinese, Japanese and Korean characters take two."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _pad(text: str, width: int) -> str:
    return text + " " * max(width - _width(text), 0)


def _wrap(text: str, width: int) -> list[str]:
    lines = []
    for paragraph in text.strip().expandtabs(4).splitlines() or [""]:
        for line in textwrap.wrap(paragraph, width) or [""]:
            while _width(line) > width:  # textwrap counts characters, not columns
                end = next(n for n in range(len(line), 0, -1) if _width(line[:n]) <= width)
                lines.append(line[:end])
                line = line[end:]
            lines.append(line)
    return lines
