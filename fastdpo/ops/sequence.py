"""Stop-gap."""
import torch


def segment_sum(values, offsets):
    lengths = offsets.diff()
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    return values.new_zeros(len(lengths)).index_add(0, ids, values)
