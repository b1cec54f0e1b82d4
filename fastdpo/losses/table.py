"""The tables of docs/losses.md, rendered from the catalogues: `python -m fastdpo.losses.table` prints them."""

from fastdpo.losses.catalogue import ALIASES, LOSSES
from fastdpo.losses.unpaired import UNPAIRED_LOSSES

HEADER = "| `loss_type` | formula | paper | options besides beta | reference |\n|---|---|---|---|---|"


def render() -> str:
    """One Markdown row for each loss of pairs. `|` does not occur in the formulas."""
    rows = [HEADER]
    for name, loss in LOSSES.items():
        names = [name, *(old for old, new in ALIASES.items() if new == name)]
        rows.append(
            f"| {', '.join(f'`{n}`' for n in names)} | `{loss.formula}` | {_link(loss.paper)} "
            f"| {', '.join(f'`{option}`' for option in loss.options)} | {'yes' if loss.reference else 'no'} |"
        )
    return "\n".join(rows)


def render_unpaired() -> str:
    """The same for the losses of single answers."""
    rows = ["| `loss_type` | formula | paper |\n|---|---|---|"]
    return "\n".join(
        [*rows, *(f"| `{name}` | `{loss.formula}` | {_link(loss.paper)} |" for name, loss in UNPAIRED_LOSSES.items())]
    )


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{number}](https://arxiv.org/abs/{number})"


if __name__ == "__main__":
    print(render(), render_unpaired(), sep="\n\n")
