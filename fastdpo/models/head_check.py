"""Whether log-probs from hidden states and head are those of a model's own forward, seen on a few tokens.

A product in another order is rounded otherwise, and a wrong scale or cap hides in that. So the two are taken apart at
the head, by a hook in the model's own forward: what goes in must be the hidden states that fastdpo would use, and what
comes out must become the logits by the scale and softcap that fastdpo knows, element by element.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdpo.models.logit_transform import transformed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# values given to the model in place of the head's output: as far apart as the logits of a peaked distribution
SPAN = 50.0
# how far two products of hidden states and head may be apart, relative to the largest logit; fp32 ones may be TF32
PRODUCTS = {torch.float64: 2**-30, torch.float32: 2**-10, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Route(NamedTuple):
    """How fastdpo would compute log-probs, to be compared with a model's own forward.

    Attributes:
        backbone: its `last_hidden_state` enters the head.
        head: what `get_output_embeddings` gives.
        scale, softcap: see `logit_transform`.
        linear: the head's weight goes to the op; else the head is called.
        logprobs: of ids (1, T), rows (M,), targets (M,) to log-probs (M,); calls the backbone once.
    """

    backbone: nn.Module
    head: nn.Module
    scale: float
    softcap: float | None
    linear: bool
    logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]


def difference_at_head(model: "PreTrainedModel", ids: Tensor, route: Route) -> str | None:
    """What differs between a model's own forward of ids (1, T) and a route, for a parenthesis; None: nothing does.

    An error of either forward counts as a difference; running out of memory is raised.
    """
    try:
        return _difference(model, ids, route)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # architectures that are not of this form fail in their own ways
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _difference(model: "PreTrainedModel", ids: Tensor, route: Route) -> str | None:
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    logits = _own_logits(model, ids, route.head, calls)
    if len(calls) != 1:
        return f"its forward calls the head {len(calls)} times"
    entered, raw, replaced = calls[0]
    if logits.shape[-1] != raw.shape[-1]:
        return f"its logits are {logits.shape[-1]} of the head's {raw.shape[-1]}"
    # many targets predicted from one position: the shape of the distribution
    targets = torch.arange(0, raw.shape[-1], max(1, raw.shape[-1] // 64), device=ids.device)
    rows = torch.full_like(targets, ids.shape[1] - 1)
    states: list[Tensor] = []
    handle = route.backbone.register_forward_hook(lambda _m, _a, output: states.append(output.last_hidden_state))
    try:
        ours = route.logprobs(ids, rows, targets)
    finally:
        handle.remove()
    entered, hidden = entered.flatten(0, -2), states[0].flatten(0, -2).to(entered.device)
    if hidden.shape != entered.shape:
        return "what enters the head is not the last hidden state"
    after = _same(logits, replaced, route.scale, route.softcap) and _near(entered, hidden)
    # some multiply the hidden states instead, which is the same for a head without a bias
    before = (
        not after
        and getattr(route.head, "bias", None) is None
        and _same(logits, replaced, 1.0, route.softcap)
        and _near(entered, route.scale * hidden)
    )
    if not (after or before):
        if _near(entered, hidden) or _near(entered, route.scale * hidden):
            cap = "" if route.softcap is None else f", capped at {route.softcap:g}"
            return f"its logits are not the head's output times {route.scale:g}{cap}"
        return "what enters the head is not the last hidden state"
    if not route.linear:  # the same module is called in both
        return None
    expected = transformed(raw.flatten(0, -2)[-1], 1.0 if before else route.scale, route.softcap).double()
    error = ours.to(expected.device).double() - expected.log_softmax(-1)[targets.to(expected.device)]
    off = error.square().mean().sqrt()
    if not off <= PRODUCTS[raw.dtype] * (1 + expected.abs().max()):
        return f"log-probs from the head's weight are off by {off:.3g} nats"
    return None


def _own_logits(
    model: "PreTrainedModel", ids: Tensor, head: nn.Module, calls: list[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """The logits of a model's forward in which the head's output is replaced; calls get input, output, replacement.

    The replacement is fp32 or wider, so that what follows the head is seen without 16-bit rounding.
    """

    def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        dtype = torch.promote_types(output.dtype, torch.float32)
        values = torch.linspace(-SPAN, SPAN, output.numel(), dtype=dtype, device=output.device).view(output.shape)
        calls.append((inputs[0], output, values))
        # in-place operations of the model must not reach what is compared
        return values.clone()

    handle = head.register_forward_hook(replace)
    try:
        return model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()


def _same(logits: Tensor, replaced: Tensor, scale: float, softcap: float | None) -> bool:
    """Element by element, to a few roundings of the dtype that the logits have."""
    expected = transformed(replaced, scale, softcap).to(logits.device)
    if logits.numel() != expected.numel():
        return False
    eps = torch.finfo(logits.dtype).eps
    return torch.allclose(logits.double().flatten(), expected.double().flatten(), rtol=4 * eps, atol=4 * eps)


def _near(entered: Tensor, hidden: Tensor) -> bool:
    """Row by row; two runs of the same kernels, whose sums may be of another order."""
    eps = max(torch.finfo(entered.dtype).eps, torch.finfo(hidden.dtype).eps)
    entered, hidden = entered.double(), hidden.double()
    return bool(((entered - hidden).norm(dim=-1) <= 0.25 * eps**0.5 * hidden.norm(dim=-1)).all())
