"""pack and unpack in the native module. Data moves as bytes, so that every dtype is one code path."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dove_fast import native


def pack_cpu(padded: Tensor, cu_seqlens: Tensor, total: int, *, _isa: str = "") -> Tensor:
    """As `reference.pack`, for CPU tensors. `_isa` names the instruction set, for tests; "" is the best one."""
    return _pack("pack_cpu", padded, cu_seqlens, total, torch.get_num_threads(), _isa)


def unpack_cpu(values: Tensor, cu_seqlens: Tensor, length: int, *, _isa: str = "") -> Tensor:
    """As `reference.unpack`, for CPU tensors. `_isa` names the instruction set, for tests; "" is the best one."""
    return _unpack("unpack_cpu", values, cu_seqlens, length, torch.get_num_threads(), _isa)


def pack_cuda(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """As `reference.pack`, for CUDA tensors, on the current stream."""
    return _pack("pack_cuda", padded, cu_seqlens, total, *_device_and_stream(padded))


def unpack_cuda(values: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """As `reference.unpack`, for CUDA tensors, on the current stream."""
    return _unpack("unpack_cuda", values, cu_seqlens, length, *_device_and_stream(values))


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


# The bindings' arguments: source, target and cu_seqlens as addresses; batch, length, total; bytes of an entry; bytes
# from row to row and from entry to entry of the padded side; then the place (threads and ISA, or device and stream).


def _pack(binding: str, padded: Tensor, cu_seqlens: Tensor, total: int, *place: Any) -> Tensor:
    if not items_adjacent(padded):
        padded = padded.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    batch, length, *entry = padded.shape
    values = padded.new_empty((total, *entry))
    itemsize = padded.element_size()
    getattr(native.load(), binding)(
        padded.data_ptr(),
        values.data_ptr(),
        cu_seqlens.data_ptr(),
        batch,
        length,
        total,
        math.prod(entry) * itemsize,
        padded.stride(0) * itemsize,
        padded.stride(1) * itemsize,
        *place,
    )
    return values


def _unpack(binding: str, values: Tensor, cu_seqlens: Tensor, length: int, *place: Any) -> Tensor:
    values, cu_seqlens = values.contiguous(), cu_seqlens.contiguous()
    batch = cu_seqlens.shape[0] - 1
    total, *entry = values.shape
    padded = values.new_empty((batch, length, *entry))
    entry_bytes = math.prod(entry) * values.element_size()
    getattr(native.load(), binding)(
        values.data_ptr(),
        padded.data_ptr(),
        cu_seqlens.data_ptr(),
        batch,
        length,
        total,
        entry_bytes,
        length * entry_bytes,
        entry_bytes,
        *place,
    )
    return padded


def items_adjacent(padded: Tensor) -> bool:
    """Whether the items of one entry lie side by side; rows and entries may have any stride (a slice of a batch)."""
    adjacent = 1
    for size, stride in zip(reversed(padded.shape[2:]), reversed(padded.stride()[2:]), strict=True):
        if size != 1 and stride != adjacent:
            return False
        adjacent *= size
    return True
