"""eos_scan in Triton: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dove_fast.ops.eos_scan import reference
from dove_fast.ops.launch import TRITON_TYPES, KernelCase, Tile, launch


@triton.jit
def _eos_scan(
    states, cu_seqlens, weight, bias, steps, logits, lengths, stride, width, limit, max_length,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin = tl.load(cu_seqlens + row)
    count = tl.load(cu_seqlens + row + 1) - begin
    offset = tl.load(bias)
    # Of the first state above the limit; behind every state where there is none.
    first = count
    for start in range(0, count, BLOCK_T):
        state = start + tl.arange(0, BLOCK_T)
        there = state < count
        entry = states + (begin + state).to(tl.int64)[:, None] * stride
        sums = tl.zeros([BLOCK_T], tl.float32)
        for channel_start in range(0, width, BLOCK_D):
            channel = channel_start + tl.arange(0, BLOCK_D)
            inside = there[:, None] & (channel < width)[None, :]
            values = tl.load(entry + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            sums += tl.sum(values * tl.load(weight + channel, mask=channel < width, other=0.0)[None, :], 1)
        sums += offset
        tl.store(logits + begin + state, sums, mask=there)
        first = tl.minimum(first, tl.min(tl.where(there & (sums > limit), state, count), 0))
    step = tl.load(steps + row)
    length = tl.where(first < count, step + first + 1, tl.where(step + count >= max_length, max_length, 0))
    tl.store(lengths + row, tl.minimum(length, max_length))


TILE = Tile({"BLOCK_T": 16, "BLOCK_D": 256})


def eos_scan(
    states: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor, limit: float, steps: Tensor, max_length: int
) -> tuple[Tensor, Tensor]:
    """As `reference.eos_scan`; float64 goes there."""
    if states.dtype not in TRITON_TYPES:
        return reference.eos_scan(states, cu_seqlens, weight, bias, limit, steps, max_length)
    if states.stride(1) != 1:
        states = states.contiguous()
    logits = states.new_empty(states.shape[0], dtype=torch.float32)
    lengths = torch.empty_like(steps, memory_format=torch.contiguous_format)
    if steps.shape[0]:
        launch(
            _eos_scan,
            (steps.shape[0],),
            TILE,
            states.device,
            states,
            cu_seqlens.contiguous(),
            weight.float().contiguous(),
            bias.float(),
            steps.contiguous(),
            logits,
            lengths,
            states.stride(0),
            states.shape[1],
            limit,
            max_length,
        )
    return logits, lengths


def cases() -> list[KernelCase]:
    """Return the one launch, for every dtype."""
    types = dict.fromkeys(("cu_seqlens", "steps", "lengths"), "*i32:16")
    types |= dict.fromkeys(("weight", "bias", "logits"), "*fp32:16")
    types |= {"stride": "i32:16", "width": "i32:16", "limit": "fp32", "max_length": "i32"}
    return [
        KernelCase(f"eos_scan/{name}", _eos_scan, {"states": f"*{name}:16", **types}, TILE)
        for name in TRITON_TYPES.values()
    ]
