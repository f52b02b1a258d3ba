"""eos_scan: from final hidden states to EOS logits, and to where each row ends, in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dove_fast import native as extension
from dove_fast.ops import registry
from dove_fast.ops.arguments import (
    DTYPE_CODES,
    check_dtype,
    check_int,
    check_number,
    check_parameter,
    check_tensor,
    dtype_name,
)
from dove_fast.ops.eos_scan import native, reference
from dove_fast.ops.launch import TRITON_TYPES, deferred, why_no_triton
from dove_fast.ops.registry import Implementation

__all__ = ["eos_scan"]


def eos_scan(
    states: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    threshold: float,
    steps: Tensor,
    max_length: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a block of steps of R ragged rows for EOS.

    states: (total, d) final hidden states, float64, float32, bfloat16 or float16; cu_seqlens: (R + 1,) int32, from 0 to
    total, non-decreasing; weight: (d,) or (1, d) and bias: () or (1,), the EOS head's, in states' dtype or float32;
    steps: (R,) int32, the step of each row's first state; all on one device. 0 < threshold < 1, max_length >= 1.
    Returns logits (total,), float32 (float64 for float64 states): states . weight + bias, whose sigmoid is p; and
    lengths (R,) int32: a row's number of tokens where this block ends it, else 0: the row is still alive. Its first
    state whose logit is above logit(threshold), taken in float32, is EOS and counts (NaN is not above); a row without
    one ends with step max_length - 1, and none has more than max_length tokens. An engine reads `lengths`, 4 R bytes,
    once a block. States are read once, in one launch; a head, a comparison and a search are half a dozen.
    No gradient: a call under autograd is refused. On the CPU the contents of cu_seqlens are checked; on a GPU nothing
    is read by the host.
    backend: None, "auto", "reference", "cpu" or "triton" (float64 always goes to the reference).
    Raises `TypeError` or `ValueError` for a wrong argument, `BackendError` where the backend cannot run.
    Source: METHOD section 3; `models.lengths.eos_lengths` is the same rule for all steps at once.
    """
    _check(states, cu_seqlens, weight, bias, steps)
    check_number("threshold", threshold)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    check_int("max_length", max_length, 1)
    registry.check_backend("eos_scan", backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (states, weight, bias)):
        raise ValueError("eos_scan has no gradient: call it under torch.no_grad()")
    limit = math.log(threshold / (1 - threshold))
    logits, lengths = torch.ops.dove_fast.eos_scan(
        states, cu_seqlens, weight.reshape(-1), bias.reshape(1), limit, steps, max_length, backend
    )
    return logits, lengths


def _check(states: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor, steps: Tensor) -> None:
    named = {"states": states, "cu_seqlens": cu_seqlens, "weight": weight, "bias": bias, "steps": steps}
    for name, tensor in named.items():
        check_tensor(name, tensor)
        if tensor.device != states.device:
            raise ValueError(f"{name} must be on {states.device} like states, got {tensor.device}")
    check_dtype("states", states)
    if states.dim() != 2 or states.shape[1] < 1:
        raise ValueError(f"states must have shape (total, d) with d at least 1, got {tuple(states.shape)}")
    width = states.shape[1]
    for name, tensor, shapes in (("weight", weight, ((width,), (1, width))), ("bias", bias, ((), (1,)))):
        check_parameter(name, tensor, "states", states.dtype)
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} must have shape {shapes[0]} or {shapes[1]}, got {tuple(tensor.shape)}")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("steps", steps)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {dtype_name(tensor.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (R + 1,), got {tuple(cu_seqlens.shape)}")
    if steps.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(f"steps must have shape ({cu_seqlens.shape[0] - 1},), got {tuple(steps.shape)}")


_LIBRARY = torch.library.Library("dove_fast", "FRAGMENT")
_LIBRARY.define(
    "eos_scan(Tensor states, Tensor cu_seqlens, Tensor weight, Tensor bias, float limit, Tensor steps,"
    " SymInt max_length, str? backend=None) -> (Tensor logits, Tensor lengths)"
)


def _eos_scan(
    states: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor,
    limit: float,
    steps: Tensor,
    max_length: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    if states.device.type == "cpu":
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != states.shape[0] or sorted(offsets) != offsets:
            raise ValueError(
                f"cu_seqlens must not decrease from 0 to the {states.shape[0]} entries of states, got {offsets}"
            )
    run = registry.implementation("eos_scan", backend, states)
    logits, lengths = run(states, cu_seqlens, weight, bias, limit, steps, max_length)
    return logits, lengths


_LIBRARY.impl("eos_scan", _eos_scan, "CompositeExplicitAutograd")


@torch.library.register_fake("dove_fast::eos_scan", lib=_LIBRARY)
def _fake(states: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    logits = states.new_empty(states.shape[0], dtype=torch.promote_types(states.dtype, torch.float32))
    return logits, states.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.int32)


registry.register(
    "eos_scan",
    cpu=Implementation(
        native.eos_scan_cpu, missing=extension.why_no_native, dtypes=frozenset((*DTYPE_CODES, torch.float64))
    ),
    triton=Implementation(
        deferred("dove_fast.ops.eos_scan.triton_kernel", "eos_scan"),
        missing=why_no_triton,
        dtypes=frozenset((*TRITON_TYPES, torch.float64)),
    ),
    reference=Implementation(reference.eos_scan),
)
