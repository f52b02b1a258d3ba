"""The gradients of prefix_attention, any device: by torch's fused attention where it needs no mask, else plainly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dove_fast.ops.prefix_attention.reference import Padded, chunks, pad, rotate, rows_and_steps, scatter


def gradients(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, for a call without a cache; nothing of the forward is kept.

    Rows are padded to the longest. A causal row sees nothing of the padding behind it, and rows that fill their places
    have none: then torch's attention takes all of them without a mask and without a matrix of probabilities.
    """
    row, step = rows_and_steps(cu_seqlens, q.shape[0])
    turned_q, turned_k = rotate(q, cos, sin, step), rotate(k, cos, sin, step)
    is_full = q.shape[0] == (cu_seqlens.shape[0] - 1) * max_seqlen
    if q.numel() and key_lengths is None and (causal or is_full):
        found = _fused(grad, turned_q, turned_k, v, cu_seqlens, max_seqlen, causal, scale)
        grads = [part.transpose(1, 2)[row, step] for part in found]
    else:
        grads = _plain(grad, turned_q, turned_k, v, cu_seqlens, max_seqlen, causal, key_lengths, scale, row, step)
    # A turn's gradient is turned back.
    grad_q, grad_k = rotate(grads[0], cos, -sin, step), rotate(grads[1], cos, -sin, step)
    return grad_q, grad_k, grads[2]


def _fused(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, length: int, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    """Return the gradients of padded q, k and v, each (B, H, length, D)."""
    every = slice(0, cu_seqlens.shape[0] - 1)
    queries, keys, values = (
        pad(t.detach(), cu_seqlens, every, length).transpose(1, 2).requires_grad_() for t in (q, k, v)
    )
    grad_out = pad(grad, cu_seqlens, every, length).transpose(1, 2)
    with torch.enable_grad():
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, scale=scale)
    return torch.autograd.grad(out, (queries, keys, values), grad_out.to(out.dtype))


def _plain(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    length: int,
    causal: bool,
    key_lengths: Tensor | None,
    scale: float,
    row: Tensor,
    step: Tensor,
) -> list[Tensor]:
    """Return the gradients of ragged q, k and v (total, H, D); the probabilities are computed again."""
    grads = [torch.zeros_like(q) for _ in range(3)]
    for some in chunks(cu_seqlens, q.shape[1], length, None):
        padded = Padded.gather(some, cu_seqlens, length, q, k, v, None, causal, key_lengths)
        p = padded.probabilities(scale)
        grad_out = pad(grad, cu_seqlens, some, length).to(p.dtype).transpose(1, 2)
        grad_p = grad_out @ padded.values.transpose(2, 3)
        # The softmax's backward: p * (grad_p - sum(p * grad_p)).
        grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale
        found = (
            grad_scores @ padded.keys,
            grad_scores.transpose(2, 3) @ padded.queries,
            p.transpose(2, 3) @ grad_out,
        )
        for target, part in zip(grads, found, strict=True):
            scatter(target, part.transpose(1, 2), some, row, step)
    return grads
