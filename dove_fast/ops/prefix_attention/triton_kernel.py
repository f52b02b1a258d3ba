"""prefix_attention in Triton: one program a tile of queries, head and row; no program waits for another."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dove_fast.ops.launch import TRITON_TYPES, KernelCase, Tile, launch
from dove_fast.ops.prefix_attention import reference
from dove_fast.ops.prefix_attention.reference import Cache

LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 128


@triton.jit
def _turned(
    x, stride, index, mask, position, cos, sin,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Entries `index` (BLOCK,) of x, turned to `position`, rounded once -> (BLOCK, BLOCK_D), zero where masked."""
    channel = tl.arange(0, BLOCK_D)
    entry = x + index[:, None].to(tl.int64) * stride
    inside = mask[:, None] & (channel < HEAD_DIM)[None, :]
    values = tl.load(entry + channel[None, :], mask=inside, other=0.0)
    if ROTARY_DIM > 0:
        # The other half's channel is loaded again, from the cache: half-rotation without a shuffle.
        half: tl.constexpr = ROTARY_DIM // 2
        partner = tl.where(channel < half, channel + half, channel - half)
        rotary = mask[:, None] & (channel < ROTARY_DIM)[None, :]
        others = tl.load(entry + partner[None, :], mask=rotary, other=0.0).to(tl.float32)
        table = position[:, None].to(tl.int64) * ROTARY_DIM + channel[None, :]
        c = tl.load(cos + table, mask=rotary, other=1.0)
        s = tl.load(sin + table, mask=rotary, other=0.0)
        s = tl.where((channel < half)[None, :], -s, s)
        values = (values.to(tl.float32) * c + others * s).to(values.dtype)
    return values


