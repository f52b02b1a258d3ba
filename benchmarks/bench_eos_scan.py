"""eos_scan against the head, the comparison and the search that it replaces.

pytest benchmarks/bench_eos_scan.py --benchmark-only --benchmark-json=figures.json
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dove_fast import ops

WIDTH, THRESHOLD = 512, 0.5


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("steps", [32])
def bench_eos_scan(compare, device, rows, steps):
    """A block of steps, fp32, d = 512; every row has as many, as the rival needs it."""
    states = torch.randn(rows * steps, WIDTH, device=device)
    weight, bias = torch.randn(1, WIDTH, device=device) / WIDTH**0.5, torch.full((1,), -2.0, device=device)
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * steps
    start = torch.full((rows,), 64, dtype=torch.int32, device=device)
    limit = math.log(THRESHOLD / (1 - THRESHOLD))

    def ours() -> Tensor:
        return ops.eos_scan(states, offsets, weight, bias, threshold=THRESHOLD, steps=start, max_length=256)[1]

    def eager() -> Tensor:
        stops = F.linear(states, weight, bias).view(rows, steps) > limit
        return torch.where(stops.any(1), start + stops.int().argmax(1) + 1, 0)

    with torch.inference_mode():
        assert torch.equal(ours().long(), eager().long())
        compare(ours, eager, rival_name="linear, compare, argmax", flop=2.0 * states.numel(), moved=states.nbytes)
