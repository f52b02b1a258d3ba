"""prefix_attention: new positions of ragged rows against what each row has cached, and against each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dove_fast import native as extension
from dove_fast.ops import registry
from dove_fast.ops.arguments import DTYPE_CODES, check_dtype, check_int, check_number, check_tensor, dtype_name
from dove_fast.ops.launch import deferred, why_no_triton
from dove_fast.ops.prefix_attention import native, reference
from dove_fast.ops.prefix_attention.gradients import gradients
from dove_fast.ops.prefix_attention.reference import Cache
from dove_fast.ops.registry import Implementation

__all__ = ["prefix_attention"]


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    cos: Tensor,
    sin: Tensor,
    causal: bool = True,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from the new positions of R ragged rows to each row's cached positions and to its new ones.

    q, k, v: (total, H, D), before rotary, one dtype (float64, float32, bfloat16 or float16) and device; usually views
    of one fused projection (total, H, 3, D): any strides. cu_seqlens: (R + 1,) int32, from 0 to total, non-decreasing;
    max_seqlen: no row is longer. cos, sin: (P, rotary_dim) float32, the tables of `models.gpt_neox.rotary_table`:
    q and k of entry j of row r are turned, half against half, by the tables' row starts[r] + j (j without a cache),
    in fp32, and rounded once.
    With k_cache, v_cache (S, H, M, D), slots and starts (R,) int32, all four or none: row r has starts[r] positions in
    slot slots[r] already; no two rows share a slot. Its new turned k and its v are written to
    [slots[r], :, starts[r] + j], for j < its length, and nothing else is.
    Query j of row r sees the row's cached positions and its new ones up to j, or all of them where not `causal`.
    key_lengths: (R,) int32, neither causal nor with a cache: only row r's first key_lengths[r] positions are seen; a
    query that sees none gets zeros. scale: of q.k, D^-0.5 where None.
    Returns (total, H, D). Sums are in fp32 or better. A row's result does not depend on its company, but for rounding
    where the company changes max_seqlen. NaN or infinity in a row's new positions may make all its queries NaN, those
    that do not see it too.
    Without a cache q, k and v have gradients, once; with one a call under autograd is refused.
    On the CPU the contents of cu_seqlens, slots and starts are checked. On a GPU nothing is read by the host: there
    they must be right.
    backend: None, "auto", "reference", "cpu" or "triton" (float64 always goes to the reference; so does D > 128 on a
    GPU).
    Raises `TypeError` or `ValueError` for a wrong argument, `BackendError` where the backend cannot run.
    Source: METHOD section 2.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, cos, sin)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if scale is None:
        scale = q.shape[2] ** -0.5
    check_number("scale", scale)
    registry.check_backend("prefix_attention", backend)
    given = {"k_cache": k_cache, "v_cache": v_cache, "slots": slots, "starts": starts}
    missing = [name for name, tensor in given.items() if tensor is None]
    if len(missing) == len(given):
        _check_key_lengths(key_lengths, causal, cu_seqlens)
        out: Tensor = torch.ops.dove_fast.prefix_attention(
            q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, key_lengths, scale, backend
        )
        return out
    if missing:
        raise ValueError(f"a cache is k_cache, v_cache, slots and starts together, got none for {', '.join(missing)}")
    if key_lengths is not None:
        raise ValueError("key_lengths is for calls without a cache, got one with a cache")
    assert k_cache is not None and v_cache is not None and slots is not None and starts is not None
    _check_cache(q, cu_seqlens, k_cache, v_cache, slots, starts)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, k_cache, v_cache)):
        raise ValueError("prefix_attention with a cache has no gradient: call it under torch.no_grad()")
    cached: Tensor = torch.ops.dove_fast.prefix_attention_cached(
        q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, scale, k_cache, v_cache, slots, starts, backend
    )
    return cached


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor, sin: Tensor) -> None:
    names = ("q", "k", "v", "cu_seqlens", "cos", "sin")
    for name, tensor in zip(names, (q, k, v, cu_seqlens, cos, sin), strict=True):
        check_tensor(name, tensor)
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
    check_dtype("q", q)
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q must have shape (total, H, D) with H and D at least 1, got {tuple(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must be {dtype_name(q.dtype)} like q, got {dtype_name(tensor.dtype)}")
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have shape {tuple(q.shape)} like q, got {tuple(tensor.shape)}")
    check_int("max_seqlen", max_seqlen, 0)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {dtype_name(cu_seqlens.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (R + 1,), got {tuple(cu_seqlens.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {dtype_name(table.dtype)}")
        if table.dim() != 2 or table.shape[1] % 2 or table.shape[1] > q.shape[2]:
            expected = f"(P, rotary_dim) with rotary_dim even and at most {q.shape[2]}"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(table.shape)}")
    if cos.shape != sin.shape:
        raise ValueError(f"sin must have shape {tuple(cos.shape)} like cos, got {tuple(sin.shape)}")


def _check_key_lengths(key_lengths: Tensor | None, causal: bool, cu_seqlens: Tensor) -> None:
    if key_lengths is None:
        return
    if causal:
        raise ValueError("key_lengths is for calls that are not causal, got one with causal=True")
    _check_per_row("key_lengths", key_lengths, cu_seqlens)


def _check_per_row(name: str, tensor: Tensor, cu_seqlens: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {dtype_name(tensor.dtype)}")
    if tensor.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(f"{name} must have shape ({cu_seqlens.shape[0] - 1},), got {tuple(tensor.shape)}")
    if tensor.device != cu_seqlens.device:
        raise ValueError(f"{name} must be on {cu_seqlens.device} like q, got {tensor.device}")


def _check_cache(
    q: Tensor, cu_seqlens: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, starts: Tensor
) -> None:
    _check_per_row("slots", slots, cu_seqlens)
    _check_per_row("starts", starts, cu_seqlens)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache)
        if cache.dtype != q.dtype:
            raise TypeError(f"{name} must be {dtype_name(q.dtype)} like q, got {dtype_name(cache.dtype)}")
        if cache.dim() != 4 or cache.shape[1] != q.shape[1] or cache.shape[3] != q.shape[2]:
            expected = f"(S, {q.shape[1]}, M, {q.shape[2]})"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(cache.shape)}")
        if cache.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {cache.device}")
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {cache.stride()}")
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"v_cache must have shape {tuple(k_cache.shape)} like k_cache, got {tuple(v_cache.shape)}")


def _check_contents(
    cu_seqlens: Tensor, total: int, max_seqlen: int, positions: int, starts: Tensor | None = None
) -> None:
    """Check what only the CPU can look at without waiting: rows within `total`, `max_seqlen` and the tables."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != total:
        raise ValueError(f"cu_seqlens must go from 0 to the {total} entries of q, got {offsets[0]} to {offsets[-1]}")
    begins = starts.tolist() if starts is not None else [0] * (len(offsets) - 1)
    for row, (begin, first, last) in enumerate(zip(begins, offsets[:-1], offsets[1:], strict=True)):
        if not 0 <= last - first <= max_seqlen:
            raise ValueError(f"rows must have 0 to max_seqlen = {max_seqlen} entries, got {last - first} in row {row}")
        if begin < 0 or (last > first and begin + last - first > positions):
            expected = f"{positions} positions of the tables and the cache"
            raise ValueError(f"row {row} would reach from {begin} to {begin + last - first}, outside the {expected}")


