"""pack and unpack in Triton. Data moves as integers of its item's size, so that every dtype is four kernels.

A program writes a tile of the target, entries x items, once: from its source or with zeros. cu_seqlens comes
unchecked: every source index is tested before it is used.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dove_fast.ops.launch import KernelCase, Tile, launch
from dove_fast.ops.pack.native import items_adjacent

# The integers that stand for items of so many bytes: in torch and in Triton.
_INTEGERS = {1: (torch.uint8, "u8"), 2: (torch.int16, "i16"), 4: (torch.int32, "i32"), 8: (torch.int64, "i64")}

# Items of one entry in a tile; of 2048 items in all, a thread of 128 has 16, in 16-byte accesses where they align.
# Narrow entries are fewer, as the search for each one's row takes registers.
_WIDTHS = (1, 16, 128)
_TILE_ITEMS, _MOST_ENTRIES = 2048, 512


@triton.jit
def _tile(items, ENTRIES: tl.constexpr, ITEMS: tl.constexpr):
    """This program's entries (ENTRIES,) and items (1, ITEMS), in 64 bits: both may lie behind the end."""
    across = tl.cdiv(items, ITEMS)
    program = tl.program_id(0).to(tl.int64)
    entries = program // across * ENTRIES + tl.arange(0, ENTRIES)
    return entries, (program % across * ITEMS + tl.arange(0, ITEMS))[None, :]


@triton.jit(do_not_specialize=["batch", "length", "total", "halvings"])
def pack_kernel(
    padded,
    values,
    cu_seqlens,
    batch,
    length,
    total,
    halvings,
    items,
    row_stride,
    entry_stride,
    ENTRIES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """From padded (batch, length, items), with its strides in items, to values (total, items)."""
    position, item = _tile(items, ENTRIES, ITEMS)
    # The last row that starts at or before the position: cu_seqlens[low] <= position < cu_seqlens[high].
    low = tl.full((ENTRIES,), -1, tl.int64)
    high = low + batch + 2
    for _ in range(halvings):
        middle = (low + high) // 2
        between = high - low > 1
        starts = tl.load(cu_seqlens + middle, mask=between, other=0)
        low = tl.where(between & (starts <= position), middle, low)
        high = tl.where(between & (starts > position), middle, high)
    step = position - tl.load(cu_seqlens + low, mask=low >= 0, other=0)
    found = (low >= 0) & (low < batch) & (step < length) & (position < total)
    source = padded + (low * row_stride + step * entry_stride)[:, None] + item
    moved = tl.load(source, mask=found[:, None] & (item < items), other=0)
    target = values + (position * items)[:, None] + item
    tl.store(target, moved, mask=(position < total)[:, None] & (item < items))


@triton.jit(do_not_specialize=["batch", "length", "total"])
def unpack_kernel(values, padded, cu_seqlens, batch, length, total, items, ENTRIES: tl.constexpr, ITEMS: tl.constexpr):
    """From values (total, items) to padded (batch, length, items), both contiguous."""
    entry, item = _tile(items, ENTRIES, ITEMS)
    row = entry // length
    inside = row < batch
    position = tl.load(cu_seqlens + row, mask=inside, other=0).to(tl.int64) + entry % length
    stop = tl.load(cu_seqlens + row + 1, mask=inside, other=0)
    found = inside & (position >= 0) & (position < stop) & (position < total)
    source = values + (position * items)[:, None] + item
    moved = tl.load(source, mask=found[:, None] & (item < items), other=0)
    tl.store(padded + (entry * items)[:, None] + item, moved, mask=inside[:, None] & (item < items))


def pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """As `reference.pack`, for CUDA tensors, on the current stream."""
    if not items_adjacent(padded):
        padded = padded.contiguous()
    batch, length, *entry = padded.shape
    values = padded.new_empty((total, *entry))
    if values.numel() == 0:
        return values
    source = _as_integers(padded)
    items = math.prod(source.shape[2:])
    tile = _tile_for(items)
    # Each halving leaves at most half of the batch + 2 places, rounded up.
    halvings = (batch + 1).bit_length()
    launch(
        pack_kernel,
        _grid(total, items, tile),
        tile,
        padded.device,
        source,
        _as_integers(values),
        cu_seqlens.contiguous(),
        batch,
        length,
        total,
        halvings,
        items,
        source.stride(0),
        source.stride(1),
    )
    return values


def unpack(values: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """As `reference.unpack`, for CUDA tensors, on the current stream."""
    batch = cu_seqlens.shape[0] - 1
    padded = values.new_empty((batch, length, *values.shape[1:]))
    if padded.numel() == 0:
        return padded
    source = _as_integers(values.contiguous())
    items = math.prod(source.shape[1:])
    tile = _tile_for(items)
    launch(
        unpack_kernel,
        _grid(batch * length, items, tile),
        tile,
        values.device,
        source,
        _as_integers(padded),
        cu_seqlens.contiguous(),
        batch,
        length,
        values.shape[0],
        items,
    )
    return padded


def _as_integers(tensor: Tensor) -> Tensor:
    """View the items as integers of their size; a complex number is two items."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()][0])


def _tile_for(items: int) -> Tile:
    """Return the tile for entries of so many items."""
    width = next((width for width in _WIDTHS if width >= items), _WIDTHS[-1])
    entries = min(_TILE_ITEMS // width, _MOST_ENTRIES)
    return Tile({"ENTRIES": entries, "ITEMS": width}, num_warps=4, num_stages=1)


def _grid(entries: int, items: int, tile: Tile) -> tuple[int]:
    return (triton.cdiv(entries, tile.constants["ENTRIES"]) * triton.cdiv(items, tile.constants["ITEMS"]),)


def cases() -> list[KernelCase]:
    """Return every configuration that the kernels are launched with."""
    sizes = {"batch": "i32", "length": "i32", "total": "i32"}
    found = []
    for width in _WIDTHS:
        for itemsize, (_, integer) in _INTEGERS.items():
            # Wide entries are aligned, as states of d = 512 are.
            items = "i32:16" if width == _WIDTHS[-1] else "i32"
            data = f"*{integer}:16"
            for op, kernel, first, second, more in (
                ("pack", pack_kernel, "padded", "values", {"row_stride": items, "entry_stride": items}),
                ("unpack", unpack_kernel, "values", "padded", {}),
            ):
                types = {first: data, second: data, "cu_seqlens": "*i32:16", **sizes, "items": items, **more}
                if op == "pack":
                    types["halvings"] = "i32"
                found.append(
                    KernelCase(
                        f"{op}/{itemsize} bytes/{width} items",
                        kernel,
                        types,
                        _tile_for(width),
                        slow=(width, itemsize) not in ((128, 4), (16, 2)),
                    )
                )
    return found
