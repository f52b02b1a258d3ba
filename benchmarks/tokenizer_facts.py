"""What the table of tokenizers says of a tokenizer beside its speed: positions, GFLOP, weights, tokens, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dove_fast import ops  # noqa: F401  # registers torch.ops.dove_fast

__all__ = ["Facts", "bytes_of_codes", "counted", "flop_of", "parameters_of"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Facts:
    """Figures an image, means over the batch; they do not depend on the machine.

    positions: those that transformers compute, every pass counted; None without one. flop: of products, convolutions
    and attention, two a multiply-add. parameters: the weights that the call reads. tokens: what it gives; kind: what
    each is; token_bytes: what they take without any further coding.
    """

    positions: float | None
    flop: float
    parameters: int
    tokens: float
    kind: str
    token_bytes: float


def bytes_of_codes(tokens: float, codewords: int) -> float:
    """Return the bytes of so many codes, each of as few bits as tell the codewords apart."""
    return tokens * math.ceil(math.log2(codewords)) / 8


def parameters_of(parts: Iterable[nn.Module | nn.Parameter]) -> int:
    """Return how many weights the parts have."""
    return sum(
        part.numel() if isinstance(part, nn.Parameter) else sum(weight.numel() for weight in part.parameters())
        for part in parts
    )


def flop_of(function: Callable[[], Any]) -> float:
    """Return the floating-point operations of a call's products, convolutions and attention, two a multiply-add.

    torch's own counter, told of the operators that it does not know: oneDNN's products with packed weights, its
    attention on a CPU, and ours. Attention counts every key up to the row's end, masked or not, as that counter does;
    norms, activations and the EOS head of the engine (1024 a position) are not counted.
    """
    return counted(function)[1]


def counted(function: Callable[[], Result]) -> tuple[Result, float]:
    """Return a call's result and what `flop_of` says of it."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        result = function()
    return result, float(counter.get_total_flops())


def _formulas() -> dict[Any, Callable[..., int]]:
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.dove_fast.prefix_attention: _prefix_attention,
        torch.ops.dove_fast.prefix_attention_cached: _prefix_attention_cached,
    }
    if torch.backends.mkldnn.is_available():
        formulas[torch.ops.mkldnn._linear_pointwise] = _linear
    return formulas


def _linear(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    return 2 * math.prod(out_shape) * x[-1]


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    # q, k (B, H, P, D), v (B, H, P, D'): q k^T, and its rows times v.
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


# The rows' lengths are values, not shapes, so these two take the tensors themselves.
def _prefix_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> int:
    return _ragged(q, cu_seqlens, torch.zeros_like(cu_seqlens[1:]))


def _prefix_attention_cached(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *rest: Any, **__: Any) -> int:
    # max_seqlen, cos, sin, causal, scale, k_cache, v_cache, slots, starts.
    return _ragged(q, cu_seqlens, rest[8])


def _ragged(q: Tensor, cu_seqlens: Tensor, starts: Tensor) -> int:
    new = cu_seqlens.diff()
    # q (total, H, D); two products of D for every pair of a query and a key.
    return int(4 * q.shape[1] * q.shape[2] * (new * (starts + new)).sum())


for _raw in (_prefix_attention, _prefix_attention_cached):
    _raw._get_raw = True  # type: ignore[attr-defined]
