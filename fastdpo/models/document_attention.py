"""Attention document by document with PyTorch's own kernels: no mask over the whole row, no work between documents."""

from collections.abc import Iterator, Sequence
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdpo.data.layouts import Span

DOCUMENTS = "fastdpo_documents"
# as a mask it fits no attention, so that one that does not know it fails
_SHAPE = (1, 1, 1, 2)


class DocumentMask:
    """What stands in the place of a mask: the documents of a batch, and the masks of their second branches.

    transformers hands on a 4-D tensor as it is, so `tensor` makes one that this object lives as long as.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def tensor(self, device: torch.device) -> Tensor:
        tensor = torch.zeros(_SHAPE, dtype=torch.bool, device=device)
        tensor.fastdpo = self  # pyright: ignore[reportAttributeAccessIssue] a tensor takes attributes
        _MADE[tensor.data_ptr()] = self
        return tensor

    @classmethod
    def of(cls, tensor: Tensor | None) -> "DocumentMask | None":
        """What a tensor stands for; None for any other mask."""
        return None if tensor is None or tensor.shape != _SHAPE else _MADE.get(tensor.data_ptr())

    def pieces(self, *tensors: Tensor) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """For each document its trunk's length and, of each tensor (1, heads, slots, D), the part up to the end of the
        first branch, then the same of the second branch; beside them the last tensor's padding that follows.

        Split once, so that the backward joins the parts once.
        """
        slots = tensors[0].shape[2]
        after = [*(span[0] for span in self.spans[1:]), slots]
        sizes = [
            size
            for (begin, _, first, end), next_begin in zip(self.spans, after, strict=True)
            for size in (first - begin, end - first, next_begin - end)
        ]
        parts = [tensor.split(sizes, 2) for tensor in tensors]
        for number, (begin, trunk, *_) in enumerate(self.spans):
            one, two, padding = ([part[3 * number + i] for part in parts] for i in range(3))
            yield (trunk - begin, *one, *two), padding[-1]

    def last_rows(self, queries: Tensor, keys: int) -> Tensor:
        """The additive causal mask (Q, K) of queries that are the last of `keys`; made once for all layers."""
        key = (queries.shape[2], keys, queries.dtype)
        if key not in self._masks:
            hidden = torch.ones(key[:2], dtype=torch.bool, device=queries.device).triu(keys - queries.shape[2] + 1)
            mask = torch.zeros(key[:2], dtype=queries.dtype, device=queries.device)
            self._masks[key] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[key]


# by the memory of their tensors: re-entrant checkpointing hands on detached tensors, which share it
_MADE: WeakValueDictionary[int, DocumentMask] = WeakValueDictionary()


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """By documents where the batch came with them, else what "sdpa" does. Tensors are (R, heads, T, D)."""
    documents = DocumentMask.of(attention_mask)
    if documents is None:
        if attention_mask is not None and attention_mask.shape[-1] == _SHAPE[-1] < key.shape[2]:
            raise RuntimeError("the documents of the batch were lost on their way to the attention")
        kwargs |= {} if softcap is None else {"softcap": softcap}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if softcap is not None or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise RuntimeError("PyTorch's attention kernels take no softcap, sinks or position bias")
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    rows, width = query.shape[0], query.shape[2]
    if rows > 1:  # as one long row
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    outputs = []
    for (trunk, *own), padding in documents.pieces(query, key, value):
        q, k, v = own[:3]
        # trunk and first branch stand one behind the other: plain causal attention
        outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        q, k, v = own[3:]
        if q.shape[2]:
            k, v = (torch.cat([x[:, :, :trunk], y], 2) for x, y in zip(own[1:3], (k, v), strict=True))
            mask = documents.last_rows(q, k.shape[2])
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
        # values may be of another size than queries
        outputs.append(padding.new_zeros(1, query.shape[1], *padding.shape[2:]))
    output = torch.cat(outputs, 2)
    if rows > 1:
        output = output[0].unflatten(1, (rows, width)).transpose(0, 1)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(DOCUMENTS, cast(Any, _forward))
AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)
