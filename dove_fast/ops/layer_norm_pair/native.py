"""layer_norm_pair in the native module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dove_fast import native
from dove_fast.ops.arguments import DTYPE_CODES, as_float32, as_rows
from dove_fast.ops.layer_norm_pair import reference


def layer_norm_pair_cpu(
    x: Tensor,
    addends: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
    *,
    _isa: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.layer_norm_pair`, for CPU tensors; float64 goes there.

    `_isa` names the instruction set, for tests; "" is the best one.
    """
    if x.dtype not in DTYPE_CODES:
        return reference.layer_norm_pair(x, addends, weight1, bias1, weight2, bias2, eps)
    width = x.shape[-1]
    terms = [as_rows(term) for term in (x, *addends)]
    parameters = [None if p is None else as_float32(p) for p in (weight1, bias1, weight2, bias2)]
    total = x.new_empty(x.shape) if addends else x
    y1 = x.new_empty(x.shape)
    y2 = x.new_empty(0 if weight2 is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    absent = (None,) * (3 - len(terms))
    native.load().layer_norm_pair_cpu(
        tuple(0 if t is None else t.data_ptr() for t in (*terms, *absent)),
        tuple(0 if t is None else t.stride(0) for t in (*terms, *absent)),
        (total.data_ptr() if addends else 0, y1.data_ptr(), 0 if weight2 is None else y2.data_ptr()),
        (mean.data_ptr(), rstd.data_ptr()),
        tuple(0 if p is None else p.data_ptr() for p in parameters),
        terms[0].shape[0],
        width,
        eps,
        DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        _isa,
    )
    return total, y1, y2, mean, rstd
