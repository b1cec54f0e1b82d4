"""How a message is put: the first line of an error, the closest name, `1 row`, `2 rows`."""

import json
from collections.abc import Iterable
from difflib import get_close_matches

# what papers and other tools call a loss, and what it is here
LOSSES_ELSEWHERE = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid with label_smoothing",
    "rdpo": "robust with label_smoothing",
    "robust_dpo": "robust with label_smoothing",
    "dpop": "not built (sigmoid with rpo_alpha, or sft in loss_type, also holds the chosen answer up)",
    "dpo_positive": "not built (sigmoid with rpo_alpha, or sft in loss_type, also holds the chosen answer up)",
    "rpo": "sigmoid with rpo_alpha",
    "ld_dpo": "sigmoid with ld_alpha",
    "wpo": "sigmoid with use_weighting",
    "f_dpo": "sigmoid with f_divergence_type",
    "rso": "hinge",
    "slic": "hinge",
    "mpo": "loss_type with several names and loss_weights",
    "tr_dpo": "sigmoid with sync_ref_model",
    **{
        name: f"{name} in DPOConfig, alone, for single answers with a label; {pair} for pairs"
        for name, pair in (("kto", "kto_pair"), ("bco", "bco_pair"), ("apo_zero_unpaired", "apo_zero"))
    },
    "nca": "nca_pair",
}


def closest(name: object, known: Iterable[str]) -> str | None:
    """The known name that was probably meant; None where none is near."""
    return next(iter(get_close_matches(str(name), list(known), n=1)), None)


def did_you_mean(name: object, known: Iterable[str], quote: str = "'", prefix: str = "") -> str:
    """`did you mean 'beta'?`, or "" where no known name is near. prefix: what stands before a name, such as `--`."""
    close = closest(name, known)
    return f"did you mean {quote}{prefix}{close}{quote}?" if close else ""


def why_not_json(error: ValueError | RecursionError) -> str:
    """What `json.loads` (or `raw_decode`) stumbled over, for a message."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} (column {error.colno})"
    # python's own limit on the digits of an integer is the only other ValueError
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "JSON with an integer of too many digits"


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def in_bytes(size: int) -> str:
    """`9 GB`, `670 bytes`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            number = size / unit
            return f"{number:,.0f} {name}" if number >= 100 else f"{number:.3g} {name}"
    return f"{size} bytes"


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line without its full stop."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def first_sentence(error: BaseException) -> str:
    """A library's message without what it goes on to recommend: those are arguments of its own."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{text or type(error).__name__}."


def one_sentence(error: BaseException) -> str:
    """The message without line breaks and stack-like tails; the type's name where there is no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
