"""eos_scan in plain torch, any device, without host reads."""

from __future__ import annotations

import torch
from torch import Tensor


def eos_scan(
    states: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor, limit: float, steps: Tensor, max_length: int
) -> tuple[Tensor, Tensor]:
    """Return logits (total,) in fp32 or fp64 and lengths (R,) int32; weight is (d,), bias (1,)."""
    wide = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        logits = (states.to(wide) * weight.to(wide)).sum(1) + bias.to(wide)
    rows = cu_seqlens.shape[0] - 1
    offsets = cu_seqlens.long()
    entry = torch.arange(states.shape[0], device=states.device)
    row = torch.searchsorted(offsets, entry, right=True) - 1
    # The comparison is in fp32, as the oracle's.
    stops = logits.float() > limit
    never = torch.iinfo(torch.int64).max // 2
    first = torch.full((rows,), never, dtype=torch.int64, device=states.device)
    first = first.scatter_reduce(0, row, torch.where(stops, entry - offsets[row], never), "amin")
    lengths = torch.where(first < never, steps + first + 1, 0)
    done = steps + offsets.diff() >= max_length
    lengths = torch.where((lengths == 0) & done, max_length, lengths).clamp(max=max_length)
    return logits, lengths.to(torch.int32)
