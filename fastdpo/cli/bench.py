"""`fastdpo bench`: the benchmark suite, as `python -m bench.run` in the checkout."""

import sys


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 an entry of ours failed or fell behind the baseline, 2 the input was wrong."""
    from fastdpo.bench.run import main as run

    try:
        return run(argv, prog="fastdpo bench")
    except KeyboardInterrupt:
        print("fastdpo bench: interrupted; the cases that were finished are in the JSON", file=sys.stderr)
        return 130
