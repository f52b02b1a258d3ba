"""Rows that name their places in the cache against gathering the alive rows' caches, at the published sizes.

    pytest benchmarks/bench_cache_places.py --benchmark-only --benchmark-json=figures.json

One block of 32 steps behind 256 + 64 positions, after half or nearly all of 32 rows have left. The rival copies the
keys and values of the rows that are alive into a cache of their own first, as the engine would after every block in
which rows ended, and its block reads those. `gathered_bytes` is what it copies.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from dove_fast import DOVEConfig
from dove_fast.generation.blocks import Positions, advance, by_row
from dove_fast.generation.cache import GeneratorCache
from dove_fast.generation.linear import PackedLinears
from dove_fast.generation.steps import derived_tables, step_tables
from dove_fast.models.gpt_neox import GPTNeoX

PLACES, PREFIX, STEP, BLOCK = 32, 256, 64, 32


@pytest.mark.parametrize("alive", [4, 16])
@torch.no_grad()
def bench_naming_places(compare, device, alive: int) -> None:
    """A block of the rows that are alive, spread over the places of all."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = DOVEConfig.base()
    torch.manual_seed(0)
    generator = GPTNeoX(config.generator, causal=True).to(device, dtype)
    tables = step_tables(derived_tables(), generator, config.num_tokens)
    linears = PackedLinears()
    have = PREFIX + STEP
    positions = PREFIX + config.num_tokens
    kind = {"device": device, "dtype": dtype, "state_dtype": dtype}
    every, some = (
        GeneratorCache.allocate(config.generator, slots, positions, config.num_tokens, **kind)
        for slots in (PLACES, alive)
    )
    for tensor in (*every.keys, *every.values):
        tensor.normal_()
    named = list(range(0, PLACES, PLACES // alive))
    chosen = torch.tensor(named, device=device)

    def block(slots: list[int], cache: GeneratorCache) -> Tensor:
        rows = by_row(slots, [BLOCK] * alive, prefixes=[PREFIX] * alive, steps=[STEP] * alive)
        at = Positions.from_rows(rows.to(device, non_blocking=True), alive, alive * BLOCK, BLOCK)
        return advance(generator, tables, at, cache, linears)

    def gathered() -> Tensor:
        for mine, theirs in zip((*some.keys, *some.values), (*every.keys, *every.values), strict=True):
            mine[:, :, :have] = theirs[:, :, :have].index_select(0, chosen)
        return block(list(range(alive)), some)

    assert_close(block(named, every), gathered())
    row = every.keys[0][0, :, :have]
    compare(
        lambda: block(named, every),
        gathered,
        rival_name="gathering",
        alive=alive,
        gathered_bytes=2 * len(every.keys) * alive * row.numel() * row.element_size(),
    )
