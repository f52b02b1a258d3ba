"""What every op asks of its arguments, and tensors as the kernels take them.

The checks raise `TypeError` or `ValueError` that say what came and what was expected. What is right already is not
called upon: small calls are as fast as this is.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from dove_fast import native

__all__ = [
    "DTYPES",
    "DTYPE_CODES",
    "as_float32",
    "as_rows",
    "check_dtype",
    "check_int",
    "check_number",
    "check_parameter",
    "check_tensor",
    "dtype_name",
]

# The dtypes that the ops of floating-point arithmetic take.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The dtypes that the native kernels take, and their numbers there.
DTYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for name, code in native.DTYPE_CODES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: Any) -> None:
    """Raise `TypeError` where `value` is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise `TypeError` where the tensor's dtype is none of `DTYPES`."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {dtype_name(tensor.dtype)}")


def check_parameter(name: str, tensor: Tensor, like: str, dtype: torch.dtype) -> None:
    """Raise `TypeError` where the dtype is neither `dtype`, that of the argument `like`, nor float32."""
    if tensor.dtype not in (dtype, torch.float32):
        found = dtype_name(tensor.dtype)
        raise TypeError(f"{name} must be {dtype_name(dtype)} like {like}, or float32, got {found}")


def check_int(name: str, value: Any, least: int) -> None:
    """Raise `TypeError` where `value` is no int, `ValueError` where it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: Any) -> None:
    """Raise `TypeError` where `value` is no real number; a tensor is none, as reading it could wait for a GPU."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def as_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` contiguous and in fp32."""
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def as_rows(tensor: Tensor) -> Tensor:
    """View (..., d) as (rows, d) with adjacent elements in a row; a copy where strides do not allow it."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
