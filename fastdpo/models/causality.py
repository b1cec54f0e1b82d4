"""Whether a model's logits depend on tokens that come later: then they are no next-token distributions."""

from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def sees_ahead(model: "PreTrainedModel", ids: Tensor) -> bool:
    """Whether the token after ids[:, :-3] (1, T) changes the logits of an earlier position: the last three in turn.

    For a model in eval mode. The shape stays as it is, so kernels round alike. In a mixture of experts the last token's
    routing changes which products run together, and a tie between experts may then fall the other way: such a position
    has two outcomes, so it does not differ among each two of three runs, as it does where attention looks ahead.
    """
    runs: list[Tensor] = []
    try:
        for last in range(ids.shape[1] - 3, ids.shape[1]):
            changed = torch.cat([ids[:, :-3], ids[:, last : last + 1]], 1)
            logits = model(input_ids=changed, use_cache=False).logits
            runs.append(logits.flatten(0, -2)[: changed.shape[1] - 1])
            if len(runs) == 2 and not bool(_differ(runs[0], runs[1]).any()):
                return False
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # said in words already: the comparison at the head runs the same forward
        return False
    # quantized products round by what else is in the batch
    coarse = torch.finfo(torch.bfloat16).eps if getattr(model, "is_quantized", False) else 0.0
    return bool(torch.stack([_differ(a, b, coarse) for a, b in combinations(runs, 2)]).all(0).any())


def _differ(one: Tensor, other: Tensor, coarse: float = 0.0) -> Tensor:
    """(T-1,) bool: the positions whose logits differ by more than products of other shapes make them."""
    noise = max(torch.finfo(one.dtype).eps, coarse) ** 0.5 * one.double().abs().amax(-1)
    # NaN differs from nothing here: it says nothing of what a position sees
    return (one.double() - other.double()).abs().amax(-1) > noise
