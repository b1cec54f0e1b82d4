"""`fastdpo inspect`: what preference data becomes under a model's tokenizer, before anything is trained."""

import argparse
from pathlib import Path
from typing import Any

from fastdpo.cli.command import CommandParser, check_output_file, count_from, run_command, write_result
from fastdpo.cli.errors import UsageError
from fastdpo.cli.model_folder import check_tokenizer_folder
from fastdpo.cli.train.fields import FIELDS

MAX_LENGTH = next(field.default for field in FIELDS if field.name == "max_length")
ON_OVERLONG, SCORED_TURNS = (
    next(field.choices for field in FIELDS if field.name == name) for name in ("on_overlong", "scored_turns")
)


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 failed, 2 the input was wrong."""
    return run_command(_build_parser(), argv, work, render)


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "inspect",
        "DATA --model MODEL [arguments]",
        "Tokenize preference pairs as training does and say what is in them: lengths, what is cut and dropped,\n"
        "rows that teach nothing, special tokens that are doubled or missing. No model is loaded.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        help="a file, a saved folder, or a name in dataset_info.json; several with commas",
    )
    data.add_argument("-m", "--model", metavar="FOLDER", help="folder or hub name of the model: its tokenizer is used")
    data.add_argument("--split", default="train", metavar="STR", help="split of the data (default: train)")
    data.add_argument("--dataset_config", metavar="STR", help="configuration of a hub dataset")
    data.add_argument("--dataset_dir", metavar="FOLDER", help="folder of the dataset_info.json that names DATA")
    data.add_argument("--max_samples", type=count_from(1), metavar="INT", help="look at the first rows of each alone")
    data.add_argument("--skip_bad_rows", action="store_true", help="go on without rows that cannot be used")
    data.add_argument("--dataset_num_proc", type=count_from(1), metavar="INT", help="processes (default: 1)")
    data.add_argument("--trust_remote_code", action="store_true", help="run code that the model's folder brings")

    lengths = parser.add_argument_group("truncation")
    lengths.add_argument(
        "--max_length",
        type=count_from(2),
        nargs="+",
        default=[MAX_LENGTH],
        metavar="INT",
        help=f"tokens of prompt plus completion; several give a table (default: {MAX_LENGTH})",
    )
    lengths.add_argument(
        "--truncation_mode",
        choices=("keep_start", "keep_end"),
        default="keep_start",
        help="which end of a longer sequence is kept (default: keep_start)",
    )
    lengths.add_argument(
        "--on_overlong",
        choices=ON_OVERLONG,
        default="truncate",
        help="what becomes of pairs longer than max_length (default: truncate)",
    )
    lengths.add_argument(
        "--scored_turns",
        choices=SCORED_TURNS,
        default="last",
        help="score the completions, or the assistant's turns in the prompt too (default: last)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--row", type=count_from(0), default=0, metavar="INT", help="pair to show (default: 0)")
    output.add_argument(
        "--out", default="fastdpo_inspect.png", metavar="FILE", help="histogram (default: fastdpo_inspect.png)"
    )
    return parser


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report, with the histogram written."""
    for name, value, what in (("DATA", arguments.data, "the pairs"), ("--model", arguments.model, "a model's folder")):
        if value is None:
            raise UsageError(f"{name} is missing: fastdpo inspect DATA --model MODEL, where {name} is {what}")
    check_tokenizer_folder(arguments.model)
    out = Path(arguments.out)
    if out.suffix != ".png" or out.is_dir():
        raise UsageError(f"--out should be a file that ends in .png, got {arguments.out}")
    check_output_file(out)

    from transformers import AutoTokenizer

    from fastdpo.cli.example_pair import example_pair
    from fastdpo.cli.terminal import no_bars_without_terminal
    from fastdpo.data.collate import DataCollatorForPreference
    from fastdpo.data.inspection import histogram_png, inspect_pairs
    from fastdpo.data.mixtures import DatasetSpec, load_mixture, names_of
    from fastdpo.models.size import check_parts
    from fastdpo.wording import first_line

    no_bars_without_terminal()
    try:
        check_parts(arguments.model)  # the tokenizer's class reads the config too
        tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises no narrower class for a broken tokenizer.json
        raise UsageError(f"{arguments.model} has no tokenizer that can be read: {first_line(error)}") from error
    names = names_of(arguments.data, arguments.dataset_dir)
    specs = [DatasetSpec(name, name=arguments.dataset_config, split=arguments.split) for name in names]
    options = {"skip_bad_rows": arguments.skip_bad_rows, "max_samples": arguments.max_samples}
    rows = load_mixture(specs, dataset_dir=arguments.dataset_dir, **options)
    if arguments.row >= len(rows):
        raise UsageError(f"--row {arguments.row} is not there: {arguments.data} has rows 0 to {len(rows) - 1}")
    options = {"truncation_mode": arguments.truncation_mode, "num_proc": arguments.dataset_num_proc}
    options |= {"on_overlong": arguments.on_overlong, "scored_turns": arguments.scored_turns}
    options["skip_bad_rows"] = arguments.skip_bad_rows
    inspection = inspect_pairs(
        rows, tokenizer, arguments.max_length, name=", ".join(Path(name).name for name in names), **options
    )
    collator = DataCollatorForPreference(0, arguments.max_length[0], arguments.truncation_mode)
    example = inspection.pairs[arguments.row]
    write_result(out, histogram_png(inspection, arguments.max_length))
    return {
        **inspection.report,
        "example": {"row": arguments.row, "text": example_pair(tokenizer, collator, example)},
        "histogram": str(out),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    quantiles = report["lengths"]
    columns = list(quantiles["prompt"])
    paired = "identical" in report
    what, cuts = ("pairs", ("chosen", "rejected")) if paired else ("unpaired rows", ("completions",))
    lines = [
        f"{report['name']}: {report['rows']} {what} of {report['kind']}"
        + (f", {report['with_tools']} with tools" if report["with_tools"] else ""),
        *([f"  identical pairs     {report['identical']:>6}  (chosen is rejected: no gradient)"] if paired else []),
        *([] if paired else [f"  {kind:<19} {report[kind]:>6}  answers" for kind in ("desirable", "undesirable")]),
        f"  duplicated rows     {report['duplicated']:>6}  (the same as an earlier row)",
        f"  distinct prompts    {report['distinct_prompts']:>6}",
        *([f"  chosen is longer in {report['chosen_longer']:>6.1%}  of the pairs"] if paired else []),
        "",
        "tokens                    " + "".join(f"{name:>8}" for name in columns),
        *(
            f"  {name:<24}" + "".join(f"{values[column]:>8.0f}" for column in columns)
            for name, values in quantiles.items()
        ),
        "",
        f"max_length ({report['truncation_mode']}, on_overlong {report['on_overlong']})",
        f"              longer    kept  {'chosen cut  rejected cut' if paired else '             cut      '}"
        "  dropped: overlong  long prompt  unscored",
    ]
    for cut in report["truncation"]:
        counts = [cut[f"truncated_{side}"] for side in cuts]
        cut_rows = f"{counts[0]:>11} {counts[1]:>13}" if paired else f"{counts[0]:>19}      "
        lines.append(
            f"  {cut['max_length']:>8} {cut['overlong']:>9} {cut['rows']:>7} {cut_rows} "
            f"{cut['dropped_overlong']:>18} {cut['dropped_long_prompt']:>12} {cut['dropped_unscored']:>9}"
        )
    if report["on_overlong"] == "error" and any(cut["overlong"] for cut in report["truncation"]):
        lines.append("  on_overlong error: training would stop at the pairs that are longer, and name them")
    lines += ["", "special tokens:" if report["findings"] else "special tokens: nothing unusual"]
    lines += [f"  {finding}" for finding in report["findings"]]
    lines += [
        "",
        f"{what.split()[-1][:-1]} {report['example']['row']} as it is trained on, scored tokens between >>> and <<<:",
    ]
    lines += [report["example"]["text"], "", f"histogram: {report['histogram']}"]
    return "\n".join(lines)
