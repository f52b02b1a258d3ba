"""layer_norm_pair in Triton: one launch; a row that fits into a program's registers is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dove_fast.ops.arguments import as_rows
from dove_fast.ops.launch import TRITON_TYPES, KernelCase, Tile, launch
from dove_fast.ops.layer_norm_pair import reference

# Values of a tile: 8 for each of 128 threads, in rows of their own where they are short; the widest row that is held
# whole, 32 for each of 512; the pieces of wider ones, which are summed lane by lane first. Larger tiles spill.
_TILE_VALUES, _WIDEST, _PIECE = 1024, 16384, 2048


@triton.jit
def _total(x, addend1, addend2, row, x_stride, stride1, stride2, column, present, ADDENDS: tl.constexpr):
    """(addend1 + addend2) + x in fp32 and rounded to x's dtype, for rows (ROWS, 1) and columns (1, WIDTH); else 0."""
    value = tl.load(x + row * x_stride + column, mask=present, other=0)
    if ADDENDS == 0:
        return value
    added = tl.load(addend1 + row * stride1 + column, mask=present, other=0).to(tl.float32)
    if ADDENDS == 2:
        added += tl.load(addend2 + row * stride2 + column, mask=present, other=0).to(tl.float32)
    return (added + value.to(tl.float32)).to(x.dtype.element_ty)


@triton.jit
def _store_norm(y, weight, bias, normal, at, column, present, width):
    scale = tl.load(weight + column, mask=column < width, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0).to(tl.float32)
    tl.store(y + at, (normal * scale + shift).to(y.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["rows", "eps"])
def layer_norm_pair_kernel(
    x,
    addend1,
    addend2,
    weight1,
    bias1,
    weight2,
    bias2,
    total,
    y1,
    y2,
    mean_out,
    rstd_out,
    rows,
    width,
    x_stride,
    stride1,
    stride2,
    eps,
    ADDENDS: tl.constexpr,
    PAIR: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """From x (rows, width) and ADDENDS of the addends to total, y1 and, where PAIR, y2, all (rows, width).

    WHOLE: WIDTH covers a row. Otherwise its pieces are read three times, and each time added up again.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    if WHOLE:
        present = (row < rows) & (lane < width)
        value = _total(x, addend1, addend2, row, x_stride, stride1, stride2, lane, present, ADDENDS)
        if ADDENDS > 0:
            tl.store(total + row * width + lane, value, mask=present)
        value = value.to(tl.float32)
        mean = tl.sum(value, 1)[:, None] / width
        centred = tl.where(present, value - mean, 0.0)
        # What the mean lost by its own rounding, which counts where it is far from 0.
        rest = tl.sum(centred, 1)[:, None] / width
        centred = tl.where(present, centred - rest, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / width + eps)
        normal = centred * rstd
        _store_norm(y1, weight1, bias1, normal, row * width + lane, lane, present, width)
        if PAIR:
            _store_norm(y2, weight2, bias2, normal, row * width + lane, lane, present, width)
    else:
        sums = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            column = start + lane
            present = (row < rows) & (column < width)
            value = _total(x, addend1, addend2, row, x_stride, stride1, stride2, column, present, ADDENDS)
            if ADDENDS > 0:
                tl.store(total + row * width + column, value, mask=present)
            sums += value.to(tl.float32)
        mean = tl.sum(sums, 1)[:, None] / width
        sums = tl.zeros((ROWS, WIDTH), tl.float32)
        squares = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            column = start + lane
            present = (row < rows) & (column < width)
            value = _total(x, addend1, addend2, row, x_stride, stride1, stride2, column, present, ADDENDS)
            difference = tl.where(present, value.to(tl.float32) - mean, 0.0)
            sums += difference
            squares += difference * difference
        rest = tl.sum(sums, 1)[:, None] / width
        variance = tl.sum(squares, 1)[:, None] / width - rest * rest
        rstd = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + eps)
        for start in range(0, width, WIDTH):
            column = start + lane
            present = (row < rows) & (column < width)
            value = _total(x, addend1, addend2, row, x_stride, stride1, stride2, column, present, ADDENDS)
            normal = (value.to(tl.float32) - mean - rest) * rstd
            _store_norm(y1, weight1, bias1, normal, row * width + column, column, present, width)
            if PAIR:
                _store_norm(y2, weight2, bias2, normal, row * width + column, column, present, width)
    tl.store(mean_out + row, mean + rest, mask=row < rows)
    tl.store(rstd_out + row, rstd, mask=row < rows)


def layer_norm_pair(
    x: Tensor,
    addends: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.layer_norm_pair`, for CUDA tensors, on the current stream; float64 goes there."""
    if x.dtype not in TRITON_TYPES:
        return reference.layer_norm_pair(x, addends, weight1, bias1, weight2, bias2, eps)
    total = x.new_empty(x.shape) if addends else x
    y1 = x.new_empty(x.shape)
    y2 = x.new_empty(0 if weight2 is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return total, y1, y2, mean, rstd
    terms = [as_rows(term) for term in (x, *addends)]
    pair = weight2 is not None and bias2 is not None
    parameters = [p.contiguous() for p in (weight1, bias1, weight2, bias2) if p is not None]
    rows, width = terms[0].shape
    tile = _tile(width, len(addends), pair)
    # What is absent is not read: x and the first norm's parameters stand for it.
    terms += terms[:1] * (2 - len(addends))
    launch(
        layer_norm_pair_kernel,
        (triton.cdiv(rows, tile.constants["ROWS"]),),
        tile,
        x.device,
        *terms,
        *(parameters if pair else parameters * 2),
        total,
        y1,
        y2,
        mean,
        rstd,
        rows,
        width,
        *(term.stride(0) for term in terms),
        eps,
    )
    return total, y1, y2, mean, rstd


def _tile(width: int, addends: int, pair: bool) -> Tile:
    whole = width <= _WIDEST
    lanes = triton.next_power_of_2(width) if whole else _PIECE
    shape = {"WHOLE": whole, "ROWS": max(1, _TILE_VALUES // lanes), "WIDTH": lanes}
    # 16 values a thread, 32 in the widest tiles.
    warps = min(max(lanes // 512, 4), 16)
    return Tile({"ADDENDS": addends, "PAIR": pair, **shape}, num_warps=warps, num_stages=1)


def cases() -> list[KernelCase]:
    """Return the configurations of the base model, d = 512, with and without a sum, and those of other widths."""
    found = []
    for width in (512, 64, 768, _WIDEST, 2 * _WIDEST):
        for kind in TRITON_TYPES.values():
            for parameters in sorted({kind, "fp32"}):
                for addends, pair in ((0, True), (2, True), (2, False)):
                    types = dict.fromkeys(("x", "addend1", "addend2", "total", "y1", "y2"), f"*{kind}:16")
                    types |= dict.fromkeys(("weight1", "bias1", "weight2", "bias2"), f"*{parameters}:16")
                    types |= {"mean_out": "*fp32:16", "rstd_out": "*fp32:16", "rows": "i32", "eps": "fp32"}
                    types |= dict.fromkeys(("width", "x_stride", "stride1", "stride2"), "i32:16")
                    form = f"{addends} addends/{'pair' if pair else 'single'}"
                    found.append(
                        KernelCase(
                            f"layer_norm_pair/{form}/d={width}/{kind}/{parameters} parameters",
                            layer_norm_pair_kernel,
                            types,
                            _tile(width, addends, pair),
                            # A piece's last values, by Triton 3.6.
                            spill_bytes=8 if width > _WIDEST else 0,
                            slow=width != 512 or parameters != kind or addends == 0,
                        )
                    )
    return found
