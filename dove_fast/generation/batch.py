"""Rows that are being generated together, each at its own step, in the places of one cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dove_fast.generation.blocks import Positions, advance, by_row, prefill
from dove_fast.generation.cache import GeneratorCache
from dove_fast.generation.graphs import Graphs, bucket
from dove_fast.generation.linear import PackedLinears
from dove_fast.generation.steps import StepTables
from dove_fast.models.derived import Derived
from dove_fast.models.gpt_neox import GPTNeoX
from dove_fast.ops import eos_scan

__all__ = ["Batch", "Block", "Finished", "LengthRule", "Waiting", "WorkCounters"]

# Rows that wait are admitted when this share of the places is free: a prefill of one row does not fill a device.
ADMIT_SHARE = 0.25

# Prefixes of more rows are not recorded: they fill a device, and a recording keeps a copy of its inputs.
RECORDED_PREFIXES = 8


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
class Waiting:
    """A row that has no place yet: what its tokens are to be known by, and what its steps follow, (N + L, d)."""

    key: int
    prefix: Tensor


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
    ended: bool = False


class Block:
    """A block that was launched: how far each of its rows goes, and on the device the lengths of those that ended."""

    def __init__(self, rows: Sequence[_Row], counts: Sequence[int], lengths: Tensor | None) -> None:
        self.rows = rows
        self.counts = counts
        # The step behind each row's last one.
        self.ends = [row.step for row in rows]
        self._lengths = lengths
        self._copied: torch.cuda.Event | None = None
        if lengths is not None and lengths.is_cuda:
            # Into pinned memory, so that the host goes on.
            self._lengths = lengths.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(lengths.device))

    def lengths(self, most: int) -> list[int]:
        """Return every row's number of tokens where it has ended, else 0: the one wait of the host a block.

        `most`: where rows end that EOS does not.
        """
        if self._lengths is None:
            return [most if end == most else 0 for end in self.ends]
        if self._copied is not None:
            self._copied.synchronize()
        host: list[int] = self._lengths.tolist()
        return host


class Batch:
    """Rows in their places of a cache, each at its own step. Made by `Generation.batch`; belongs to one call.

    `tables`: the first layer's rows at the steps. `last_projection`, `linears`: see `blocks.prefill`. `graphs`: what
    records blocks, None to launch every kernel again.
    """

    def __init__(
        self,
        generator: GPTNeoX,
        eos_head: nn.Linear,
        cache: GeneratorCache,
        slots: int,
        rule: LengthRule,
        *,
        tables: StepTables,
        last_projection: Derived,
        linears: PackedLinears,
        graphs: Graphs | None = None,
    ) -> None:
        self.counters = WorkCounters()
        self.rule = rule
        self.cache = cache
        self._generator = generator
        self._eos_head = eos_head
        self._tables = tables
        self._last_projection = last_projection
        self._linears = linears
        self._graphs = graphs
        # Behind these, where blocks are recorded, the cache has places for rows that only fill a bucket.
        self._slots = slots
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
    def places(self) -> int:
        """Rows that there is room for."""
        return self.alive + self.free

    @property
    def has_steps(self) -> bool:
        """Whether a row has steps that no block was launched for."""
        return any(row.step < self.rule.most for row in self._rows)

    @property
    def step(self) -> int:
        """The step of the row that is furthest behind; 0 for no rows."""
        return min((row.step for row in self._rows), default=0)

    @property
    def longest_prefix(self) -> int:
        """Prefix positions that a row may have."""
        return self.cache.keys[0].shape[2] - self.rule.most

    def refill(self, waiting: deque[Waiting]) -> None:
        """Admit from the front of `waiting` into free places, where enough are free and the prefix is not too long."""
        if self.alive and self.free < self.places * ADMIT_SHARE:
            return
        new: list[Waiting] = []
        while waiting and len(new) < self.free and waiting[0].prefix.shape[0] <= self.longest_prefix:
            new.append(waiting.popleft())
        if new:
            self.admit([row.key for row in new], [row.prefix for row in new])

    def admit(self, keys: Sequence[int], prefixes: Sequence[Tensor]) -> None:
        """Take in new rows: their prefixes, each (N + L, d), go through the generator now, one behind the other."""
        prefix_lengths = [prefix.shape[0] for prefix in prefixes]
        embeddings = torch.cat(list(prefixes))
        slots = self.place(keys, prefix_lengths)
        rows, total, longest = len(slots), sum(prefix_lengths), max(prefix_lengths)
        self.counters.positions += total

        def fill(embeddings: Tensor, table: Tensor) -> Tensor:
            positions = Positions.from_rows(table, rows, total, longest)
            prefill(self._generator, embeddings, positions, self.cache, self._last_projection, self._linears)
            return embeddings

        table = self._upload(by_row(slots, prefix_lengths))
        if self._graphs is None or rows > RECORDED_PREFIXES or len(set(prefix_lengths)) > 1:
            fill(embeddings, table)
        else:
            self._graphs(("prefix", rows, longest), fill, embeddings, table)

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
        return self.collect(self.launch(block_size))

    def launch(self, block_size: int) -> Block:
        """Start a block of up to `block_size` steps of every row that has steps left, and do not wait for it.

        A second block may be launched before the first is collected: rows that end in the first are computed in vain.
        """
        rows = [row for row in self._rows if row.step < self.rule.most]
        counts = [min(block_size, self.rule.most - row.step) for row in rows]
        slots, prefixes, steps = [row.slot for row in rows], [row.prefix for row in rows], [row.step for row in rows]
        for row, count in zip(rows, counts, strict=True):
            row.step += count
        self.counters.blocks += 1
        self.counters.positions += sum(counts)
        if self._graphs is None or len(set(counts)) > 1:
            table = by_row(slots, counts, prefixes=prefixes, steps=steps)
            lengths = self._compute(self._upload(table), len(rows), sum(counts), max(counts))
        else:
            # As many rows as the next bucket has; the others have no prefix and start at step 0 in places of their own.
            size, steps_each = bucket(len(rows)), counts[0]
            more = size - len(rows)
            spare = list(range(self._slots, self._slots + more))
            table = by_row(
                slots + spare,
                [steps_each] * size,
                prefixes=prefixes + [0] * more,
                steps=steps + [0] * more,
            )
            self.counters.positions += more * steps_each
            lengths = self._graphs(
                ("block", size, steps_each, self.rule),
                lambda given: self._compute(given, size, size * steps_each, steps_each),
                self._upload(table),
            ).clone()
        if self.rule.threshold is None:
            return Block(rows, counts, None)
        lengths = lengths[: len(rows)]
        self.counters.bytes_to_host += lengths.nbytes
        return Block(rows, counts, lengths)

    def collect(self, block: Block) -> list[Finished]:
        """Wait for a block, and return its rows that ended, whose places are free from now on."""
        finished = []
        for row, length in zip(block.rows, block.lengths(self.rule.most), strict=True):
            # A block that was launched ahead computed rows that had ended.
            if length and not row.ended:
                row.ended = True
                finished.append(Finished(row.key, row.slot, length))
        self._rows = [row for row in self._rows if not row.ended]
        self._free.extend(row.slot for row in finished)
        return finished

    def _upload(self, table: Tensor) -> Tensor:
        return table.to(self.cache.cos.device, non_blocking=True)

    def _compute(self, table: Tensor, rows: int, total: int, max_seqlen: int) -> Tensor:
        """Run a block of `by_row`'s rows, keep its states, and return the lengths (rows,) of those that ended, else 0.

        Without a threshold, what is returned means nothing.
        """
        positions = Positions.from_rows(table, rows, total, max_seqlen)
        states = advance(self._generator, self._tables, positions, self.cache, self._linears).to(
            self.cache.states.dtype
        )
        self.cache.states[positions.entry_slots, positions.entry_steps] = states
        if self.rule.threshold is None:
            return positions.steps
        _, lengths = eos_scan(
            states,
            positions.cu_seqlens,
            self._eos_head.weight,
            self._eos_head.bias,
            threshold=self.rule.threshold,
            steps=positions.steps,
            max_length=self.rule.most,
        )
        return lengths

    def states(self, slots: int) -> Tensor:
        """Return the states (slots, steps, d) of the first places; what is behind a row's end is not initialised."""
        return self.cache.states[:slots]

    def tokens_of(self, row: Finished) -> Tensor:
        """Return a copy of the tokens (m, d) of a row that ended."""
        return self.cache.states[row.slot, : row.length].clone()
