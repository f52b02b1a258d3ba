"""group_norm_silu in Triton: statistics of slabs by channel, their merge by group, and normalisation: three launches.

Both layouts are one picture, x[image, pixel, channel], with one of the last two adjacent in memory. A slab is some
pixels of an image; how many depends on the shape alone, and slabs are merged in one tree: the result is deterministic,
and an image's does not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dove_fast.ops.group_norm_silu import reference
from dove_fast.ops.group_norm_silu.reference import channels_innermost, dense
from dove_fast.ops.launch import TRITON_TYPES, KernelCase, Tile, launch

# Most slabs of an image: one program merges those of a group.
_MAX_SLABS = 64
# Channels of a group that are merged at a time.
_MERGED_CHANNELS = 32


@triton.jit
def _place(image, pixel, channel, pixels, channels, last, CHANNELS_LAST: tl.constexpr):
    """Offsets (BLOCK_P, BLOCK_C) in 64 bits, and which are before pixel `last`; `image` is 64-bit."""
    there = (pixel < last)[:, None] & (channel < channels)[None, :]
    p, c = pixel[:, None].to(tl.int64), channel[None, :].to(tl.int64)
    base = image * pixels * channels
    if CHANNELS_LAST:
        return base + p * channels + c, there
    return base + c * pixels + p, there


@triton.jit
def _statistics(
    x, shifts, means, squares, pixels, channels, slabs, slab_pixels,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of (x - mean)^2 of each channel of a slab -> shifts, means, squares (images, slabs, channels) fp32.

    The mean is shifts + means: rounded to one number it would lose what matters where it is far from 0.
    """
    image, slab = tl.program_id(0).to(tl.int64) // slabs, tl.program_id(0) % slabs
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = slab * slab_pixels
    last = tl.minimum(first + slab_pixels, pixels)
    # Differences from k, the mean of the first BLOCK_P values: a mean far from 0 costs nothing. The subtraction below
    # multiplies the sums' relative error by 1 + n (k - mean)^2 / M2 <= 1 + n / BLOCK_P, n = slab_pixels.
    start, there = _place(image, first + tl.arange(0, BLOCK_P), channel, pixels, channels, last, CHANNELS_LAST)
    known = tl.minimum(last - first, BLOCK_P).to(tl.float32)
    shift = tl.sum(tl.load(x + start, mask=there, other=0.0).to(tl.float32) / known, 0)
    sums = tl.zeros([BLOCK_C], tl.float32)
    sums_of_squares = tl.zeros([BLOCK_C], tl.float32)
    for pixel in range(first, last, BLOCK_P):
        block = pixel + tl.arange(0, BLOCK_P)
        offsets, inside = _place(image, block, channel, pixels, channels, last, CHANNELS_LAST)
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, values - shift[None, :], 0.0)
        sums += tl.sum(difference, 0)
        sums_of_squares += tl.sum(difference * difference, 0)
    count = (last - first).to(tl.float32)
    target = tl.program_id(0).to(tl.int64) * channels + channel
    spread = sums_of_squares - sums * (sums / count)
    # Rounding can make it negative; infinity less infinity is infinity here, and NaN stays.
    spread = tl.where(sums_of_squares == float("inf"), float("inf"), tl.where(spread < 0, 0.0, spread))
    tl.store(shifts + target, shift, mask=channel < channels)
    tl.store(means + target, sums / count, mask=channel < channels)
    tl.store(squares + target, spread, mask=channel < channels)


@triton.jit
def _slabs(image, group, lane, width, channels, slabs, slab_pixels, pixels, BLOCK_S: tl.constexpr):
    """Offsets (BLOCK_S, BLOCK_W) of a group's channels `lane` in every slab, which are there, and their counts."""
    slab = tl.arange(0, BLOCK_S)[:, None]
    there = (slab < slabs) & (lane < width)[None, :]
    count = tl.where(there, tl.minimum(slab_pixels, pixels - slab * slab_pixels).to(tl.float32), 0.0)
    return (image * slabs + slab) * channels + group * width + lane[None, :], there, count


@triton.jit
def _apart(shifts, means, source, there, first):
    """How far the channels' means are from `first`; 0 where there is none."""
    shift = tl.load(shifts + source, mask=there, other=0.0)
    return tl.where(there, (shift - first) + tl.load(means + source, mask=there, other=0.0), 0.0)


