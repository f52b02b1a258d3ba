"""A token store's images for torch's `DataLoader`: batches of similar lengths, that a run can come back to.

store = TokenStore("photos.tokens")
batches = LengthBatches(store, max_tokens=8192, seed=0)
loader = DataLoader(store, batch_sampler=batches, collate_fn=collate, num_workers=4)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dove_fast.ragged import RaggedTokens
from dove_fast.store import TokenRecord, TokenStore

__all__ = ["LengthBatches", "TokenBatch", "collate"]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """What `collate` makes of B records: `tokens`, their `keys`, and what came with each as `extra`, None for nothing.

    A `DataLoader` with `pin_memory=True` pins the tokens.
    """

    tokens: RaggedTokens
    keys: tuple[str, ...]
    extra: tuple[dict[str, Any] | None, ...]

    def pin_memory(self) -> TokenBatch:
        """Return the batch with its tokens in page-locked memory. Needs a GPU."""
        return TokenBatch(self.tokens.pin_memory(), self.keys, self.extra)


def collate(records: Sequence[TokenRecord]) -> TokenBatch:
    """Join a store's records, at least one, into a `TokenBatch`: a `DataLoader`'s `collate_fn`. Nothing is padded."""
    return TokenBatch(
        RaggedTokens.from_rows([record.tokens for record in records]),
        tuple(record.key for record in records),
        tuple(record.extra for record in records),
    )


class LengthBatches:
    """Batches of a store's indices, of similar lengths, in an order of each epoch's own: a `batch_sampler`.

    max_tokens, batch_size: what a batch has at most, one of the two or both, as in `TokenStore.length_batches`.
    seed and the epoch decide the order and nothing else does: not the number of workers, and not what ran before.
    rank and world: this process takes every world-th batch. All get the same number: the epoch's last world - 1
    batches or fewer, which do not go round, are left out of it.

    An iteration is the present epoch from batch `first` on. A run that was stopped goes on by
    `resume(epoch, first)`, with the number of batches that it had taken of that epoch.
    Raises `ValueError` for a rank that is not below world, and when it is iterated as `length_batches` does.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must be at least 0 and below world, got rank {rank} of {world}")
        self.store, self.seed, self.rank, self.world = store, seed, rank, world
        self.max_tokens, self.batch_size = max_tokens, batch_size
        self.epoch, self.first = 0, 0

    def resume(self, epoch: int, first: int = 0) -> None:
        """Let the next iteration be of `epoch`, from this process's batch `first` on; both count from 0.

        Raises `ValueError` for a negative one.
        """
        if epoch < 0 or first < 0:
            raise ValueError(f"epoch and first must be at least 0, got {epoch} and {first}")
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over lists of indices; every image of the store comes once."""
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0])
        batches = self.store.length_batches(max_tokens=self.max_tokens, batch_size=self.batch_size, seed=seed)
        return islice(self._mine(batches), self.first, None)

    def _mine(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        while len(together := list(islice(batches, self.world))) == self.world:
            yield together[self.rank]
