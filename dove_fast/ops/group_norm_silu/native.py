"""group_norm_silu in the native module; `csrc/cpu/group_norm_silu.cpp` says in which order the sums are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from dove_fast import native
from dove_fast.ops.arguments import DTYPE_CODES, as_float32
from dove_fast.ops.group_norm_silu import reference
from dove_fast.ops.group_norm_silu.reference import channels_innermost, dense


def group_norm_silu_cpu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, *, _isa: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.group_norm_silu`, for CPU tensors; float64 goes there.

    `_isa` names the instruction set, for tests; "" is the best one.
    """
    if x.dtype not in DTYPE_CODES:
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, activation)
    x = dense(x)
    batch, channels = x.shape[:2]
    weight, bias = as_float32(weight), as_float32(bias)
    out = torch.empty_like(x)
    mean = torch.empty(batch, num_groups)
    rstd = torch.empty(batch, num_groups)
    native.load().group_norm_silu_cpu(
        x.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        batch,
        channels,
        x.shape[2:].numel(),
        num_groups,
        eps,
        channels_innermost(x),
        activation == "silu",
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        _isa,
    )
    return out, mean, rstd
