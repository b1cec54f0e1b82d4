"""Attention over batches whose rows hold several sequences: which token may see which, in each kernel's own form."""

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdpo.data.layouts import Span
from fastdpo.models.backbone import decoder_config
from fastdpo.models.document_attention import DOCUMENTS, DocumentMask

# FlexAttention compiled once: transformers' own is compiled anew whenever a model goes from train() to eval() and back
FLEX = "fastdpo_flex"


def allowed(documents: Tensor, branches: Tensor) -> Tensor:
    """Who sees whom: (R, 1, T, T) bool, [r, 0, q, k] is whether slot q attends to slot k.

    Slots see earlier slots (and themselves) of their document, in the trunk (branch 0) or in their own branch.
    """
    same = documents[:, :, None] == documents[:, None, :]
    before = torch.ones(documents.shape[1:] * 2, dtype=torch.bool, device=documents.device).tril()
    branch = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return (same & before & branch)[:, None]


def attention_mask(
    kind: str | None, dtype: torch.dtype, documents: Tensor, branches: Tensor, spans: Sequence[Span] | None = None
) -> "Tensor | BlockMask | None":
    """The mask as the model's attention (`config._attn_implementation`) takes it; made once for all layers.

    FlashAttention takes none: it reads `position_ids`, and is right for one row of whole sequences without padding.
    """
    if "flash" in (kind or ""):
        return None
    if kind in (FLEX, "flex_attention"):
        return _block_mask(documents, branches)
    if kind == DOCUMENTS and spans is not None:
        return DocumentMask(spans).tensor(documents.device)
    mask = allowed(documents, branches)
    if kind != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _block_mask(documents: Tensor, branches: Tensor) -> BlockMask:
    def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch = branches[row, key]
        return (
            (query >= key)
            & (documents[row, query] == documents[row, key])
            & ((branch == 0) | (branch == branches[row, query]))
        )

    rows, width = documents.shape
    on_gpu = documents.device.type == "cuda"
    return create_block_mask(may_see, rows, None, width, width, device=documents.device, _compile=on_gpu)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def _flex_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Tensor | BlockMask | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """FlexAttention where the batch came with a block mask, else what "sdpa" does. Tensors are (R, heads, T, D)."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # the kernel for short queries wants a power of two
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    attended = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, attended).transpose(1, 2).contiguous(), None


@cache
def _capped(softcap: float) -> Any:
    def cap(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


AttentionInterface.register(FLEX, cast(Any, _flex_forward))
AttentionMaskInterface.register(FLEX, sdpa_mask)


def flex_refusal(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why FlexAttention is not used for a model; None where it is: on a GPU where a trial agrees with SDPA."""
    if device.type != "cuda":
        return f"FlexAttention has no backward pass on {device.type}"
    kind = decoder_config(model)._attn_implementation
    if kind not in ("sdpa", "flex_attention", FLEX):
        return f"the model's attention is {kind}"
    if not getattr(model, "_supports_flex_attn", False):
        return f"{type(model).__name__} does not take it"
    if _drops_attention(model):
        return "it has no dropout, and the model's attention has"
    try:
        error = _trial(device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)
    except Exception as failure:  # a compiler's errors have no common class
        return f"it does not run here ({type(failure).__name__}: {str(failure).splitlines()[0]})"
    return None if error < 2e-2 else f"its result is off by {error:.2g} in a trial"


def _drops_attention(model: nn.Module) -> bool:
    """Whether attention weights are dropped out: by a number that a module keeps, or by a module of its own."""
    for name, module in model.named_modules():
        numbers = [value for key, value in vars(module).items() if "attention_dropout" in key or "attn_dropout" in key]
        if isinstance(module, nn.Dropout) and ("attn" in name or "attention" in name):
            numbers.append(module.p)
        if any(isinstance(number, float) and number > 0 for number in numbers):
            return True
    return False


def _trial(device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients against SDPA with the same mask, on a small made-up batch."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 150 + [1] * 90 + [-1] * 16], dtype=torch.int32)
    branches = torch.tensor([[0] * 50 + [1] * 60 + [2] * 40 + [0] * 106], dtype=torch.int32)
    documents, branches = documents.to(device), branches.to(device)
    shapes = ((1, 4, 256, 64), (1, 2, 256, 64), (1, 2, 256, 64))
    inputs = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(device, dtype)
    with torch.enable_grad():
        attended = _compiled()(*inputs, block_mask=_block_mask(documents, branches), enable_gqa=True)
        mine = [attended, *torch.autograd.grad(attended, inputs, upstream)]
        wide = [x.detach().float().requires_grad_() for x in inputs]
        key, value = (x.repeat_interleave(2, dim=1) for x in wide[1:])
        expected = scaled_dot_product_attention(wide[0], key, value, attn_mask=allowed(documents, branches))
        theirs = [expected, *torch.autograd.grad(expected, wide, upstream.float())]
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(mine, theirs, strict=True))
