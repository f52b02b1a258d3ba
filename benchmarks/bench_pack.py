"""pack and unpack against what a user would write in torch, at the token decoder's sizes: T = 256, d = 512.

    pytest benchmarks/bench_pack.py --benchmark-only --benchmark-json=figures.json

The rival for pack is a boolean mask, for unpack `pad_sequence` on the split rows. Results are compared first.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from dove_fast import ops

STEPS, WIDTH = 256, 512


@pytest.fixture(scope="module")
def lengths(batch: int) -> list[int]:
    """Return lengths that are spread over 1..T."""
    return torch.randint(1, STEPS + 1, (batch,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def padded(batch: int, device: torch.device) -> torch.Tensor:
    """Return a batch of states, (B, T, d)."""
    return torch.randn(batch, STEPS, WIDTH, device=device)


def bench_pack(compare, padded, lengths, device):
    """Padded to ragged."""
    mask = torch.arange(STEPS, device=device) < torch.tensor(lengths, device=device)[:, None]

    def ours():
        return ops.pack(padded, lengths)[0]

    assert torch.equal(ours(), padded[mask])
    compare(ours, lambda: padded[mask], rival_name="padded[mask]", moved=2 * sum(lengths) * WIDTH * 4)


def bench_unpack(compare, padded, lengths):
    """Ragged to padded."""
    values, cu_seqlens = ops.pack(padded, lengths)
    longest = max(lengths)

    def ours():
        return ops.unpack(values, cu_seqlens, longest)

    def rival():
        return pad_sequence(values.split(lengths), batch_first=True)

    assert torch.equal(ours(), rival())
    compare(ours, rival, rival_name="pad_sequence", moved=2 * sum(lengths) * WIDTH * 4)
