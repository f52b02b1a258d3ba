"""eos_scan in the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from dove_fast import native
from dove_fast.ops.arguments import DTYPE_CODES, as_float32, as_rows
from dove_fast.ops.eos_scan import reference


def eos_scan_cpu(
    states: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor,
    limit: float,
    steps: Tensor,
    max_length: int,
    *,
    _isa: str = "",
) -> tuple[Tensor, Tensor]:
    """As `reference.eos_scan`, for CPU tensors; float64 goes there. `_isa` names the instruction set, for tests."""
    if states.dtype not in DTYPE_CODES:
        return reference.eos_scan(states, cu_seqlens, weight, bias, limit, steps, max_length)
    states = as_rows(states)
    cu_seqlens, steps = cu_seqlens.contiguous(), steps.contiguous()
    weight, bias = as_float32(weight), as_float32(bias)
    logits = torch.empty(states.shape[0])
    lengths = torch.empty(steps.shape[0], dtype=torch.int32)
    native.load().eos_scan_cpu(
        states.data_ptr(),
        states.stride(0),
        cu_seqlens.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        limit,
        steps.data_ptr(),
        max_length,
        logits.data_ptr(),
        lengths.data_ptr(),
        steps.shape[0],
        states.shape[1],
        DTYPE_CODES[states.dtype],
        torch.get_num_threads(),
        _isa,
    )
    return logits, lengths
