"""Keys, values and states of the rows that are being generated: allocated once for a number of rows, and used again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dove_fast.config import GPTNeoXConfig
from dove_fast.generation.graphs import Graphs
from dove_fast.models.derived import Derived
from dove_fast.models.gpt_neox import rotary_table

__all__ = ["CachePool", "GeneratorCache", "graphs_of", "row_bytes"]

# Graphs of blocks and prefixes that are kept over one cache.
BLOCK_GRAPHS = 64


def graphs_of(most: int) -> Derived:
    """Return what keeps `Graphs` of tensors that stay where they are and as they are: new ones where one changes."""
    return Derived(functools.partial(_new_graphs, most))


def _new_graphs(most: int, *tensors: Tensor) -> Graphs:
    del tensors
    return Graphs(most)


@dataclass(frozen=True)
class GeneratorCache:
    """Memory for `slots` rows. What was not written is not initialised, and never read.

    keys, values: one (slots, H, M, D) a layer, keys turned by their rotary positions; cos, sin: (M, rotary_dim) fp32,
    the table of those positions; states: (slots, T, d), the final hidden state of every step so far. graphs: what was
    recorded over this memory, by the tensors that it reads beside.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor
    states: Tensor
    graphs: Derived = field(default_factory=lambda: graphs_of(BLOCK_GRAPHS))

    @classmethod
    def allocate(
        cls,
        config: GPTNeoXConfig,
        slots: int,
        positions: int,
        steps: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
    ) -> GeneratorCache:
        """Allocate for rows of at most `positions` positions, the last `steps` of which have states."""
        shape = (slots, config.num_attention_heads, positions, config.head_dim)
        keys, values = (
            tuple(torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers))
            for _ in range(2)
        )
        cos, sin = rotary_table(torch.arange(positions, device=device), config)
        states = torch.empty((slots, steps, config.hidden_size), device=device, dtype=state_dtype)
        return cls(keys, values, cos, sin, states)

    def fits(self, slots: int, positions: int, steps: int) -> bool:
        """Whether this is large enough, with so many positions: the order of a reference's sums depends on that."""
        keys = self.keys[0]
        return keys.shape[0] >= slots and keys.shape[2] == positions and self.states.shape[1] >= steps


def row_bytes(config: GPTNeoXConfig, positions: int, steps: int, itemsize: int) -> int:
    """Return the bytes of one slot."""
    return itemsize * config.hidden_size * (2 * config.num_hidden_layers * positions + steps)


class CachePool:
    """Keeps the cache of the last call for the next one of the same kind. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[Any, GeneratorCache] | None = None

    @contextmanager
    def lease(
        self,
        config: GPTNeoXConfig,
        slots: int,
        positions: int,
        steps: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
    ) -> Iterator[GeneratorCache]:
        """Lend a cache of at least this size: the kept one if it fits, else a new one, which is kept afterwards."""
        # Work that an earlier call left on another stream may still use the memory.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        kind = (config, device, dtype, state_dtype, stream)
        with self._lock:
            kept, self._kept = self._kept, None
        cache = None
        if kept is not None and kept[0] == kind and kept[1].fits(slots, positions, steps):
            cache = kept[1]
        del kept
        if cache is None:
            with torch.inference_mode(False):
                cache = GeneratorCache.allocate(
                    config, slots, positions, steps, device=device, dtype=dtype, state_dtype=state_dtype
                )
        try:
            yield cache
        finally:
            with self._lock:
                self._kept = kind, cache

    def clear(self) -> None:
        """Give the kept memory back."""
        with self._lock:
            self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CachePool.__init__(self)
