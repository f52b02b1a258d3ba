"""A token store's images for torch's `DataLoader`: batches of similar lengths, that a run can come back to.

store = TokenStore("photos.tokens")
batches = LengthBatches(store, max_tokens=8192, seed=0)
loader = DataLoader(store, batch_sampler=batches, collate_fn=collate, num_workers=4)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dove_fast.ragged import RaggedTokens
from dove_fast.store import TokenRecord, TokenStore
from dove_fast.store.layout import settings_differences, settings_id

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
    rank and world: this process takes every world-th batch. All get the same number: the epoch's last world - 1
    batches or fewer, which do not go round, are left out of it.
    The batches follow from the store, max_tokens, batch_size, seed, world and the epoch, and from nothing else: not
    from the number of workers, and not from what ran before. All but the epoch is in `order`.

    An iteration is the present epoch (at first 0) from this process's batch `first` (0) on, as often as it is repeated:
    `resume` alone changes the two, so call it for each epoch. There is no len, as epochs differ: `count(epoch)`.
    A run that was stopped goes on with the epoch it was in and the number of batches that it had taken of it; it keeps
    `order` with these, so that one with other batches is refused.
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

    @property
    def order(self) -> dict[str, Any]:
        """What the batches of an epoch follow from, for JSON: keep it with a checkpoint, for `resume`."""
        manifest = self.store.manifest
        return {
            "store": settings_id(manifest["settings"]),
            "images": len(self.store),
            "tokens": manifest["totals"]["tokens"],
            "max_tokens": self.max_tokens,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "world": self.world,
        }

    def resume(self, epoch: int, first: int = 0, *, order: Mapping[str, Any] | None = None) -> None:
        """Let iterations be of `epoch`, from this process's batch `first` on, until the next call; both count from 0.

        order: the `order` of the run that counted these batches; None checks nothing.
        Raises `ValueError` for a negative number, and for another order, naming what differs.
        """
        if epoch < 0 or first < 0:
            raise ValueError(f"epoch and first must be at least 0, got {epoch} and {first}")
        differences = [] if order is None else settings_differences(order, self.order)
        if differences:
            raise ValueError(f"batches of another order cannot be gone on with: {'; '.join(differences)}")
        self.epoch, self.first = epoch, first

    def count(self, epoch: int) -> int:
        """Return how many batches this process takes in the whole of an epoch; reads lengths and no tokens.

        Raises `ValueError` as an iteration does.
        """
        return sum(1 for _ in self._batches(epoch)) // self.world

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over lists of indices. No image comes twice, and every one comes where world is 1 and first is 0."""
        return islice(self._mine(self._batches(self.epoch)), self.first, None)

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        """Return the batches of all processes."""
        seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0])
        return self.store.length_batches(max_tokens=self.max_tokens, batch_size=self.batch_size, seed=seed)

    def _mine(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        while len(together := list(islice(batches, self.world))) == self.world:
            yield together[self.rank]
