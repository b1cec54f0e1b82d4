"""Measures log-probs, DPO losses and training steps against their peers, in one command (`fastdpo bench` is the same):

    python -m bench.run --quick --device cpu
    python -m bench.run linear_logprob --device cuda --plot --out DIR
    python -m bench.run linear_logprob --baseline DIR/linear_logprob_cuda_20260101.json
    python -m bench.run train_step --device cuda --minutes 25 --plot --out DIR
    python -m bench.run linear_logprob --device cuda --tune

Each entry is checked against fp64 first and left out of the timing if it fails; then all entries run interleaved, one
of each per round, in one process. Cases run in order of importance until the time is used up; what was not measured
is named. Prints a table per case, and writes one JSON after every case, with every number's conditions.
"""

import os
import sys

from . import baseline
from .arguments import UsageError, build_parser, parse


def main(argv: list[str] | None = None, prog: str = "python -m bench.run") -> int:
    """Exit code: 0 done, 1 an entry of ours failed or fell behind the baseline, 2 the input was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        print(build_parser(prog).format_help(), end="")
        return 0
    try:
        arguments = parse(argv, prog)
        if arguments.out.exists() and not arguments.out.is_dir():
            raise UsageError(f"--out {arguments.out} is a file; give a folder for JSON and PNG")
        before = None if arguments.baseline is None else baseline.load(arguments.baseline)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells stderr of each start
        from .benchmark import run  # torch, once the arguments are known to be good

        return run(arguments, before, " ".join([prog, *argv]))
    except UsageError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
