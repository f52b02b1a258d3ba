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
    out = out.to(x.dtype).reshape(x.shape)
    if channels_innermost(x):
        out = out.movedim(1, -1).contiguous().movedim(-1, 1)
    return out, mean.squeeze(2), rstd.squeeze(2)


def channels_innermost(x: Tensor) -> bool:
    """Whether x (B, C, *) lies in memory as (B, *, C): channels-last, of any number of dimensions."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return x where it is contiguous or channels-last, else a contiguous copy."""
    return x if channels_innermost(x) else x.contiguous()
