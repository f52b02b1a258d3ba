"""The engine: prefill once, step in blocks, stop at EOS, leave the batch, and let new rows take the places.

The same tokens as one pass over all positions, as the generator's outputs are never fed back. Source: METHOD section 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dove_fast.generation.blocks import Positions, advance, last_keys_and_values, prefill
from dove_fast.generation.cache import CachePool, GeneratorCache, row_bytes
from dove_fast.generation.decoder import decode, derived_zero_row
from dove_fast.generation.schedule import CostModel, LengthHistogram, next_block
from dove_fast.generation.steps import derived_tables, step_tables
from dove_fast.models.gpt_neox import GPTNeoX
from dove_fast.ops import eos_scan
from dove_fast.ragged import RaggedTokens

__all__ = ["Batch", "Finished", "Generation", "LengthRule", "WorkCounters", "generate", "rounded_up"]

# What the caches of all rows together may take; more rows are generated in several batches.
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}

# Caches are made for a multiple of so many positions, so that queries of other lengths seldom need a new one.
POSITION_MULTIPLE = 32


def rounded_up(positions: int) -> int:
    """Return the least multiple of POSITION_MULTIPLE that holds so many positions."""
    return -(-positions // POSITION_MULTIPLE) * POSITION_MULTIPLE


@dataclass(frozen=True)
class LengthRule:
    """Where rows end: at the first step whose EOS probability is above `threshold`, or after `most` tokens.

    A `threshold` of None ignores EOS: every row gets exactly `most` tokens.
    """

    most: int
    threshold: float | None

    def leaves_to_eos(self, num_tokens: int) -> bool:
        """Whether rows end where EOS says, cut off by nothing but T: such lengths are what a histogram learns from."""
        return self.threshold is not None and self.most == num_tokens


@dataclass
class WorkCounters:
    """What was computed: positions of prefixes and steps, blocks, rows that took a freed place, bytes the host read."""

    positions: int = 0
    blocks: int = 0
    rows_refilled: int = 0
    bytes_to_host: int = 0

    def add(self, other: WorkCounters) -> None:
        """Add another's counts to these."""
        self.positions += other.positions
        self.blocks += other.blocks
        self.rows_refilled += other.rows_refilled
        self.bytes_to_host += other.bytes_to_host


@dataclass(frozen=True)
class Finished:
    """A row that ended: what it was admitted as, its slot, and its number of tokens."""

    key: int
    slot: int
    length: int


@dataclass
class _Row:
    key: int
    slot: int
    prefix: int
    step: int = 0


