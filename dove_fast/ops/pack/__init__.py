"""pack and unpack: a padded batch to its ragged rows, one behind the other, and back."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dove_fast import native as extension
from dove_fast.ops import registry
from dove_fast.ops.arguments import check_int, check_tensor, dtype_name
from dove_fast.ops.launch import deferred, why_no_triton
from dove_fast.ops.pack import native, reference
from dove_fast.ops.registry import Implementation

__all__ = ["cu_seqlens_from_offsets", "host_lengths", "pack", "unpack"]

MAX_TOTAL = 2**31 - 1  # cu_seqlens is int32


def pack(padded: Tensor, lengths: Tensor | Sequence[int], *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Keep the first lengths[b] entries of each row of a padded batch, one row behind the other.

    padded: (B, L, *), any dtype; lengths: (B,) integer tensor on any device, or a sequence of ints, 0 <= n <= L.
    A tensor of lengths on a GPU costs one host read, as they decide the result's shape; a sequence costs none.
    Numbers of the host cannot be captured: in a CUDA graph torch.ops.dove_fast.pack takes cu_seqlens and the total.
    Returns values (total, *) with total = sum of lengths, and cu_seqlens (B + 1,) int32, both on padded's device.
    Differentiable any number of times; the gradient of what was left out is zero.
    backend: None, "auto", "reference", "cpu", "cuda" or "triton".
    Raises `TypeError` for padded that is no tensor or lengths that are no integers, `ValueError` for a wrong number of
    lengths, one out of range (with its row) or a total beyond int32, `BackendError` where the backend cannot run.
    """
    check_tensor("padded", padded)
    registry.check_backend("pack", backend)
    if padded.dim() < 2:
        raise ValueError(f"padded must have shape (B, L, ...), got {tuple(padded.shape)}")
    offsets = list(accumulate(host_lengths(lengths, padded.shape[0], padded.shape[1]), initial=0))
    cu_seqlens = cu_seqlens_from_offsets(offsets, padded.device)
    return torch.ops.dove_fast.pack(padded, cu_seqlens, offsets[-1], backend), cu_seqlens


def unpack(values: Tensor, cu_seqlens: Tensor, length: int, *, backend: str | None = None) -> Tensor:
    """Lay ragged rows out as a zero-filled batch (B, length, *).

    values: (total, *), any dtype; cu_seqlens: (B + 1,) int32 on values' device, from 0 to total, non-decreasing.
    A row longer than `length` keeps its first `length` entries, so that a GPU needs no host read to check; the
    gradient of what was cut is zero. On the CPU the contents of cu_seqlens are checked; on a GPU a wrong cu_seqlens
    gives wrong values, but nothing outside `values` is read.
    Differentiable any number of times. backend: None, "auto", "reference", "cpu", "cuda" or "triton".
    Raises `TypeError` or `ValueError` for a wrong argument, `BackendError` where the backend cannot run.
    """
    if not isinstance(values, Tensor) or not isinstance(cu_seqlens, Tensor):
        found = f"{type(values).__name__} and {type(cu_seqlens).__name__}"
        raise TypeError(f"values and cu_seqlens must be tensors, got {found}")
    check_int("length", length, 0)
    registry.check_backend("unpack", backend)
    if values.dim() < 1:
        raise ValueError("values must have shape (total, ...), got a tensor without dimensions")
    _check_cu_seqlens(cu_seqlens, values.device)
    padded: Tensor = torch.ops.dove_fast.unpack(values, cu_seqlens, length, backend)
    return padded


def host_lengths(lengths: Tensor | Sequence[int], batch: int, limit: int) -> list[int]:
    """Return `lengths` as `batch` ints in [0, limit]; one host read where they are a tensor on a GPU."""
    if isinstance(lengths, Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"lengths must be integers, got {dtype_name(lengths.dtype)}")
        if lengths.dim() != 1:
            raise ValueError(f"lengths must have shape ({batch},), got {tuple(lengths.shape)}")
        result = lengths.tolist()
    else:
        if not isinstance(lengths, Iterable):
            raise TypeError(f"lengths must be a tensor or a sequence of ints, got {type(lengths).__name__}")
        lengths = list(lengths)
        for row, item in enumerate(lengths):
            if isinstance(item, bool) or not hasattr(item, "__index__"):
                raise TypeError(f"lengths must be integers, got {type(item).__name__} in row {row}")
        result = [operator.index(item) for item in lengths]
    if len(result) != batch:
        raise ValueError(f"lengths must have one entry for each of the {batch} rows, got {len(result)}")
    for row, item in enumerate(result):
        if not 0 <= item <= limit:
            raise ValueError(f"lengths must be between 0 and {limit}, got {item} in row {row}")
    return result


