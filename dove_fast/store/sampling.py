"""Orders to read a store in: shuffled, and in batches of similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["batches_by_length", "shuffled"]

# Images are put into batches so many at a time: enough for lengths to be similar, few enough for batches to differ.
POOL_BATCHES = 64


def shuffled(firsts: Sequence[int], size: int, *, window: int, seed: int) -> Iterator[int]:
    """Yield every index of a store once, `window` shards at a time: these are open together, no others.

    `firsts`: where each shard begins, of `size` records. Shards come in a random order; the records of each window of
    them in another.
    """
    random = np.random.default_rng(seed)
    ends = [*firsts[1:], size]
    order = random.permutation(len(firsts))
    for start in range(0, len(order), window):
        some = order[start : start + window]
        indices = np.concatenate([np.arange(firsts[shard], ends[shard]) for shard in some])
        yield from random.permutation(indices).tolist()


def batches_by_length(
    lengths: np.ndarray, order: Sequence[int], *, max_tokens: int | None, batch_size: int | None, seed: int | None
) -> Iterator[list[int]]:
    """Yield batches of indices whose lengths are similar, in pools along `order`; every index comes once.

    A batch has at most `max_tokens` tokens in all and at most `batch_size` images. With a seed the batches of a pool
    come in a random order; without, the shortest first.
    """
    random = None if seed is None else np.random.default_rng(seed)
    indices = np.asarray(order, np.int64)
    mean = float(lengths.mean()) if len(lengths) else 1.0
    each = min(
        batch_size if batch_size is not None else len(indices),
        int(max_tokens / mean) + 1 if max_tokens is not None else len(indices),
    )
    pool = max(each, 1) * POOL_BATCHES
    for start in range(0, len(indices), pool):
        some = indices[start : start + pool]
        some = some[np.argsort(lengths[some], kind="stable")]
        batches: list[list[int]] = [[]]
        tokens = 0
        for index, length in zip(some.tolist(), lengths[some].tolist(), strict=True):
            full = (batch_size is not None and len(batches[-1]) == batch_size) or (
                max_tokens is not None and tokens + length > max_tokens
            )
            if full and batches[-1]:
                batches.append([])
                tokens = 0
            batches[-1].append(index)
            tokens += length
        yield from batches if random is None else (batches[number] for number in random.permutation(len(batches)))
