"""group_norm_silu in the native module; its sources in `csrc/cpu` say in which order the sums are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from dove_fast import native
from dove_fast.ops.arguments import DTYPE_CODES, as_float32
from dove_fast.ops.group_norm_silu import reference
from dove_fast.ops.group_norm_silu.reference import channels_innermost, dense, like


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


def group_norm_silu_backward_cpu(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    *,
    _isa: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.group_norm_silu_backward`, for CPU tensors; float64 goes there. `_isa` is as above."""
    if x.dtype not in DTYPE_CODES:
        return reference.group_norm_silu_backward(grad, x, mean, rstd, weight, bias, activation)
    x = dense(x)
    grad = like(grad.to(x.dtype), x)
    mean, rstd, weight, bias = (as_float32(t) for t in (mean, rstd, weight, bias))
    batch, channels = x.shape[:2]
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    native.load().group_norm_silu_backward_cpu(
        (grad.data_ptr(), x.data_ptr(), grad_x.data_ptr()),
        (weight.data_ptr(), bias.data_ptr()),
        (mean.data_ptr(), rstd.data_ptr()),
        (grad_weight.data_ptr(), grad_bias.data_ptr()),
        batch,
        channels,
        x.shape[2:].numel(),
        mean.shape[1],
        channels_innermost(x),
        activation == "silu",
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        _isa,
    )
    return grad_x, grad_weight, grad_bias
