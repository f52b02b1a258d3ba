"""The residual sum and its LayerNorms in plain torch, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm_pair(
    x: Tensor,
    addends: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total, y1, y2 (..., d) in x's dtype, and mean and rstd (...) in fp32 or fp64.

    total is x itself without addends, y2 is empty without weight2.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x
    if addends:
        first, *rest = (addend.to(wide) for addend in (*addends, x))
        total = sum(rest, first).to(x.dtype).contiguous()
    rows = total.to(wide)
    mean = rows.mean(-1, keepdim=True)
    centred = rows - mean
    # A mean far from 0 is off by its own rounding, which the differences show.
    rest_of_mean = centred.mean(-1, keepdim=True)
    centred = centred - rest_of_mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = centred * rstd

    def norm(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addcmul(bias.to(wide), normal, weight.to(wide)).to(x.dtype).contiguous()

    y2 = x.new_empty(0) if weight2 is None or bias2 is None else norm(weight2, bias2)
    return total, norm(weight1, bias1), y2, (mean + rest_of_mean).squeeze(-1), rstd.squeeze(-1)
