"""prefix_attention in plain torch: a padded batch of queries against every key it may see, without host reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Scores (rows, H, L, keys) of the largest temporary.
MAX_ELEMENTS = 1 << 26


class Cache(NamedTuple):
    """Keys and values of earlier positions: (S, H, M, D) each, slots (R,) and starts (R,), as in the op."""

    keys: Tensor
    values: Tensor
    slots: Tensor
    starts: Tensor


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos: Tensor,
    sin: Tensor,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    cache: Cache | None = None,
) -> Tensor:
    """Return (total, H, D); with a cache, write the rotated k and v into it. Sums are in fp32 or better."""
    row, step = rows_and_steps(cu_seqlens, q.shape[0])
    position = step if cache is None else step + cache.starts.long()[row]
    q, k = rotate(q, cos, sin, position), rotate(k, cos, sin, position)
    if cache is not None:
        slot = cache.slots.long()[row]
        cache.keys[slot, :, position] = k
        cache.values[slot, :, position] = v
    out = q.new_zeros(q.shape)
    for some in chunks(cu_seqlens, q.shape[1], max_seqlen, cache):
        padded = Padded.gather(some, cu_seqlens, max_seqlen, q, k, v, cache, causal, key_lengths)
        attended = padded.probabilities(scale) @ padded.values
        scatter(out, attended.transpose(1, 2), some, row, step)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """Turn the first rotary_dim channels of x (total, H, D) by the tables' rows at `position` (total,)."""
    rotary_dim = cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    # A position beyond the table is the caller's fault; it must not read outside.
    position = position.clamp(0, max(cos.shape[0] - 1, 0))
    c, s = cos[position][:, None].to(wide), sin[position][:, None].to(wide)
    turned = x[..., :rotary_dim].to(wide)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * c + torch.cat([-second, first], dim=-1) * s
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)


def rows_and_steps(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return each entry's row and its place in it, both (total,) int64."""
    entry = torch.arange(total, device=cu_seqlens.device)
    offsets = cu_seqlens.long()
    row = torch.searchsorted(offsets, entry, right=True) - 1
    return row, entry - offsets[row]


def chunks(cu_seqlens: Tensor, heads: int, max_seqlen: int, cache: Cache | None) -> list[slice]:
    """Return slices of the rows whose scores fit into MAX_ELEMENTS, one row at least."""
    keys = max_seqlen + (cache.keys.shape[2] if cache is not None else 0)
    step = max(1, MAX_ELEMENTS // max(1, heads * max_seqlen * keys))
    rows = cu_seqlens.shape[0] - 1
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def pad(values: Tensor, cu_seqlens: Tensor, some: slice, length: int) -> Tensor:
    """Return rows `some` of ragged values (total, *) as (rows, length, *), zero behind each row's end."""
    starts, ends = cu_seqlens[:-1].long()[some], cu_seqlens[1:].long()[some]
    index = starts[:, None] + torch.arange(length, device=values.device)
    found = index < ends[:, None]
    if values.shape[0] == 0:
        return values.new_zeros((*index.shape, *values.shape[1:]))
    taken = values[torch.where(found, index, 0)]
    return torch.where(found.view(*found.shape, *(1,) * (values.dim() - 1)), taken, torch.zeros_like(taken))


def scatter(out: Tensor, padded: Tensor, some: slice, row: Tensor, step: Tensor) -> None:
    """Write the entries of rows `some` from padded (rows, length, *) into out (total, *)."""
    inside = (row >= some.start) & (row < some.stop)
    index = (row - some.start).clamp(0, padded.shape[0] - 1)
    taken = padded[index, step].to(out.dtype)
    out.copy_(torch.where(inside[:, None, None], taken, out))


class Padded(NamedTuple):
    """Rows as a batch: queries (B, H, L, D), keys and values (B, H, M + L, D) in fp32 or better, and what sees what."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor  # (B, 1, L, M + L) bool

    @classmethod
    def gather(
        cls,
        some: slice,
        cu_seqlens: Tensor,
        length: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache | None,
        causal: bool,
        key_lengths: Tensor | None,
    ) -> Padded:
        """Lay out rows `some` of ragged q, k and v, behind what the cache holds of them."""
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = (pad(t, cu_seqlens, some, length).transpose(1, 2).to(wide) for t in (q, k, v))
        lengths = cu_seqlens.diff().long()[some]
        place = torch.arange(length, device=q.device)
        if key_lengths is not None:
            lengths = torch.minimum(lengths, key_lengths.long()[some])
            # What nothing sees may be NaN, which a weight of zero would not stop.
            unseen = (place >= lengths[:, None])[:, None, :, None]
            keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)
        visible = (place < lengths[:, None])[:, None, :].expand(-1, length, -1)
        if causal:
            visible = visible & (place <= place[:, None])
        if cache is not None:
            slots, starts = cache.slots.long()[some], cache.starts.long()[some]
            seen = torch.arange(cache.keys.shape[2], device=q.device) < starts[:, None]
            # What a slot holds behind its row may be anything, NaN too.
            past = [
                torch.where(seen[:, None, :, None], kept[slots].to(wide), torch.zeros((), dtype=wide, device=q.device))
                for kept in (cache.keys, cache.values)
            ]
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
            visible = torch.cat([seen[:, None, :].expand(-1, length, -1), visible], dim=2)
        return cls(queries, keys, values, visible[:, None])

    def probabilities(self, scale: float) -> Tensor:
        """Return softmax(scale q.k) over the visible keys, (B, H, L, M + L); zero for a query that sees none."""
        with torch.autocast(self.queries.device.type, enabled=False):
            scores = (self.queries @ self.keys.transpose(2, 3)) * scale
        scores = scores.masked_fill(~self.visible, -torch.inf)
        return scores.softmax(-1).masked_fill(~self.visible, 0)