def _check_slots(slots: Tensor, count: int) -> None:
    taken = slots.tolist()
    for row, slot in enumerate(taken):
        if not 0 <= slot < count:
            raise ValueError(f"slots must be between 0 and {count - 1}, got {slot} in row {row}")
    if len(set(taken)) != len(taken):
        raise ValueError("slots must be different for every row, got one twice")


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, Tensor cos, Tensor sin, bool causal"
_LIBRARY = torch.library.Library("dove_fast", "FRAGMENT")
_LIBRARY.define(f"prefix_attention({_ARGUMENTS}, Tensor? key_lengths, float scale, str? backend=None) -> Tensor")
_LIBRARY.define(
    f"prefix_attention_backward(Tensor grad, {_ARGUMENTS}, Tensor? key_lengths, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"prefix_attention_cached({_ARGUMENTS}, float scale, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots,"
    " Tensor starts, str? backend=None) -> Tensor"
)


def _prefix_attention(
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
    backend: str | None = None,
) -> Tensor:
    if q.device.type == "cpu":
        _check_contents(cu_seqlens, q.shape[0], max_seqlen, cos.shape[0])
    run = registry.implementation("prefix_attention", backend, q)
    return run(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, key_lengths, scale)


def _prefix_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cos: Tensor,
    sin: Tensor,
    causal: bool,
    scale: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    starts: Tensor,
    backend: str | None = None,
) -> Tensor:
    if q.device.type == "cpu":
        positions = min(cos.shape[0], k_cache.shape[2])
        _check_contents(cu_seqlens, q.shape[0], max_seqlen, positions, starts)
        _check_slots(slots, k_cache.shape[0])
    run = registry.implementation("prefix_attention", backend, q)
    cache = Cache(k_cache, v_cache, slots, starts)
    return run(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, None, scale, cache)


_LIBRARY.impl("prefix_attention", _prefix_attention, "CompositeExplicitAutograd")
_LIBRARY.impl("prefix_attention_backward", gradients, "CompositeExplicitAutograd")
_LIBRARY.impl("prefix_attention_cached", _prefix_attention_cached, "CompositeExplicitAutograd")


@torch.library.register_fake("dove_fast::prefix_attention", lib=_LIBRARY)
def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("dove_fast::prefix_attention_backward", lib=_LIBRARY)
def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("dove_fast::prefix_attention_cached", lib=_LIBRARY)
def _fake_cached(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, key_lengths, scale, _ = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cos, sin, key_lengths)
    ctx.max_seqlen, ctx.causal, ctx.scale = max_seqlen, causal, scale


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, cos, sin, key_lengths = ctx.saved_tensors
    grads = torch.ops.dove_fast.prefix_attention_backward(
        grad, q, k, v, cu_seqlens, ctx.max_seqlen, cos, sin, ctx.causal, key_lengths, ctx.scale
    )
    return (*grads, *(None,) * 8)


torch.library.register_autograd("dove_fast::prefix_attention", _backward, setup_context=_save, lib=_LIBRARY)

registry.register(
    "prefix_attention",
    cpu=Implementation(
        native.prefix_attention_cpu,
        missing=extension.why_no_native,
        dtypes=frozenset((*DTYPE_CODES, torch.float64)),
    ),
    triton=Implementation(
        deferred("dove_fast.ops.prefix_attention.triton_kernel", "prefix_attention"), missing=why_no_triton
    ),
    reference=Implementation(reference.prefix_attention),
)