@triton.jit
def _merge(
    shifts, means, squares, mean, rest, rstd, pixels, channels, slabs, slab_pixels, groups, eps,
    BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A group's mean, what that lost by its rounding, and 1 / sqrt(variance + eps), from its slabs' channels."""
    image, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    width = channels // groups
    first = tl.load(shifts + image * slabs * channels + group * width)
    # A product of fp32: an argument that is 1 has no `to`, as it is compiled in.
    total = 1.0 * pixels * width
    middle = 0.0
    for start in range(0, width, BLOCK_W):
        lane = start + tl.arange(0, BLOCK_W)
        source, there, count = _slabs(image, group, lane, width, channels, slabs, slab_pixels, pixels, BLOCK_S)
        apart = _apart(shifts, means, source, there, first)
        middle += tl.sum(tl.sum(count * apart, 1), 0)
    middle = middle / total
    variance = 0.0
    for start in range(0, width, BLOCK_W):
        lane = start + tl.arange(0, BLOCK_W)
        source, there, count = _slabs(image, group, lane, width, channels, slabs, slab_pixels, pixels, BLOCK_S)
        apart = _apart(shifts, means, source, there, first) - middle
        spread = tl.load(squares + source, mask=there, other=0.0) + count * apart * apart
        variance += tl.sum(tl.sum(tl.where(there, spread, 0.0), 1), 0)
    variance = variance / total
    rounded = first + middle
    tl.store(mean + tl.program_id(0), rounded)
    tl.store(rest + tl.program_id(0), middle - (rounded - first))
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _normalise(
    x, out, weight, bias, mean, rest, rstd, pixels, channels, groups, blocks,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    offsets, there = _place(image, pixel, channel, pixels, channels, pixels, CHANNELS_LAST)
    values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    group = image * groups + channel // (channels // groups)
    scale = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    scale *= tl.load(rstd + group, mask=known, other=0.0)
    shift = tl.load(mean + group, mask=known, other=0.0)
    lost = tl.load(rest + group, mask=known, other=0.0)
    offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    result = (values - shift[None, :] - lost[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        result = result / (1.0 + tl.exp(-result))
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=there)


def tile(channels_last: bool) -> Tile:
    """Return the tile of 4096 elements for a layout: long in the direction that is adjacent in memory."""
    block_p, block_c = (32, 128) if channels_last else (1024, 4)
    return Tile({"CHANNELS_LAST": channels_last, "BLOCK_P": block_p, "BLOCK_C": block_c})


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.group_norm_silu`; float64 goes there."""
    if x.dtype not in TRITON_TYPES:
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, activation)
    x, weight, bias = dense(x), weight.contiguous(), bias.contiguous()
    images, channels = x.shape[:2]
    pixels = x.shape[2:].numel()
    out = torch.empty_like(x)
    mean, rest, rstd = (x.new_empty((images, num_groups), dtype=torch.float32) for _ in range(3))
    if x.numel() == 0:
        return out, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    chosen = tile(channels_innermost(x))
    block_p, block_c = chosen.constants["BLOCK_P"], chosen.constants["BLOCK_C"]
    blocks, across = triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c)
    slab_pixels = triton.cdiv(blocks, _MAX_SLABS) * block_p
    slabs = triton.cdiv(pixels, slab_pixels)
    slabbed = [x.new_empty((images, slabs, channels), dtype=torch.float32) for _ in range(3)]
    shape = (pixels, channels)
    launch(_statistics, (images * slabs, across), chosen, x.device, x, *slabbed, *shape, slabs, slab_pixels)
    width = min(_MERGED_CHANNELS, triton.next_power_of_2(channels // num_groups))
    merging = Tile({"BLOCK_S": triton.next_power_of_2(slabs), "BLOCK_W": width})
    merged = (*slabbed, mean, rest, rstd, *shape, slabs, slab_pixels, num_groups, eps)
    launch(_merge, (images * num_groups,), merging, x.device, *merged)
    applying = Tile({"SILU": activation == "silu", **chosen.constants})
    launch(
        _normalise,
        (images * blocks, across),
        applying,
        x.device,
        x,
        out,
        weight,
        bias,
        mean,
        rest,
        rstd,
        *shape,
        num_groups,
        blocks,
    )
    return out, mean, rstd


def cases() -> list[KernelCase]:
    """Return the launches: both layouts, with and without SiLU, and the merge at its largest."""
    found = []
    sizes = dict.fromkeys(("pixels", "channels"), "i32:16")
    statistics = dict.fromkeys(("shifts", "means", "squares", "mean", "rest", "rstd"), "*fp32:16")
    merge = statistics | sizes | dict.fromkeys(("slabs", "slab_pixels", "groups"), "i32:16") | {"eps": "fp32"}
    for width in (4, _MERGED_CHANNELS):
        constants = {"BLOCK_S": _MAX_SLABS, "BLOCK_W": width}
        found.append(KernelCase(f"group_norm_silu/merge/W={width}", _merge, merge, Tile(constants)))
    for dtype in TRITON_TYPES.values():
        for name, channels_last in (("channels-last", True), ("contiguous", False)):
            chosen = tile(channels_last)
            types = {"x": f"*{dtype}:16", **dict.fromkeys(("shifts", "means", "squares"), "*fp32:16"), **sizes}
            types |= {"slabs": "i32", "slab_pixels": "i32:16"}
            found.append(KernelCase(f"group_norm_silu/statistics/{dtype}/{name}", _statistics, types, chosen))
            types = dict.fromkeys(("x", "out", "weight", "bias"), f"*{dtype}:16")
            types |= {
                "mean": "*fp32:16",
                "rest": "*fp32:16",
                "rstd": "*fp32:16",
                **sizes,
                "groups": "i32:16",
                "blocks": "i32",
            }
            for silu in (True, False):
                applying = Tile({"SILU": silu, **chosen.constants})
                form = "silu" if silu else "plain"
                found.append(
                    KernelCase(f"group_norm_silu/{form}/{dtype}/{name}", _normalise, types, applying, slow=not silu)
                )
    return found
