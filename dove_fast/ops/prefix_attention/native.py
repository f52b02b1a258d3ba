"""prefix_attention in the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from dove_fast import native
from dove_fast.ops.arguments import DTYPE_CODES
from dove_fast.ops.prefix_attention import reference
from dove_fast.ops.prefix_attention.reference import Cache


def prefix_attention_cpu(
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
    *,
    _isa: str = "",
) -> Tensor:
    """As `reference.prefix_attention`, for CPU tensors; float64 goes there.

    `_isa` names the instruction set, for tests; "" is the best one.
    """
    if q.dtype not in DTYPE_CODES:
        return reference.prefix_attention(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, key_lengths, scale, cache)
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    # Held until the call is over.
    ints = [
        None if t is None else t.contiguous()
        for t in (cu_seqlens, *((None, None) if cache is None else (cache.slots, cache.starts)), key_lengths)
    ]
    cos, sin = cos.contiguous(), sin.contiguous()
    _, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    offsets, slots, starts, lengths = (0 if t is None else t.data_ptr() for t in ints)
    native.load().prefix_attention_cpu(
        (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()),
        (q.stride()[:2], k.stride()[:2], v.stride()[:2]),
        (offsets, cos.data_ptr(), sin.data_ptr()),
        (*((0, 0) if cache is None else (cache.keys.data_ptr(), cache.values.data_ptr())), slots, starts, lengths),
        0 if cache is None else cache.keys.shape[2],
        cu_seqlens.shape[0] - 1,
        heads,
        head_dim,
        cos.shape[1],
        scale,
        causal,
        DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
        _isa,
    )
    return out
