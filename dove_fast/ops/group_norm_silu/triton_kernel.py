"""group_norm_silu in Triton: statistics of slabs by channel, their merge by group, and normalisation: three launches.

The backward takes the first two again, for what the rounding of the mean lost, and then its own three of the same form.
Both layouts are one picture, x[image, pixel, channel], with one of the last two adjacent in memory. A slab is some
pixels of an image; how many depends on the shape alone, and slabs are merged in one tree: the result is deterministic,
and an image's does not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dove_fast.ops.group_norm_silu import reference
from dove_fast.ops.group_norm_silu.reference import channels_innermost, dense, like
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


@triton.jit
def _gradient_of_normal(
    grad, x, weight, bias, mean, rest, rstd, image, pixel, channel, pixels, channels, groups, last,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The gradient behind SiLU and the normalised values, both (BLOCK_P, BLOCK_C), 0 where there are none."""
    known = channel < channels
    offsets, there = _place(image, pixel, channel, pixels, channels, last, CHANNELS_LAST)
    group = image * groups + channel // (channels // groups)
    values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    slope = tl.load(grad + offsets, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(mean + group, mask=known, other=0.0)
    lost = tl.load(rest + group, mask=known, other=0.0)
    normal = (values - shift[None, :] - lost[None, :]) * tl.load(rstd + group, mask=known, other=0.0)[None, :]
    if SILU:
        scale = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
        offset = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
        before = normal * scale[None, :] + offset[None, :]
        gate = 1.0 / (1.0 + tl.exp(-before))
        slope = slope * gate * (1.0 + before * (1.0 - gate))
    return tl.where(there, slope, 0.0), tl.where(there, normal, 0.0), offsets, there


@triton.jit
def _gradient_sums(
    grad, x, weight, bias, mean, rest, rstd, sums, products, pixels, channels, groups, slabs, slab_pixels,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a slab of the gradient, and of it times the normalised value -> (images, slabs, channels) fp32."""
    image, slab = tl.program_id(0).to(tl.int64) // slabs, tl.program_id(0) % slabs
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = slab * slab_pixels
    last = tl.minimum(first + slab_pixels, pixels)
    total = tl.zeros([BLOCK_C], tl.float32)
    moment = tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        slope, normal, _, _ = _gradient_of_normal(
            grad, x, weight, bias, mean, rest, rstd, image, pixel, channel, pixels, channels, groups, last,
            SILU, CHANNELS_LAST,
        )  # fmt: skip
        total += tl.sum(slope, 0)
        moment += tl.sum(slope * normal, 0)
    target = tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(sums + target, total, mask=channel < channels)
    tl.store(products + target, moment, mask=channel < channels)


@triton.jit
def _merge_gradients(
    sums, products, weight, of_bias, of_weight, mean_slope, mean_product, pixels, channels, slabs, slab_pixels, groups,
    BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A group's slabs -> of_bias, of_weight (images, channels), and the means of both times weight (images, groups)."""
    image, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    width = channels // groups
    slope = 0.0
    product = 0.0
    for start in range(0, width, BLOCK_W):
        lane = start + tl.arange(0, BLOCK_W)
        source, there, _ = _slabs(image, group, lane, width, channels, slabs, slab_pixels, pixels, BLOCK_S)
        total = tl.sum(tl.load(sums + source, mask=there, other=0.0), 0)
        moment = tl.sum(tl.load(products + source, mask=there, other=0.0), 0)
        channel = group * width + lane
        tl.store(of_bias + image * channels + channel, total, mask=lane < width)
        tl.store(of_weight + image * channels + channel, moment, mask=lane < width)
        scale = tl.load(weight + channel, mask=lane < width, other=0.0).to(tl.float32)
        slope += tl.sum(total * scale, 0)
        product += tl.sum(moment * scale, 0)
    count = 1.0 * pixels * width
    tl.store(mean_slope + tl.program_id(0), slope / count)
    tl.store(mean_product + tl.program_id(0), product / count)


@triton.jit
def _gradient(
    grad, x, out, weight, bias, mean, rest, rstd, mean_slope, mean_product, pixels, channels, groups, blocks,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient for x -> out: what its group's mean and variance take part in is taken off."""
    image, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    slope, normal, offsets, there = _gradient_of_normal(
        grad, x, weight, bias, mean, rest, rstd, image, pixel, channel, pixels, channels, groups, pixels,
        SILU, CHANNELS_LAST,
    )  # fmt: skip
    group = image * groups + channel // (channels // groups)
    scale = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    common = tl.load(mean_slope + group, mask=known, other=0.0)
    aligned = tl.load(mean_product + group, mask=known, other=0.0)
    result = slope * scale[None, :] - common[None, :] - normal * aligned[None, :]
    result *= tl.load(rstd + group, mask=known, other=0.0)[None, :]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=there)


def _merging(slabs: int, width: int) -> Tile:
    # With 4 warps the compiler spills on 9.0.
    return Tile(
        {
            "BLOCK_S": triton.next_power_of_2(slabs),
            "BLOCK_W": min(_MERGED_CHANNELS, triton.next_power_of_2(width)),
        },
        num_warps=8,
    )


@dataclass(frozen=True)
class _Plan:
    """How x is cut up: `blocks` of BLOCK_P pixels an image, `across` of BLOCK_C channels, and slabs of whole blocks."""

    chosen: Tile
    pixels: int
    channels: int
    groups: int
    blocks: int
    across: int
    slabs: int
    slab_pixels: int

    @classmethod
    def of(cls, x: Tensor, num_groups: int) -> _Plan:
        """Plan for x (B, C, *), dense and not empty."""
        chosen = tile(channels_innermost(x))
        pixels, channels = x.shape[2:].numel(), x.shape[1]
        block_p = chosen.constants["BLOCK_P"]
        blocks = triton.cdiv(pixels, block_p)
        slab_pixels = triton.cdiv(blocks, _MAX_SLABS) * block_p
        slabs = triton.cdiv(pixels, slab_pixels)
        across = triton.cdiv(channels, chosen.constants["BLOCK_C"])
        return cls(chosen, pixels, channels, num_groups, blocks, across, slabs, slab_pixels)

    @property
    def merging(self) -> Tile:
        """The tile of the kernels that merge a group's slabs."""
        return _merging(self.slabs, self.channels // self.groups)

    def with_activation(self, activation: str | None) -> Tile:
        """The tile of the kernels that know the activation."""
        return Tile({"SILU": activation == "silu", **self.chosen.constants})

    def statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return each group's mean, what that lost by its rounding, and 1 / sqrt(variance + eps), (B, G) fp32."""
        images = len(x)
        slabbed = [x.new_empty((images, self.slabs, self.channels), dtype=torch.float32) for _ in range(3)]
        shape = (self.pixels, self.channels, self.slabs, self.slab_pixels)
        launch(_statistics, (images * self.slabs, self.across), self.chosen, x.device, x, *slabbed, *shape)
        found = tuple(x.new_empty((images, self.groups), dtype=torch.float32) for _ in range(3))
        launch(_merge, (images * self.groups,), self.merging, x.device, *slabbed, *found, *shape, self.groups, eps)
        mean, rest, rstd = found
        return mean, rest, rstd


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
    out = torch.empty_like(x)
    if x.numel() == 0:
        nothing = x.new_full((len(x), num_groups), torch.nan, dtype=torch.float32)
        return out, nothing, nothing.clone()
    plan = _Plan.of(x, num_groups)
    mean, rest, rstd = plan.statistics(x, eps)
    grid = (len(x) * plan.blocks, plan.across)
    parts = (x, out, weight, bias, mean, rest, rstd, plan.pixels, plan.channels, num_groups, plan.blocks)
    launch(_normalise, grid, plan.with_activation(activation), x.device, *parts)
    return out, mean, rstd


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.group_norm_silu_backward`; float64 and empty tensors go there.

    The mean is computed again, as what its rounding lost is not kept; rstd is taken as it came.
    """
    if x.dtype not in TRITON_TYPES or x.numel() == 0:
        return reference.group_norm_silu_backward(grad, x, mean, rstd, weight, bias, activation)
    x, weight, bias, rstd = dense(x), weight.contiguous(), bias.contiguous(), rstd.contiguous()
    grad = like(grad, x)
    out = torch.empty_like(x)
    images, num_groups = mean.shape
    plan = _Plan.of(x, num_groups)
    # Without eps: its 1 / deviation, infinite for a constant group, is not used.
    mean, rest, _ = plan.statistics(x, 0.0)
    normal = (weight, bias, mean, rest, rstd)
    applying = plan.with_activation(activation)
    sums, products = (x.new_empty((images, plan.slabs, plan.channels), dtype=torch.float32) for _ in range(2))
    shape = (plan.pixels, plan.channels)
    slabs = (plan.slabs, plan.slab_pixels)
    summing = (grad, x, *normal, sums, products, *shape, num_groups, *slabs)
    launch(_gradient_sums, (images * plan.slabs, plan.across), applying, x.device, *summing)
    of_bias, of_weight = (x.new_empty((images, plan.channels), dtype=torch.float32) for _ in range(2))
    slope, product = (x.new_empty((images, num_groups), dtype=torch.float32) for _ in range(2))
    merging = (sums, products, weight, of_bias, of_weight, slope, product, *shape, *slabs, num_groups)
    launch(_merge_gradients, (images * num_groups,), plan.merging, x.device, *merging)
    parts = (grad, x, out, *normal, slope, product, *shape, num_groups, plan.blocks)
    launch(_gradient, (images * plan.blocks, plan.across), applying, x.device, *parts)
    return out, of_weight.sum(0), of_bias.sum(0)


def cases() -> list[KernelCase]:
    """Return the launches: both layouts, with and without SiLU, and the merges at their largest."""
    found = []
    fp32 = ("shifts", "means", "squares", "mean", "rest", "rstd", "sums", "products", "mean_slope", "mean_product")
    multiples = ("pixels", "channels", "groups", "slab_pixels")
    shared = dict.fromkeys((*fp32, "of_bias", "of_weight"), "*fp32:16") | dict.fromkeys(multiples, "i32:16")
    shared |= {"slabs": "i32", "blocks": "i32", "eps": "fp32"}

    def add(name: str, kernel: Any, dtype: str, chosen: Tile, *, slow: bool = False) -> None:
        types = shared | dict.fromkeys(("grad", "x", "out", "weight", "bias"), f"*{dtype}:16")
        arguments = {key: types[key] for key in kernel.arg_names if key not in chosen.constants}
        found.append(KernelCase(f"group_norm_silu/{name}", kernel, arguments, chosen, slow=slow))

    for width in (4, _MERGED_CHANNELS):
        merging = _merging(_MAX_SLABS, width)
        add(f"merge/W={width}", _merge, "fp32", merging)
        add(f"merge_gradients/W={width}", _merge_gradients, "fp32", merging)
    for dtype in TRITON_TYPES.values():
        for name, channels_last in (("channels-last", True), ("contiguous", False)):
            chosen = tile(channels_last)
            add(f"statistics/{dtype}/{name}", _statistics, dtype, chosen)
            for silu in (True, False):
                applying = Tile({"SILU": silu, **chosen.constants})
                form = f"{'silu' if silu else 'plain'}/{dtype}/{name}"
                add(form, _normalise, dtype, applying, slow=not silu)
                add(f"gradient_sums/{form}", _gradient_sums, dtype, applying, slow=not silu)
                add(f"gradient/{form}", _gradient, dtype, applying, slow=not silu)
    return found
