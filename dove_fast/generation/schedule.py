"""How many steps a block has: chosen from what lengths to expect and what a block costs.

A long block computes steps that rows already past their EOS throw away; short blocks pay a forward's fixed cost again
and again. `LengthHistogram` says how many rows will still be alive at each step, `CostModel` what a block takes, and
`plan` finds the blocks of least expected time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CostModel", "LengthHistogram", "Survival", "launch_ahead", "next_block", "plan", "stream_block"]

# (T + 1,): the probability that a row has more than i tokens.
Survival = np.ndarray[Any, np.dtype[np.float64]]

# Blocks end on multiples of T / GRID steps: finer ones change the expected time by less than one per cent.
GRID = 32
# An expected number of rows below this is none.
NO_ROWS = 1e-9


@dataclass(frozen=True)
class CostModel:
    """What one block costs: `block` + `position` a new position + `pair` a query and key that meet, in one unit.

    `read`: what the device waits where the host reads a block's lengths before it launches the next.
    A position passes all layers. Only the ratios matter, so any unit does: seconds, or positions.
    `DOVE.measure_cost()` fits one to the device; the defaults are rounded from such fits.
    """

    block: float
    position: float
    pair: float
    read: float = 0.0

    @classmethod
    def default(cls, device_type: str) -> CostModel:
        """Return the ratios for the base model on a device type, in positions.

        On two CPU cores a block by itself takes as long as the arithmetic of 35 positions: it reads all weights.
        On a GPU it is a hundred launches, in which it could compute thousands of positions, and a read takes as long as
        hundreds (estimates: not measured).
        """
        if device_type == "cuda":
            return cls(block=4000.0, position=1.0, pair=1e-4, read=500.0)
        return cls(block=35.0, position=1.0, pair=3e-4)

    def __post_init__(self) -> None:
        """Refuse negative costs, and positions that cost nothing."""
        if not (self.block >= 0 and self.position > 0 and self.pair >= 0 and self.read >= 0):
            raise ValueError(
                f"a cost model needs block, pair and read of at least 0 and position above 0, got {self.block}, "
                f"{self.pair}, {self.read} and {self.position}"
            )

    def time(self, rows: float, start: float, steps: float) -> float:
        """Return the cost of `steps` new positions for each of `rows` rows that have `start` positions already."""
        pairs = rows * steps * (start + (steps + 1) / 2)
        return self.block + self.position * rows * steps + self.pair * pairs


class LengthHistogram:
    """How often each length from 1 to T was seen. Safe to use from several threads.

    Old lengths fade: once `memory` rows were seen, every new one takes a share of the old ones' weight. One row that
    has every length in equal parts is always among them: a length not seen yet is unlikely, not impossible.
    """

    def __init__(self, num_tokens: int, lengths: Iterable[int] = (), *, memory: int = 10000) -> None:
        if num_tokens < 1 or memory < 1:
            raise ValueError(f"num_tokens and memory must be at least 1, got {num_tokens} and {memory}")
        self.num_tokens = num_tokens
        self.memory = memory
        self._lock = threading.Lock()
        self._counts = np.zeros(num_tokens + 1)
        self.update(lengths)

    def update(self, lengths: Iterable[int]) -> None:
        """Add the lengths of some rows. Raises `ValueError` for one outside 1 to T."""
        new = np.asarray(list(lengths), dtype=np.int64)
        if new.size == 0:
            return
        if new.min() < 1 or new.max() > self.num_tokens:
            raise ValueError(f"lengths must be from 1 to {self.num_tokens}, got {new.min()} to {new.max()}")
        counts = np.bincount(new, minlength=self.num_tokens + 1)
        with self._lock:
            total = self._counts.sum()
            fade = min(1.0, max(self.memory - new.size, 0) / total) if total else 1.0
            # Replaced, never written to: readers need no lock.
            self._counts = self._counts * fade + counts

    @property
    def weight(self) -> float:
        """How many rows were seen, faded."""
        return float(self._counts.sum())

    @property
    def mean(self) -> float:
        """The mean length, that one row included."""
        return float(self.survival()[:-1].sum())

    def survival(self, max_length: int | None = None) -> Survival:
        """Return (T + 1,) probabilities that a row has more than i tokens, at i = 0 .. T; 0 from `max_length` on."""
        counts = self._counts + 1.0 / self.num_tokens
        counts[0] = 0.0
        survival = 1.0 - np.cumsum(counts) / counts.sum()
        survival[-1 if max_length is None else max_length :] = 0.0
        # What rounding leaves of a certain end.
        return np.where(survival < NO_ROWS, 0.0, survival)

    def __getstate__(self) -> dict[str, Any]:
        return {"num_tokens": self.num_tokens, "memory": self.memory, "_counts": self._counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def plan(
    survival: Sequence[float] | Survival,
    cost: CostModel,
    rows: int,
    prefix: int,
    step: int = 0,
) -> tuple[int, ...]:
    """Return the block sizes of least expected time for `rows` rows that are alive at `step`.

    survival: (T + 1,), the probability that a row has more than i tokens; prefix: positions before step 0. Rows that
    stop leave the batch at the end of their block. The sizes end where no row can be alive.
    """
    table = np.asarray(survival, dtype=np.float64)
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    return _plan(table.tobytes(), cost, rows, prefix, step)


def next_block(survival: Survival, cost: CostModel, rows: int, prefix: int, step: int) -> int:
    """Return the first block of `plan`, at least one step."""
    return plan(survival, cost, rows, prefix, step)[0]


@functools.lru_cache(maxsize=256)
def _plan(survival: bytes, cost: CostModel, rows: int, prefix: int, step: int) -> tuple[int, ...]:
    table = np.frombuffer(survival)
    last = len(table) - 1
    # The first step that no row reaches.
    end = int(np.argmax(table <= 0)) if (table <= 0).any() else last
    if step >= end:
        return (max(last - step, 1),)
    grid = max(last // GRID, 1)
    marks = sorted({step, end, *range(step - step % grid + grid, end, grid)})
    alive = table[marks] / table[step] if table[step] > 0 else np.ones(len(marks))
    # Of the rows that are alive now: how many still are at each mark, and whether any is.
    some = 1.0 - (1.0 - np.clip(alive, 0.0, 1.0)) ** rows
    expected = np.where(some > NO_ROWS, alive * rows / np.maximum(some, NO_ROWS), 0.0)
    # best[i]: the least expected time from mark i on, and the mark that its first block ends at.
    best = [0.0] * len(marks)
    following = [len(marks) - 1] * len(marks)
    for i in reversed(range(len(marks) - 1)):
        times = [
            some[i] * cost.time(expected[i], prefix + marks[i], marks[j] - marks[i]) + best[j]
            for j in range(i + 1, len(marks))
        ]
        j = int(np.argmin(times))
        best[i], following[i] = times[j], i + 1 + j
    sizes = []
    at = 0
    while at < len(marks) - 1:
        sizes.append(marks[following[at]] - marks[at])
        at = following[at]
    return tuple(sizes)


def launch_ahead(survival: Survival, cost: CostModel, rows: int, prefix: int, start: int, step: int, size: int) -> bool:
    """Whether to launch a block of `size` steps from `step` on before the one from `start` to `step` is read.

    That saves `cost.read`, and computes the rows that end before `step` in vain, and all of it where none is left.
    """
    alive = survival[step] / survival[start] if survival[start] > 0 else 0.0
    vain = cost.time(rows * (1 - alive), prefix + step, size) - cost.block + cost.block * (1 - alive) ** rows
    return cost.read > vain


def stream_block(survival: Survival, cost: CostModel, rows: int, prefix: int) -> int:
    """Return the block size of least time an image where `rows` places are always filled.

    A row that needs m tokens takes ceil(m / c) blocks of c steps; a block's fixed cost is shared by all rows.
    """
    table = np.asarray(survival)
    last = len(table) - 1
    grid = max(last // GRID, 1)
    means = float(table[:-1].sum())
    times = {}
    for size in range(grid, last + 1, grid):
        blocks = float(table[:-1:size].sum())  # the expected number of blocks of a row
        middle = prefix + means / 2
        times[size] = blocks * cost.time(rows, middle, size) / rows
    return min(times, key=times.__getitem__)
