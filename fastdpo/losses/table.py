"""The table of docs/losses.md, rendered from `LOSSES`: `python -m fastdpo.losses.table` prints it."""

from fastdpo.losses.catalogue import ALIASES, LOSSES

HEADER = "| `loss_type` | formula | paper | options besides beta | reference |\n|---|---|---|---|---|"


def render() -> str:
    """One Markdown row for each loss. `|` does not occur in the formulas."""
    rows = [HEADER]
    for name, loss in LOSSES.items():
        names = [name, *(old for old, new in ALIASES.items() if new == name)]
        number = loss.paper.removeprefix("arXiv:")
        rows.append(
            f"| {', '.join(f'`{n}`' for n in names)} | `{loss.formula}` | [{number}](https://arxiv.org/abs/{number}) "
            f"| {', '.join(f'`{option}`' for option in loss.options)} | {'yes' if loss.reference else 'no'} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(render())
