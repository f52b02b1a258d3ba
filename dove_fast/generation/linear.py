"""A model's linear layers with weights that were laid out once for the CPU's matrix products."""

from __future__ import annotations

import functools
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dove_fast.models.derived import Derived
from dove_fast.models.gpt_neox import MLP

__all__ = ["PackedLinears", "is_plain"]

# Rows that the layout is chosen for; it is as good for one row and for thousands.
ROWS = 64


@functools.cache
def _packed_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes that oneDNN multiplies on this processor."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    has_bf16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset({torch.float32, torch.bfloat16} if has_bf16 else {torch.float32})


def _pack(weight: Tensor, *bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), ROWS)
    return packed, bias[0].to(dtype) if bias else None


class PackedLinears:
    """Runs linear layers on a CPU, without gradients, with a second copy of each weight in oneDNN's own layout.

    A general matrix product lays its weight out anew in every call (benchmarks/bench_linear.py has what that costs).
    The result is the layer's within rounding. A copy is made at a layer's first call, and again when its weight changes
    (see `Derived`); it goes when the layer goes. Anything else is the layer's own affair and is called as it is:
    subclasses of `nn.Linear` and adapters around it, layers with hooks or a `forward` of their own, other devices and
    dtypes, torch.compile, and `torch.backends.mkldnn` switched off. Safe to use from several threads. Copies and
    pickles start empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: WeakKeyDictionary[nn.Module, Derived] = WeakKeyDictionary()

    def __call__(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Return `linear(x)`: (..., in_features) -> (..., out_features)."""
        dtype = _dtype_to_pack(linear, x)
        if dtype is None or not isinstance(linear, nn.Linear):
            plain: Tensor = linear(x)
            return plain
        kept = self._kept.get(linear)
        if kept is None:
            with self._lock:
                kept = self._kept.setdefault(linear, Derived(_pack))
        sources: tuple[Tensor, ...] = (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
        packed, bias = kept(*sources, dtype=dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
        return out

    def mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """Return `mlp(x)`, (..., d) -> (..., d)."""
        if not isinstance(mlp, MLP) or not is_plain(mlp, MLP):
            plain: Tensor = mlp(x)
            return plain
        return self(mlp.dense_4h_to_h, F.gelu(self(mlp.dense_h_to_4h, x)))

    def refresh(self) -> None:
        """Drop all copies: the next calls make them again."""
        with self._lock:
            self._kept = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PackedLinears.__init__(self)


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling the module does what its class does and nothing else, so that it can be computed another way."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in vars(module)


def _dtype_to_pack(linear: nn.Module, x: Tensor) -> torch.dtype | None:
    """Return the dtype to multiply in, or None where this is no case for a packed weight."""
    if not isinstance(linear, nn.Linear) or not is_plain(linear):
        return None
    weight = linear.weight
    if (
        x.device.type != "cpu"
        or weight.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(x) is not Tensor
        or type(weight) is not nn.Parameter
        or weight.is_inference()
        or x.numel() == 0
        or not torch.backends.mkldnn.enabled
    ):
        return None
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    elif dtype != weight.dtype:
        return None
    return dtype if dtype in _packed_dtypes() else None
