"""Tensors as the kernels take them. What is so already is not called upon: small calls are as fast as this is."""

from __future__ import annotations

import torch
from torch import Tensor

from dove_fast import native

__all__ = ["DTYPE_CODES", "as_float32", "as_rows"]

# The dtypes that the native kernels take, and their numbers there.
DTYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in native.DTYPE_CODES.items()}


def as_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` contiguous and in fp32."""
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def as_rows(tensor: Tensor) -> Tensor:
    """View (..., d) as (rows, d) with adjacent elements in a row; a copy where strides do not allow it."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
