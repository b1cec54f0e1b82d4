"""`fastdpo doctor`: what is installed, which path the op takes for a shape and why, and whether it is right here.

stdout gets the report (`--json`: one JSON object), stderr everything else. torch is imported only when the arguments
are known to be good.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from fastdpo.cli.command import CommandParser, count_from, run_command
from fastdpo.cli.doctor import machine
from fastdpo.cli.doctor.machine import Finding
from fastdpo.cli.doctor.text import render
from fastdpo.cli.errors import UsageError
from fastdpo.cli.model_folder import check_model_folder
from fastdpo.ops.ahead_of_time import SHARED_LIMIT, TARGETS
from fastdpo.versions import __version__
from fastdpo.wording import one_sentence

DTYPES = ("float32", "bfloat16", "float16", "float64")
TRAIN = ("none", "lora", "head")
# Llama-3.2-1B's head
DEFAULTS = {"n": 4096, "h": 2048, "v": 128256, "dtype": "bfloat16", "softcap": None, "logit_scale": 1.0}
REGISTER_LIMIT = 255


def main(argv: list[str]) -> int:
    """Exit code: 0 all is well, 1 the self-test failed or what was asked for cannot work, 2 the input was wrong."""
    return run_command(
        _build_parser(),
        argv,
        examine,
        render,
        exit_code=lambda report: 0 if report["ok"] else 1,
        # whatever else is raised is no fault of the arguments
        input_errors=(UsageError,),
        noun="the report",
        not_finite=str,
    )


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "doctor",
        "[arguments]",
        "Say what is installed, which path log-probs take for a shape and why, and whether they are right.",
        "Exit code: 0 all is well, 1 the self-test failed or what was asked for cannot work, 2 wrong arguments.",
        json_help="the report as one JSON object, for a bug report",
    )
    count = count_from(1, "above 0")
    shape = parser.add_argument_group("which path")
    shape.add_argument("-m", "--model_name_or_path", metavar="STR", help="take sizes and dtype from its config.json")
    shape.add_argument("--n", type=count, metavar="INT", help=f"scored tokens of a batch (default: {DEFAULTS['n']})")
    shape.add_argument(
        "--hidden_size", dest="h", type=count, metavar="INT", help=f"default: {DEFAULTS['h']}, Llama-3.2-1B's"
    )
    shape.add_argument("--vocab_size", dest="v", type=count, metavar="INT", help=f"default: {DEFAULTS['v']}")
    shape.add_argument("--dtype", choices=DTYPES, help=f"of hidden states and head (default: {DEFAULTS['dtype']})")
    shape.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    shape.add_argument(
        "--arch", choices=TARGETS, help="of a GPU (default: this machine's, or sm_90 where there is none)"
    )
    shape.add_argument(
        "--train", choices=TRAIN, help="what gets a gradient: nothing, layers below a frozen head, or the head too"
    )

    checks = parser.add_argument_group("checks")
    checks.add_argument("--skip_self_test", action="store_true", help="do not compare the op with float64 here")
    checks.add_argument(
        "--kernels",
        nargs="*",
        choices=TARGETS,
        metavar="TARGET",
        help=f"compile every kernel for {', '.join(TARGETS)} (default: all; about 10 s each; needs triton, no GPU)",
    )
    return parser


def examine(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole report. Raises UsageError where an argument cannot be meant."""
    if arguments.arch is not None:
        if arguments.device == "cpu":
            raise UsageError("--arch names a GPU, and --device is cpu: leave one of them out")
        arguments.device = "cuda"
    if arguments.model_name_or_path is not None:
        check_model_folder(arguments.model_name_or_path)
    installed = machine.versions()
    findings: list[Finding] = []
    build, cards = None, []
    try:
        build = machine.torch_build()
        cards = machine.gpus()
    except (ImportError, OSError, RuntimeError) as error:
        if installed["torch"] is not None:
            findings.append(Finding(f"torch is installed and does not work: {_one_line(error)}", True))
    device = arguments.device or ("cuda" if cards else "cpu")
    findings += machine.findings(installed, build, cards, wants_gpu=arguments.device == "cuda")
    report: dict[str, Any] = {
        "fastdpo": __version__,
        "system": machine.system(),
        "torch": build,
        "versions": installed,
        "gpus": cards,
        "switches": machine.switches(),
    }
    if build is not None:
        report["shape"], report["plans"], obstacles = _plans(arguments, device)
        findings += obstacles
        if not arguments.skip_self_test:
            report["self_test"], failed = _self_test(device if cards else "cpu")
            findings += failed
    if arguments.kernels is not None:
        report["kernels"], failed = _kernels(arguments.kernels or list(TARGETS), installed)
        findings += failed
    report["findings"] = [finding._asdict() for finding in findings]
    report["ok"] = not any(finding.fatal for finding in findings)
    return report