@triton.jit
def _attend(queries, keys, values, visible, scale, largest, total, out, PRECISION: tl.constexpr):
    """Take a block of keys and values (BLOCK_N, BLOCK_D) into the softmax's state; `visible` (BLOCK_M, BLOCK_N)."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    correction = tl.exp2(largest - new_largest)
    total = total * correction + tl.sum(weights, 1)
    out = out * correction[:, None]
    out = tl.dot(weights.to(values.dtype), values, out, input_precision=PRECISION)
    return new_largest, total, out


@triton.jit
def _prefix_attention(
    q, k, v, out, cu_seqlens, cos, sin, k_cache, v_cache, slots, starts, key_lengths,
    q_entry, q_head, k_entry, k_head, v_entry, v_head, max_positions, heads, tiles, scale,
    HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, CAUSAL: tl.constexpr, CACHED: tl.constexpr,
    LIMITED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - begin
    if first >= length:
        return
    start = 0
    if CACHED:
        start = tl.load(starts + row)
        kept = (tl.load(slots + row).to(tl.int64) * heads + head) * max_positions * HEAD_DIM
        k_cache += kept
        v_cache += kept
    q += begin.to(tl.int64) * q_entry + head * q_head
    k += begin.to(tl.int64) * k_entry + head * k_head
    v += begin.to(tl.int64) * v_entry + head * v_head

    query = first + tl.arange(0, BLOCK_M)
    there = query < length
    channel = tl.arange(0, BLOCK_D)
    used = (channel < HEAD_DIM)[None, :]
    queries = _turned(q, q_entry, query, there, start + query, cos, sin, HEAD_DIM, ROTARY_DIM, BLOCK_D)
    if CACHED:
        # This tile's own keys and values; nobody reads a cache at or behind `start`.
        own = (start + query)[:, None].to(tl.int64) * HEAD_DIM + channel[None, :]
        own_keys = _turned(k, k_entry, query, there, start + query, cos, sin, HEAD_DIM, ROTARY_DIM, BLOCK_D)
        tl.store(k_cache + own, own_keys, mask=there[:, None] & used)
        own_source = v + query[:, None].to(tl.int64) * v_entry + channel[None, :]
        own_values = tl.load(own_source, mask=there[:, None] & used, other=0.0)
        tl.store(v_cache + own, own_values, mask=there[:, None] & used)

    # Scores in powers of two. The lowest finite number rather than -inf: a query that sees nothing then has weights
    # 2^-inf = 0, not NaN.
    largest = tl.full([BLOCK_M], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if CACHED:
        for key_start in range(0, start, BLOCK_N):
            key = key_start + tl.arange(0, BLOCK_N)
            inside = (key < start)[:, None] & used
            place = key[:, None].to(tl.int64) * HEAD_DIM + channel[None, :]
            keys = tl.load(k_cache + place, mask=inside, other=0.0)
            values = tl.load(v_cache + place, mask=inside, other=0.0)
            visible = (key < start)[None, :] & there[:, None]
            largest, total, result = _attend(queries, keys, values, visible, scale, largest, total, result, PRECISION)
    seen = length
    if LIMITED:
        seen = tl.minimum(seen, tl.load(key_lengths + row))
    if CAUSAL:
        seen = tl.minimum(seen, first + BLOCK_M)
    for key_start in range(0, seen, BLOCK_N):
        key = key_start + tl.arange(0, BLOCK_N)
        keys = _turned(k, k_entry, key, key < seen, start + key, cos, sin, HEAD_DIM, ROTARY_DIM, BLOCK_D)
        source = v + key[:, None].to(tl.int64) * v_entry + channel[None, :]
        values = tl.load(source, mask=(key < seen)[:, None] & used, other=0.0)
        visible = (key < seen)[None, :] & there[:, None]
        if CAUSAL:
            visible = visible & (key[None, :] <= query[:, None])
        largest, total, result = _attend(queries, keys, values, visible, scale, largest, total, result, PRECISION)

    result = result / tl.where(total == 0, 1.0, total)[:, None]
    target = ((begin + query)[:, None].to(tl.int64) * heads + head) * HEAD_DIM + channel[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=there[:, None] & used)


def tile(dtype: torch.dtype, head_dim: int, rotary_dim: int, max_seqlen: int, **flags: bool) -> Tile:
    """Return how calls of these sizes are launched; `flags` are causal, cached and limited.

    fp32 products are three TF32 ones, of the numbers' upper and lower parts: what is dropped is below 2^-21 of a
    product, and the tensor cores are used. (As fp32 FMAs, "ieee", the same tiles spill hundreds of bytes.)
    """
    wide = dtype == torch.float32
    # What the resource table shows to fit into the registers.
    largest = 64 if 16 < head_dim <= 64 and not wide else 32
    if wide and head_dim > 64:
        largest = 16
    block_m = max(16, min(largest, triton.next_power_of_2(max_seqlen)))
    block_n = 64 if not wide else 32 if block_m == 32 else 16
    if head_dim > 64:
        block_n = min(block_n, 32)
    # With a cache four warps spill, without one two do (Triton 3.6).
    few_warps = block_m == 16 and head_dim <= 64 and not wide and flags["cached"]
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        **{name.upper(): flag for name, flag in flags.items()},
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": "tf32x3" if wide else "ieee",
    }
    return Tile(constants, num_warps=2 if few_warps else 4, num_stages=2)


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
    """As `reference.prefix_attention`; float64 and head sizes above 128, whose tiles spill, go there."""
    if q.dtype not in TRITON_TYPES or q.shape[2] > MAX_HEAD_DIM:
        return reference.prefix_attention(q, k, v, cu_seqlens, max_seqlen, cos, sin, causal, key_lengths, scale, cache)
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(q.shape)
    rows, heads = cu_seqlens.shape[0] - 1, q.shape[1]
    if out.numel() == 0 or max_seqlen == 0:
        return out
    flags = {"causal": causal, "cached": cache is not None, "limited": key_lengths is not None}
    chosen = tile(q.dtype, q.shape[2], cos.shape[1], max_seqlen, **flags)
    tiles = triton.cdiv(max_seqlen, chosen.constants["BLOCK_M"])
    # Pointers that the flags leave unused are given some tensor's.
    ints = [cu_seqlens if t is None else t.contiguous() for t in (*(cache[2:] if cache else (None, None)), key_lengths)]
    launch(
        _prefix_attention,
        (rows * tiles, heads),
        chosen,
        q.device,
        q,
        k,
        v,
        out,
        cu_seqlens.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        *(cache[:2] if cache else (out, out)),
        *ints,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cache.keys.shape[2] if cache else 0,
        heads,
        tiles,
        scale * LOG2_E,
    )
    return out


def cases() -> list[KernelCase]:
    """Return every launch of the supported head sizes; of the common one, 64, the default suite compiles those used."""
    common = {"causal": True, "cached": True, "limited": False}
    kinds = {
        "block": common,
        "prefill": common | {"cached": False},
        "decoder": {"causal": False, "cached": False, "limited": False},
        "limited": {"causal": False, "cached": False, "limited": True},
    }
    found = []
    for dtype, name in TRITON_TYPES.items():
        pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{name}:16")
        pointers |= dict.fromkeys(("cu_seqlens", "slots", "starts", "key_lengths"), "*i32:16")
        pointers |= dict.fromkeys(("cos", "sin"), "*fp32:16") | dict.fromkeys(("k_cache", "v_cache"), f"*{name}:16")
        strides = dict.fromkeys(("q_entry", "q_head", "k_entry", "k_head", "v_entry", "v_head"), "i32:16")
        numbers = {"max_positions": "i32", "heads": "i32", "tiles": "i32", "scale": "fp32"}
        for head_dim in (16, 32, 64, 128):
            for kind, flags in kinds.items():
                seen = set()
                for max_seqlen in (16, 32, 256):
                    chosen = tile(dtype, head_dim, head_dim // 4, max_seqlen, **flags)
                    block = chosen.constants["BLOCK_M"]
                    if block in seen:
                        continue
                    seen.add(block)
                    found.append(
                        KernelCase(
                            f"prefix_attention/{kind}/{name}/D={head_dim}/M={block}",
                            _prefix_attention,
                            pointers | strides | numbers,
                            chosen,
                            tensor_cores=True,
                            # ptxas keeps to a round number of registers and puts a value or two into memory instead.
                            spill_bytes=16 if dtype == torch.float32 else 0,
                            slow=head_dim != 64 or kind == "limited" or (kind == "decoder" and block < 32),
                        )
                    )
    return found
