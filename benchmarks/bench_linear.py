"""Linear layers of the published sizes with packed weights against the plain layers, on a CPU.

    pytest benchmarks/bench_linear.py --benchmark-only --threads 2 --benchmark-json=figures.json

Rows: one, a small and a large block of steps, and a batch of prefixes.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import RELATIVE, assert_close, relative_error
from torch import nn

from dove_fast.generation.linear import PackedLinears

SIZES = {"qkv": (512, 1536), "dense": (512, 512), "h to 4h": (512, 2048), "4h to h": (2048, 512)}


@pytest.mark.parametrize("rows", [1, 32, 256, pytest.param(4096, marks=pytest.mark.large)])
@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def bench_linear(compare, device, dtype, name, rows) -> None:
    """One layer."""
    if device.type != "cpu":
        pytest.skip("weights are packed for CPUs")
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no instructions for bf16")
    inputs, outputs = SIZES[name]
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs).to(dtype)
    x = torch.randn(rows, inputs).to(dtype)
    linears = PackedLinears()
    if dtype == torch.float32:
        assert_close(linears(layer, x), layer(x))
    else:
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert relative_error(linears(layer, x), exact) <= RELATIVE[dtype]
    # The ceiling is that of fp32.
    flop = 2.0 * rows * inputs * outputs if dtype == torch.float32 else None
    compare(lambda: linears(layer, x), lambda: layer(x), rival_name="nn.Linear", rows=rows, flop=flop, dtype=str(dtype))
