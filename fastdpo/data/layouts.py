"""Where the tokens of B pairs stand in a batch: padded, packed, or with what a pair's answers share only once.

Each function takes the 2B sequences of B pairs, chosen ones first, and says where each token went. Log-probs do not
depend on the layout: a token attends to the tokens before it in its own sequence and to no others, at the position
that it has there.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

BATCH_LAYOUTS = ("padded", "packed", "shared")


# of a document: where it begins, its trunk ends, its first branch ends, it ends
Span = tuple[int, int, int, int]


class Placed(NamedTuple):
    """A batch of R rows of T slots.

    Attributes:
        inputs: what the model is called with: (R, T) tensors, and for rows of several documents `spans`, a `Span` for
            each in flattened slots.
        places: for each sequence the slots of its tokens in order, as indices into the flattened (R * T) slots; two
            sequences may have slots in common.
    """

    inputs: dict[str, Any]
    places: list[Tensor]


class Document(NamedTuple):
    """Tokens that attend to each other: a trunk (branch 0) and branches that see the trunk and themselves.

    Attributes:
        ids, positions, branches: (L,) int64.
        places: for each sequence (by number) the indices of its tokens in `ids`.
    """

    ids: Tensor
    positions: Tensor
    branches: Tensor
    places: dict[int, Tensor]


def place(
    layout: str,
    sequences: Sequence[Tensor],
    pad_token_id: int,
    multiple: int | None = None,
    max_row_tokens: int | None = None,
) -> Placed:
    """The batch of `sequences` (2B tensors of token ids) in a layout of `BATCH_LAYOUTS`.

    max_row_tokens: rows of the packed and the shared layout are filled up to so many tokens, or to the longest
        document's where that is more; left out, to the longest document's.
    """
    if layout == "padded":
        return _padded(sequences, pad_token_id, multiple)
    return _rows(DOCUMENTS[layout](sequences), len(sequences), pad_token_id, multiple, max_row_tokens)


def common_prefix(first: Tensor, second: Tensor) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(first), len(second))
    return int((first[:length] == second[:length]).long().cumprod(0).sum())


def _padded(sequences: Sequence[Tensor], pad_token_id: int, multiple: int | None) -> Placed:
    width = _width(max(map(len, sequences)), multiple)
    input_ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
    places = [row * width + torch.arange(len(ids)) for row, ids in enumerate(sequences)]
    return Placed({"input_ids": input_ids, "attention_mask": attention_mask}, places)


def _alone(sequences: Sequence[Tensor]) -> list[Document]:
    documents = []
    for number, ids in enumerate(sequences):
        order = torch.arange(len(ids))
        documents.append(Document(ids, order, torch.zeros_like(order), {number: order}))
    return documents


def _trees(sequences: Sequence[Tensor]) -> list[Document]:
    """One document a pair: the tokens that both sequences begin with, then the rest of each."""
    pairs = len(sequences) // 2
    documents = []
    for number in range(pairs):
        chosen, rejected = sequences[number], sequences[pairs + number]
        trunk = common_prefix(chosen, rejected)
        rest = torch.arange(trunk, len(rejected))
        branches = torch.zeros(len(chosen) + len(rest), dtype=torch.long)
        branches[trunk : len(chosen)] = 1
        branches[len(chosen) :] = 2
        documents.append(
            Document(
                ids=torch.cat([chosen, rejected[trunk:]]),
                positions=torch.cat([torch.arange(len(chosen)), rest]),
                branches=branches,
                places={
                    number: torch.arange(len(chosen)),
                    pairs + number: torch.cat([torch.arange(trunk), rest + len(chosen) - trunk]),
                },
            )
        )
    return documents


DOCUMENTS: dict[str, Callable[[Sequence[Tensor]], list[Document]]] = {"packed": _alone, "shared": _trees}


def _rows(
    documents: list[Document], number_of_sequences: int, pad_token_id: int, multiple: int | None, capacity: int | None
) -> Placed:
    lengths = [len(document.ids) for document in documents]
    filled = first_fit(lengths, max(capacity or 0, *lengths))
    width = _width(max(sum(lengths[index] for index in row) for row in filled), multiple)
    shape = (len(filled), width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    # padding is a document of its own: each of its slots sees at least itself, so that no softmax is over nothing
    numbers = torch.full(shape, -1, dtype=torch.int32)
    branches = torch.zeros(shape, dtype=torch.int32)
    places: list[Tensor] = [torch.empty(0)] * number_of_sequences
    spans: list[Span] = []
    for row, indices in enumerate(filled):
        start = 0
        for index in indices:
            document = documents[index]
            here = slice(start, start + len(document.ids))
            input_ids[row, here] = document.ids
            position_ids[row, here] = document.positions
            numbers[row, here] = index
            branches[row, here] = document.branches.int()
            for number, where in document.places.items():
                places[number] = row * width + start + where
            sizes = torch.bincount(document.branches, minlength=3).tolist()
            spans.append(cast("Span", tuple(itertools.accumulate(sizes, initial=row * width + start))))
            start = here.stop
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "documents": numbers, "branches": branches}
    return Placed({**inputs, "spans": spans}, places)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to `capacity` at most, the longest placed first; ties by index."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return [sorted(row) for row in rows]


def _width(longest: int, multiple: int | None) -> int:
    return longest + -longest % multiple if multiple else longest