def cu_seqlens_from_offsets(offsets: Sequence[int], device: torch.device) -> Tensor:
    """Return host offsets (B + 1 ints) as cu_seqlens (B + 1,) int32 on `device`, without a synchronisation."""
    if offsets[-1] > MAX_TOTAL:
        raise ValueError(f"the rows hold {offsets[-1]} entries together, more than cu_seqlens (int32) can count")
    # From pageable memory the copy is staged before the call returns, so the source may go at once.
    return torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)


def _check_cu_seqlens(cu_seqlens: Tensor, device: torch.device) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {dtype_name(cu_seqlens.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be on {device} like the data, got {cu_seqlens.device}")


def _check_offsets(cu_seqlens: Tensor, total: int) -> None:
    """Check the contents of a cu_seqlens on the CPU."""
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != total:
        raise ValueError(f"cu_seqlens must go from 0 to the {total} entries of values, got {first} to {last}")
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if falls.numel():
        row = int(falls[0])
        start, stop = cu_seqlens[row : row + 2].tolist()
        raise ValueError(f"cu_seqlens must not decrease, got {start} and then {stop} in row {row}")


# Schemas with `total` and `length` as arguments, so that the shapes of the results do not depend on data. The backend
# is resolved inside the op, where torch.compile does not look. Library.define and impl rather than custom_op, which
# costs half as much again a call (29 against 20 microseconds).
_LIBRARY = torch.library.Library("dove_fast", "FRAGMENT")
_LIBRARY.define("pack(Tensor padded, Tensor cu_seqlens, SymInt total, str? backend=None) -> Tensor")
_LIBRARY.define("unpack(Tensor values, Tensor cu_seqlens, SymInt length, str? backend=None) -> Tensor")


def _pack(padded: Tensor, cu_seqlens: Tensor, total: int, backend: str | None = None) -> Tensor:
    _check_cu_seqlens(cu_seqlens, padded.device)
    if cu_seqlens.device.type == "cpu":
        _check_offsets(cu_seqlens, total)
    result: Tensor = registry.implementation("pack", backend, padded)(padded, cu_seqlens, total)
    return result


def _unpack(values: Tensor, cu_seqlens: Tensor, length: int, backend: str | None = None) -> Tensor:
    _check_cu_seqlens(cu_seqlens, values.device)
    if cu_seqlens.device.type == "cpu":
        _check_offsets(cu_seqlens, values.shape[0])
    result: Tensor = registry.implementation("unpack", backend, values)(values, cu_seqlens, length)
    return result


_LIBRARY.impl("pack", _pack, "CompositeExplicitAutograd")
_LIBRARY.impl("unpack", _unpack, "CompositeExplicitAutograd")


@torch.library.register_fake("dove_fast::pack", lib=_LIBRARY)
def _pack_fake(padded: Tensor, cu_seqlens: Tensor, total: int, backend: str | None = None) -> Tensor:
    return padded.new_empty((total, *padded.shape[2:]))


@torch.library.register_fake("dove_fast::unpack", lib=_LIBRARY)
def _unpack_fake(values: Tensor, cu_seqlens: Tensor, length: int, backend: str | None = None) -> Tensor:
    return values.new_empty((cu_seqlens.shape[0] - 1, length, *values.shape[1:]))


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    padded, cu_seqlens, _, ctx.backend = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.length = padded.shape[1]


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return torch.ops.dove_fast.unpack(grad, cu_seqlens, ctx.length, ctx.backend), None, None, None


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, cu_seqlens, _, ctx.backend = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.total = values.shape[0]


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return torch.ops.dove_fast.pack(grad, cu_seqlens, ctx.total, ctx.backend), None, None, None


# Each is the other's adjoint, cut rows included, so that every further derivative exists too.
torch.library.register_autograd("dove_fast::pack", _pack_backward, setup_context=_save_pack, lib=_LIBRARY)
torch.library.register_autograd("dove_fast::unpack", _unpack_backward, setup_context=_save_unpack, lib=_LIBRARY)

for _op in ("pack", "unpack"):
    registry.register(
        _op,
        cpu=Implementation(getattr(native, f"{_op}_cpu"), missing=extension.why_no_native),
        cuda=Implementation(getattr(native, f"{_op}_cuda"), missing=extension.why_no_cuda),
        triton=Implementation(deferred("dove_fast.ops.pack.triton_kernel", _op), missing=why_no_triton),
        reference=Implementation(getattr(reference, _op)),
    )
