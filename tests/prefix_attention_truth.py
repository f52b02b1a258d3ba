"""What prefix_attention is held to: made calls, and their results by loops over rows, heads and queries in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dove_fast import ops


@dataclass(frozen=True)
class Case:
    """The arguments of a call; the cache is there where `starts` is."""

    qkv: Tensor  # (total, H, 3, D)
    cu_seqlens: Tensor
    max_seqlen: int
    cos: Tensor
    sin: Tensor
    k_cache: Tensor | None = None
    v_cache: Tensor | None = None
    slots: Tensor | None = None
    starts: Tensor | None = None

    def run(self, backend: str | None, **options) -> Tensor:
        q, k, v = self.qkv.unbind(2)
        return ops.prefix_attention(
            q,
            k,
            v,
            self.cu_seqlens,
            max_seqlen=self.max_seqlen,
            cos=self.cos,
            sin=self.sin,
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            slots=self.slots,
            starts=self.starts,
            backend=backend,
            **options,
        )

    def clone(self) -> Case:
        """Return the same with a cache of its own."""
        if self.k_cache is None:
            return self
        return replace(self, k_cache=self.k_cache.clone(), v_cache=self.v_cache.clone())


def tables(positions: int, rotary_dim: int, device: str) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def make(
    lengths: list[int],
    starts: list[int] | None = None,
    *,
    heads: int = 2,
    head_dim: int = 16,
    rotary_dim: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Random rows; a cache's unused positions hold NaN, as nothing may read them."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), heads, 3, head_dim, generator=generator).to(device, dtype)
    cu_seqlens = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device=device)
    longest = max((n + s for n, s in zip(lengths, starts or [0] * len(lengths), strict=True)), default=0)
    cos, sin = tables(longest + 1, rotary_dim, device)
    case = Case(qkv, cu_seqlens, max(lengths, default=0), cos, sin)
    if starts is None:
        return case
    slots = torch.randperm(len(lengths) + 1, generator=generator)[: len(lengths)]
    caches = torch.full((2, len(lengths) + 1, heads, longest + 2, head_dim), torch.nan)
    for slot, start in zip(slots.tolist(), starts, strict=True):
        caches[:, slot, :, :start] = torch.randn(2, heads, start, head_dim, generator=generator)
    k_cache, v_cache = caches.to(device, dtype)
    return replace(
        case,
        k_cache=k_cache,
        v_cache=v_cache,
        slots=slots.to(device, torch.int32),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
    )


def turned(x: Tensor, case: Case, position: int) -> Tensor:
    """One entry (H, D) of q or k turned in fp64, by complex numbers."""
    half = case.cos.shape[1] // 2
    cos, sin = case.cos[position, :half].double().cpu(), case.sin[position, :half].double().cpu()
    number = torch.complex(x[:, :half], x[:, half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat([number.real, number.imag, x[:, 2 * half :]], dim=1)


def truth(case: Case, *, causal: bool = True, key_lengths: list[int] | None = None, scale: float | None = None):
    """Outputs and caches by loops over rows, heads and queries in fp64 -> (out, k_cache, v_cache)."""
    qkv = case.qkv.double().cpu()
    total, heads, _, head_dim = qkv.shape
    out = torch.zeros(total, heads, head_dim, dtype=torch.float64)
    caches = [None if c is None else c.double().cpu().clone() for c in (case.k_cache, case.v_cache)]
    offsets = case.cu_seqlens.tolist()
    for row, (begin, end) in enumerate(pairwise(offsets)):
        start = 0 if case.starts is None else int(case.starts[row])
        q = [turned(qkv[begin + j, :, 0], case, start + j) for j in range(end - begin)]
        keys = [turned(qkv[begin + j, :, 1], case, start + j) for j in range(end - begin)]
        values = [qkv[begin + j, :, 2] for j in range(end - begin)]
        if case.slots is not None:
            slot = int(case.slots[row])
            past_keys, past_values = ([c[slot, :, i].clone() for i in range(start)] for c in caches)
            for j in range(end - begin):
                # What is kept is rounded once, and what is attended to is what is kept.
                keys[j] = keys[j].to(case.qkv.dtype).double()
                caches[0][slot, :, start + j], caches[1][slot, :, start + j] = keys[j], values[j]
            keys, values = past_keys + keys, past_values + values
        for j, query in enumerate(q):
            seen = start + (j + 1 if causal else end - begin)
            if key_lengths is not None:
                seen = min(seen, key_lengths[row])
            for head in range(heads if seen else 0):
                scores = torch.stack([query[head] @ key[head] for key in keys[:seen]])
                weights = torch.softmax(scores * (head_dim**-0.5 if scale is None else scale), 0)
                out[begin + j, head] = sum(w * value[head] for w, value in zip(weights, values[:seen], strict=True))
    return out, *caches