def _plans(arguments: argparse.Namespace, device: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[Finding]]:
    """The shape that was asked about, one plan for each kind of training, and what stands in the way."""
    from fastdpo.cli.doctor import plan

    values, obstacles = dict(DEFAULTS), []
    if arguments.model_name_or_path is not None:
        try:
            values |= plan.read_model(arguments.model_name_or_path)
        except ImportError as error:
            return {}, [], [Finding(f"--model_name_or_path cannot be read: {_one_line(error)}", True)]
        obstacle = values.pop("obstacle")
        obstacles += [Finding(obstacle, True)] if obstacle else []
    values |= {k: v for k in ("n", "h", "v", "dtype") if (v := getattr(arguments, k)) is not None}
    if values["dtype"] not in DTYPES:
        raise UsageError(f"{arguments.model_name_or_path} is in {values['dtype']}; give --dtype {{{','.join(DTYPES)}}}")
    question = plan.Question(device=device, arch=arguments.arch, **values)
    shape = {**question._asdict(), "model": arguments.model_name_or_path, "here": plan.is_here(question)}
    if device == "cuda" and find_spec("triton") is not None:
        shape["arch"] = plan.arch_of(question)
    try:
        trained = (arguments.train,) if arguments.train else TRAIN
        return shape, [plan.answer(question, train) for train in trained], obstacles
    except (ValueError, RuntimeError) as error:  # a FASTDPO_ variable
        return shape, [], [*obstacles, Finding(_one_line(error), True)]


def _self_test(device: str) -> tuple[dict[str, Any], list[Finding]]:
    import torch

    from fastdpo.cli.doctor.self_test import self_test

    result = self_test(torch.device(device))
    failures = [
        f"self-test: {row['backend']} {row['dtype']} on {device}, {text}"
        for row in result["rows"]
        for text in row["failures"]
    ]
    return result, [Finding(text, True) for text in failures]


def _kernels(targets: Sequence[str], installed: dict[str, str | None]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The ahead-of-time table with each row's `over`: what exceeds a limit, "" where nothing does."""
    from fastdpo.ops import ahead_of_time

    if find_spec("triton") is None:
        return [], [Finding("--kernels needs triton, which is not installed (it exists for Linux only)", True)]
    rows, findings = [], []
    for target in dict.fromkeys(targets):
        print(f"compiling every kernel for {target} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            compiled = ahead_of_time.resources(target)
        except (RuntimeError, OSError, ValueError) as error:
            findings.append(Finding(f"--kernels {target}: {_one_line(error)}", True))
            continue
        print(f"{len(compiled)} kernels in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        for row in compiled:
            over = _over(row)
            rows.append({**row, "over": over})
            if over:
                findings.append(Finding(f"{row['kernel']} on {target}: {over}", True))
    return rows, findings


def _over(row: dict[str, Any]) -> str:
    """The limits that a kernel exceeds, in words; "" where it keeps all of them."""
    shared = SHARED_LIMIT[row["target"]]
    limits = (
        (row["registers"] > REGISTER_LIMIT, f"{row['registers']} registers"),
        (row["spills"] > 0, f"spills {row['spills']}"),
        (row["shared"] > shared, f"shared {row['shared'] / 1024:.0f} of {shared >> 10} KiB"),
        (row["tf32"], "TF32"),
        (row["atomics"], "atomics"),
        (row.get("serialized", False), "serialized wgmma"),
    )
    return ", ".join(text for exceeded, text in limits if exceeded)


def _one_line(error: BaseException) -> str:
    return one_sentence(error)[:400]
