"""The engine: prefill once, step in blocks, stop at EOS, leave the batch, and let new rows take the places.

The same tokens as one pass over all positions, as the generator's outputs are never fed back. Source: METHOD section 2.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dove_fast.generation.batch import Batch, Block, Finished, LengthRule, Waiting, WorkCounters
from dove_fast.generation.blocks import last_keys_and_values
from dove_fast.generation.cache import CachePool, graphs_of, row_bytes
from dove_fast.generation.decoder import decode, derived_zero_row
from dove_fast.generation.graphs import RECORDERS, spare_places
from dove_fast.generation.linear import PackedLinears
from dove_fast.generation.schedule import (
    CostModel,
    LengthHistogram,
    Survival,
    launch_ahead,
    next_block,
    stream_block,
)
from dove_fast.generation.steps import derived_tables, step_tables
from dove_fast.models.gpt_neox import GPTNeoX
from dove_fast.ragged import RaggedTokens

__all__ = ["Generation", "generate", "rounded_up"]

# What the caches of all rows together may take; more rows wait until others have ended.
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}

# Graphs of the encoder that are kept, one for each number of images.
ENCODER_GRAPHS = 4

# Caches are made for a multiple of so many positions, so that queries of other lengths seldom need a new one.
POSITION_MULTIPLE = 32


def rounded_up(positions: int) -> int:
    """Return the least multiple of POSITION_MULTIPLE that holds so many positions."""
    return -(-positions // POSITION_MULTIPLE) * POSITION_MULTIPLE


class Generation:
    """What a model keeps for its engine between calls, and what users can set.

    `histogram`: the lengths to expect, learned while running where `learning`; replace it by
    `LengthHistogram(T, lengths)` where they are known. `cost`: what a block costs; None takes the device type's
    default, `DOVE.measure_cost()` fits one.
    `cuda_graphs`: on a GPU, whether the encoder, prefixes of few rows and the blocks are recorded as CUDA graphs once a
    shape came twice, and replayed. Values change by rounding alone: a block's rows are filled up to one of few counts.
    Off by default: not measured yet. A `ValueError` elsewhere, and under autocast (cast the weights instead). They
    keep the memory of an encoder's chunk and of the largest block.
    Copies and pickles keep these four.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._histogram = LengthHistogram(num_tokens)
        self.learning = True
        self.cost: CostModel | None = None
        self.cuda_graphs = False
        self._encoder_graphs = graphs_of(ENCODER_GRAPHS)
        self._encoder_lock = threading.Lock()
        self._tables = derived_tables()
        self._last_projection = last_keys_and_values()
        self._zero_row = derived_zero_row()
        self._linears = PackedLinears()
        self._pool = CachePool()

    @property
    def histogram(self) -> LengthHistogram:
        """The lengths that the schedule expects."""
        return self._histogram

    @histogram.setter
    def histogram(self, histogram: LengthHistogram) -> None:
        if not isinstance(histogram, LengthHistogram):
            raise TypeError(f"histogram must be a LengthHistogram, got {type(histogram).__name__}")
        if histogram.num_tokens != self.num_tokens:
            raise ValueError(f"histogram must be over {self.num_tokens} tokens, got {histogram.num_tokens}")
        self._histogram = histogram

    def learn(self, lengths: Sequence[int], rule: LengthRule) -> None:
        """Add the lengths of rows that ended by `rule`, where `learning` and EOS decided them."""
        if self.learning and rule.leaves_to_eos(self.num_tokens):
            self.histogram.update(lengths)

    def refresh(self) -> None:
        """Forget everything that follows from the weights, and give the memory of the caches back.

        Needed only after a write that torch does not count, through `parameter.data`.
        """
        self._tables.refresh()
        self._last_projection.refresh()
        self._zero_row.refresh()
        self._linears.refresh()
        self._encoder_graphs.refresh()
        self._pool.clear()

    def cost_on(self, device: torch.device) -> CostModel:
        """Return the cost model in use on a device."""
        return self.cost or CostModel.default(device.type)

    def _records_on(self, device: torch.device) -> bool:
        if not self.cuda_graphs:
            return False
        if device.type not in RECORDERS:
            raise ValueError(f"generation.cuda_graphs is for a model on a GPU, this one is on {device}")
        if torch.is_autocast_enabled(device.type):
            raise ValueError("generation.cuda_graphs does not go with autocast; cast the model's weights instead")
        return True

    def encode(self, encode: Callable[[Tensor], Tensor], images: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        """Return `encode(images)`, which reads `parameters`: recorded and replayed where `cuda_graphs` says so."""
        if not self._records_on(images.device):
            return encode(images)
        stream = torch.cuda.current_stream(images.device).cuda_stream if images.is_cuda else None
        # One at a time: a graph's memory is not for two. On the device the stream keeps the order.
        with self._encoder_lock:
            graphs = self._encoder_graphs(*parameters)
            return graphs(stream, encode, images).clone()

    def decode(self, token_decoder: GPTNeoX, tokens: RaggedTokens, *, attends_padding: bool) -> Tensor:
        """Return the token decoder's states (B, T, d) for images of 1 to T tokens each."""
        return decode(
            token_decoder, tokens, self.num_tokens, self._zero_row, self._linears, attends_padding=attends_padding
        )

    @contextmanager
    def batch(
        self, generator: GPTNeoX, eos_head: nn.Linear, slots: int, longest_prefix: int, rule: LengthRule
    ) -> Iterator[Batch]:
        """Lend an empty batch with `slots` places for rows of at most `longest_prefix` prefix positions."""
        weight = generator.final_layer_norm.weight
        device, dtype = weight.device, weight.dtype
        # Autocast leaves fp64 alone.
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        positions = rounded_up(longest_prefix + rule.most)
        tables = step_tables(self._tables, generator, self.num_tokens)
        recording = self._records_on(device)
        with self._pool.lease(
            generator.config,
            slots + (spare_places(slots) if recording else 0),
            positions,
            rule.most,
            device=device,
            dtype=dtype,
            state_dtype=weight.dtype,
        ) as cache:
            reads = (*generator.parameters(), *eos_head.parameters(), *tables)
            yield Batch(
                generator,
                eos_head,
                cache,
                slots,
                rule,
                tables=tables,
                last_projection=self._last_projection,
                linears=self._linears,
                graphs=cache.graphs(*reads) if recording else None,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encoder_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encoder_lock = threading.Lock()

    def most_rows(self, generator: GPTNeoX, longest_prefix: int, steps: int) -> int:
        """Return how many rows fit into `CACHE_BYTES`, at least one."""
        weight = generator.final_layer_norm.weight
        budget = CACHE_BYTES.get(weight.device.type, CACHE_BYTES["cpu"])
        positions = rounded_up(longest_prefix + steps)
        rows = max(1, budget // row_bytes(generator.config, positions, steps, weight.element_size()))
        if self.cuda_graphs:
            rows = max(1, rows - spare_places(rows))
        return rows


def generate(
    generation: Generation,
    generator: GPTNeoX,
    eos_head: nn.Linear,
    prefixes: Sequence[Tensor],
    rule: LengthRule,
    block_size: int | None,
) -> tuple[RaggedTokens, WorkCounters]:
    """Generate the tokens of B rows, as many at a time as memory takes.

    prefixes: B tensors (N + L_b, d), what each row's steps follow. block_size: steps a block, None for the schedule's.
    """
    longest = max(prefix.shape[0] for prefix in prefixes)
    places = min(len(prefixes), generation.most_rows(generator, longest, rule.most))
    survival = generation.histogram.survival(rule.most)
    cost = generation.cost_on(prefixes[0].device)
    if block_size is None and rule.threshold is None:
        block_size = rule.most
    with generation.batch(generator, eos_head, places, longest, rule) as batch:
        if places < len(prefixes):
            size = block_size or stream_block(survival, cost, places, longest)
            tokens = _run_refilled(batch, prefixes, size)
        else:
            batch.admit(range(places), prefixes)
            lengths = [0] * places
            for row in _blocks(batch, block_size, survival, cost):
                lengths[row.key] = row.length
            tokens = RaggedTokens.from_padded(batch.states(places), lengths)
        return tokens, batch.counters


def _blocks(batch: Batch, block_size: int | None, survival: Survival, cost: CostModel) -> Iterator[Finished]:
    """Run rows that are all at one step to their ends, and yield each when it has ended.

    A block is launched before the one before it is read, where that costs less than waiting for the read.
    """
    prefix = batch.longest_prefix

    def size_of(alive: int, step: int) -> int:
        return block_size or next_block(survival, cost, alive, prefix, step)

    launched: Block | None = None
    while batch.alive:
        if launched is None:
            launched = batch.launch(size_of(batch.alive, batch.step))
        ahead: Block | None = None
        if batch.has_steps:
            size = size_of(batch.alive, batch.step)
            if launch_ahead(survival, cost, batch.alive, prefix, batch.step - max(launched.counts), batch.step, size):
                ahead = batch.launch(size)
        yield from batch.collect(launched)
        launched = ahead


def _run_refilled(batch: Batch, prefixes: Sequence[Tensor], block_size: int) -> RaggedTokens:
    """Generate the tokens of more rows than there are places: rows that wait take those of rows that ended."""
    waiting = deque(Waiting(key, prefix) for key, prefix in enumerate(prefixes))
    rows = list(prefixes)
    while waiting or batch.alive:
        batch.refill(waiting)
        for row in batch.run(block_size):
            rows[row.key] = batch.tokens_of(row)
    return RaggedTokens.from_rows(rows)
