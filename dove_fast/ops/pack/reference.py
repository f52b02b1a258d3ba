"""pack and unpack in plain torch: any device, any dtype, no host read. The definition that the kernels follow."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Gather padded (B, L, *) -> values (total, *); entries without a source (a row longer than L) are zero."""
    batch, length = padded.shape[:2]
    if padded.numel() == 0:
        return padded.new_zeros((total, *padded.shape[2:]))
    offsets = cu_seqlens.long()
    position = torch.arange(total, device=padded.device)
    # The last row that starts at or before the position, which passes over empty rows; B behind the end.
    row = torch.searchsorted(offsets, position, right=True) - 1
    step = position - offsets[row.clamp(max=batch)]
    found = (row < batch) & (step < length)
    index = torch.where(found, row * length + step, 0)
    return _take(padded.reshape(batch * length, *padded.shape[2:]), index, found)


def unpack(values: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """Scatter values (total, *) -> padded (B, length, *), zero-filled; a longer row keeps its first `length`."""
    batch, total = cu_seqlens.shape[0] - 1, values.shape[0]
    if values.numel() == 0:
        return values.new_zeros((batch, length, *values.shape[1:]))
    offsets = cu_seqlens.long()
    index = offsets[:-1, None] + torch.arange(length, device=values.device)
    found = (index < offsets[1:, None]) & (index < total)
    return _take(values, torch.where(found, index, 0).flatten(), found.flatten()).unflatten(0, (batch, length))


def _take(source: Tensor, index: Tensor, found: Tensor) -> Tensor:
    """Rows source[index], zero where not found; by selection, so that NaN in an unused row does not get through."""
    taken = source[index]
    return torch.where(found.view(-1, *(1,) * (source.dim() - 1)), taken, torch.zeros_like(taken))
