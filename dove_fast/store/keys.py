"""A set of keys in eight bytes each, to find one that comes a second time among hundreds of millions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

__all__ = ["KeySet"]


class KeySet:
    """Keys by 64 bits of their hash: two different ones are taken for the same with a chance of n^2 / 2^65.

    At a hundred million keys that is 3 in 10,000; the memory is 8 bytes a key.
    """

    def __init__(self) -> None:
        # Sorted arrays, each longer than all after it together: a new one is merged until that holds again.
        self._sorted: list[np.ndarray] = []

    def add(self, keys: Sequence[str]) -> str | None:
        """Add keys, and return the first one that was there before or comes twice among them; None if all are new."""
        hashes = np.array([_hash(key) for key in keys], np.uint64)
        repeated = np.zeros(len(hashes), bool)
        for known in self._sorted:
            places = np.searchsorted(known, hashes)
            repeated |= known[np.minimum(places, len(known) - 1)] == hashes
        _, firsts = np.unique(hashes, return_index=True)
        once = np.zeros(len(hashes), bool)
        once[firsts] = True
        repeated |= ~once
        new = hashes[~repeated]
        if len(new):
            self._sorted.append(np.sort(new))
        while len(self._sorted) > 1 and len(self._sorted[-2]) <= 2 * len(self._sorted[-1]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]), kind="stable")
        return keys[int(repeated.argmax())] if repeated.any() else None


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
