"""layer_norm_pair against the two additions and two LayerNorms that it replaces.

pytest benchmarks/bench_layer_norm_pair.py --benchmark-only --benchmark-json=figures.json
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dove_fast import ops

WIDTH = 512
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [256, pytest.param(8192, marks=pytest.mark.large)])
def bench_layer_norm_pair(compare, device, rows, dtype):
    """The sum of three terms and both norms of it, d = 512."""
    x, mlp, attended = torch.randn(3, rows, WIDTH, device=device).to(dtype)
    parameters = torch.randn(4, WIDTH, device=device).to(dtype)

    def ours() -> tuple[Tensor, ...]:
        return ops.layer_norm_pair(x, *parameters, addends=(mlp, attended))

    def eager() -> tuple[Tensor, ...]:
        total = mlp + attended + x
        w1, b1, w2, b2 = parameters
        return total, F.layer_norm(total, (WIDTH,), w1, b1), F.layer_norm(total, (WIDTH,), w2, b2)

    with torch.inference_mode():
        for result, expected in zip(ours(), eager(), strict=True):
            assert (result.double() - expected.double()).norm() <= TOLERANCE[dtype] * expected.double().norm()
        compare(ours, eager, rival_name="add, add, layer_norm, layer_norm", moved=6 * x.nbytes)
