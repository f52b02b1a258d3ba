"""Group normalisation and SiLU in plain torch, any device: in fp32, in fp64 for fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out like x (B, C, *), and mean and rstd (B, G) in fp32 or fp64; weight and bias are (C,)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, channels, *space = x.shape
    pixels = torch.Size(space).numel()
    groups = x.to(wide).reshape(batch, num_groups, channels // num_groups * pixels)
    mean = groups.mean(2, keepdim=True)
    centred = groups - mean
    # A mean far from 0 is off by its own rounding, which the differences show.
    centred = centred - centred.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    out = torch.addcmul(
        bias.to(wide)[:, None], (centred * rstd).reshape(batch, channels, pixels), weight.to(wide)[:, None]
    )
    if activation == "silu":
        out = F.silu(out)
    out = like(out.to(x.dtype).reshape(x.shape), x)
    return out, mean.squeeze(2), rstd.squeeze(2)


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for x, laid out like out, and for weight and bias, in the dtype of mean and rstd.

    grad, of x's shape, is that of `group_norm_silu`'s out; mean and rstd are what it returned.
    """
    wide = mean.dtype
    batch, channels, *space = x.shape
    num_groups, pixels = mean.shape[1], torch.Size(space).numel()
    if x.numel() == 0:
        return like(torch.empty_like(x), x), mean.new_zeros(weight.shape), mean.new_zeros(bias.shape)
    centred = x.to(wide).reshape(batch, num_groups, channels // num_groups * pixels) - mean[:, :, None]
    # As in the forward.
    centred = centred - centred.mean(2, keepdim=True)
    weight = weight.to(wide)
    grad = grad.to(wide).reshape(batch, channels, pixels).contiguous()
    if activation == "silu":
        normal = (centred * rstd[:, :, None]).reshape(batch, channels, pixels)
        grad = torch.ops.aten.silu_backward(grad, torch.addcmul(bias.to(wide)[:, None], normal, weight[:, None]))
    # aten reads both as if they were contiguous.
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad,
        centred.reshape(batch, channels, pixels).contiguous(),
        torch.zeros_like(mean),
        rstd,
        weight,
        batch,
        channels,
        pixels,
        num_groups,
        [True, True, True],
    )
    return like(grad_x.to(x.dtype).reshape(x.shape), x), grad_weight, grad_bias


def channels_innermost(x: Tensor) -> bool:
    """Whether x (B, C, *) lies in memory as (B, *, C): channels-last, of any number of dimensions."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return x where it is contiguous or channels-last, else a contiguous copy."""
    return x if channels_innermost(x) else x.contiguous()


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return `tensor`, of x's shape, channels-last where x is, else contiguous; a copy where it is not yet."""
    if channels_innermost(x):
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()