class Generation:
    """What a model keeps for its engine between calls, and what users can set.

    `histogram`: the lengths to expect, learned while running where `learning`; replace it by
    `LengthHistogram(T, lengths)` where they are known. `cost`: what a block costs; None takes the device type's
    default, `DOVE.measure_cost()` fits one. Copies and pickles keep these three.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._histogram = LengthHistogram(num_tokens)
        self.learning = True
        self.cost: CostModel | None = None
        self._tables = derived_tables()
        self._last_projection = last_keys_and_values()
        self._zero_row = derived_zero_row()
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
        self._pool.clear()

    def cost_on(self, device: torch.device) -> CostModel:
        """Return the cost model in use on a device."""
        return self.cost or CostModel.default(device.type)

    def decode(self, token_decoder: GPTNeoX, tokens: RaggedTokens, *, attends_padding: bool) -> Tensor:
        """Return the token decoder's states (B, T, d) for images of 1 to T tokens each, without gradients."""
        return decode(token_decoder, tokens, self.num_tokens, self._zero_row, attends_padding=attends_padding)

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
        with self._pool.lease(
            generator.config, slots, positions, rule.most, device=device, dtype=dtype, state_dtype=weight.dtype
        ) as cache:
            yield Batch(self, generator, eos_head, cache, slots, rule)

    def most_rows(self, generator: GPTNeoX, longest_prefix: int, steps: int) -> int:
        """Return how many rows fit into `CACHE_BYTES`, at least one."""
        weight = generator.final_layer_norm.weight
        budget = CACHE_BYTES.get(weight.device.type, CACHE_BYTES["cpu"])
        return max(1, budget // row_bytes(generator.config, longest_prefix + steps, steps, weight.element_size()))


class Batch:
    """Rows in their places of a cache, each at its own step. Made by `Generation.batch`; belongs to one call."""

    def __init__(
        self,
        generation: Generation,
        generator: GPTNeoX,
        eos_head: nn.Linear,
        cache: GeneratorCache,
        slots: int,
        rule: LengthRule,
    ) -> None:
        self.counters = WorkCounters()
        self.rule = rule
        self._generation = generation
        self._generator = generator
        self._eos_head = eos_head
        self.cache = cache
        self._free = deque(range(slots))
        self._used = 0
        self._rows: list[_Row] = []

    @property
    def alive(self) -> int:
        """Rows that have not ended."""
        return len(self._rows)

    @property
    def free(self) -> int:
        """Places that no row is in."""
        return len(self._free)

    @property
    def step(self) -> int:
        """The step of the row that is furthest behind; 0 for no rows."""
        return min((row.step for row in self._rows), default=0)

    def admit(self, keys: Sequence[int], embeddings: Tensor, prefix_lengths: Sequence[int]) -> None:
        """Take in new rows: their prefixes (P, d), one behind the other, go through the generator now."""
        slots = self.place(keys, prefix_lengths)
        self.counters.positions += embeddings.shape[0]
        positions = Positions.of(slots, prefix_lengths, embeddings.device)
        prefill(self._generator, embeddings, positions, self.cache, self._generation._last_projection)

    def place(self, keys: Sequence[int], prefix_lengths: Sequence[int], step: int = 0) -> list[int]:
        """Give places to rows that are at `step`, whose caches the caller fills, and return the places."""
        new = [_Row(key, self._free.popleft(), length, step) for key, length in zip(keys, prefix_lengths, strict=True)]
        slots = [row.slot for row in new]
        # Places are given out in order, so those from `_used` on are fresh.
        self.counters.rows_refilled += sum(slot < self._used for slot in slots)
        self._used = max(self._used, *(slot + 1 for slot in slots))
        self._rows += new
        return slots

    def run(self, block_size: int) -> list[Finished]:
        """Advance every row by up to `block_size` steps, and return those that ended, whose places are free again.

        Their states stay where they are until a new row is admitted.
        """
        rows = self._rows
        counts = [min(block_size, self.rule.most - row.step) for row in rows]
        positions = Positions.of(
            [row.slot for row in rows],
            counts,
            self.cache.cos.device,
            prefixes=[row.prefix for row in rows],
            steps=[row.step for row in rows],
        )
        tables = step_tables(self._generation._tables, self._generator, self._generation.num_tokens)
        states = advance(self._generator, tables, positions, self.cache).to(self.cache.states.dtype)
        self.cache.states[positions.entry_slots, positions.entry_steps] = states
        self.counters.blocks += 1
        self.counters.positions += sum(counts)
        lengths = self._lengths(states, positions, rows, counts)
        finished = []
        for row, count, length in zip(rows, counts, lengths, strict=True):
            row.step += count
            if length:
                finished.append(Finished(row.key, row.slot, length))
                self._free.append(row.slot)
        ended = {row.slot for row in finished}
        self._rows = [row for row in rows if row.slot not in ended]
        return finished

    def _lengths(
        self, states: Tensor, positions: Positions, rows: Sequence[_Row], counts: Sequence[int]
    ) -> Sequence[int]:
        """Return every row's number of tokens where it has ended, else 0: the one host read of a block."""
        most, threshold = self.rule.most, self.rule.threshold
        if threshold is None:
            return [most if row.step + count == most else 0 for row, count in zip(rows, counts, strict=True)]
        _, lengths = eos_scan(
            states,
            positions.cu_seqlens,
            self._eos_head.weight,
            self._eos_head.bias,
            threshold=threshold,
            steps=positions.steps,
            max_length=most,
        )
        self.counters.bytes_to_host += lengths.nbytes
        host: list[int] = lengths.tolist()
        return host

    def states(self, slots: int) -> Tensor:
        """Return the states (slots, steps, d) of the first places; what is behind a row's end is not initialised."""
        return self.cache.states[:slots]

    def tokens_of(self, row: Finished) -> Tensor:
        """Return a copy of the tokens (m, d) of a row that ended."""
        return self.cache.states[row.slot, : row.length].clone()


def generate(
    generation: Generation,
    generator: GPTNeoX,
    eos_head: nn.Linear,
    prefixes: Sequence[Tensor],
    rule: LengthRule,
    block_size: int | None,
) -> tuple[RaggedTokens, WorkCounters]:
    """Generate the tokens of B rows, in as many batches as the memory asks for.

    prefixes: B tensors (N + L_b, d), what each row's steps follow. block_size: steps a block, None for the schedule's.
    """
    lengths_of = [prefix.shape[0] for prefix in prefixes]
    longest = max(lengths_of)
    most_rows = generation.most_rows(generator, longest, rule.most)
    counters = WorkCounters()
    parts = []
    for first in range(0, len(prefixes), most_rows):
        rows = range(first, min(first + most_rows, len(prefixes)))
        with generation.batch(generator, eos_head, len(rows), longest, rule) as batch:
            lengths = _run(generation, batch, prefixes[first : rows.stop], lengths_of[first : rows.stop], block_size)
            parts.append(RaggedTokens.from_padded(batch.states(len(rows)), lengths))
            counters.add(batch.counters)
    tokens = parts[0] if len(parts) == 1 else RaggedTokens.cat(parts)
    return tokens, counters


def _run(
    generation: Generation,
    batch: Batch,
    prefixes: Sequence[Tensor],
    prefix_lengths: Sequence[int],
    block_size: int | None,
) -> list[int]:
    batch.admit(range(len(prefixes)), torch.cat(list(prefixes)), prefix_lengths)
    lengths = [0] * len(prefixes)
    survival = generation.histogram.survival(batch.rule.most)
    cost = generation.cost_on(prefixes[0].device)
    while batch.alive:
        if block_size is not None:
            size = block_size
        elif batch.rule.threshold is None:
            size = batch.rule.most
        else:
            size = next_block(survival, cost, batch.alive, max(prefix_lengths), batch.step)
        for row in batch.run(size):
            lengths[row.key] = row.length
    return lengths
