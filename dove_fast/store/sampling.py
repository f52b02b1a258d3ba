"""Orders to read a store in: shuffled, and in batches of similar lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

__all__ = ["batches_by_length", "windows"]

# Fewer batches than these are not made alone: lengths would not be similar, and each last batch is not full.
POOL_BATCHES = 8


def windows(firsts: Sequence[int], size: int, *, window: int, seed: int | None) -> Iterator[np.ndarray]:
    """Yield every index of a store once, those of `window` shards at a time: these are open together, no others.

    `firsts`: where each shard begins, of `size` records. Shards come in a random order; the records of each window of
    them in another. Without a seed both come in the store's.
    """
    random = None if seed is None else np.random.default_rng(seed)
    ends = [*firsts[1:], size]
    order = np.arange(len(firsts)) if random is None else random.permutation(len(firsts))
    for start in range(0, len(order), window):
        some = order[start : start + window]
        indices = np.concatenate([np.arange(firsts[shard], ends[shard]) for shard in some])
        yield indices if random is None else random.permutation(indices)


def batches_by_length(
    lengths: np.ndarray,
    parts: Iterable[np.ndarray],
    *,
    max_tokens: int | None,
    batch_size: int | None,
    seed: int | None,
) -> Iterator[list[int]]:
    """Yield batches of the indices in `parts` whose lengths are similar; every index comes once.

    A batch has at most `max_tokens` tokens in all and at most `batch_size` images, all from one part, or from several
    where each has few. With a seed the batches of a part come in a random order; without, the shortest first.
    """
    random = None if seed is None else np.random.default_rng(seed)
    mean = float(lengths.mean()) if len(lengths) else 1.0
    each = min(
        batch_size if batch_size is not None else len(lengths),
        int(max_tokens / mean) + 1 if max_tokens is not None else len(lengths),
    )
    for some in _joined(parts, each * POOL_BATCHES):
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


def _joined(parts: Iterable[np.ndarray], least: int) -> Iterator[np.ndarray]:
    """Yield parts, neighbours joined until they have `least` indices; nothing for no indices at all."""
    waiting: list[np.ndarray] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        if count >= max(least, 1):
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if count:
        yield np.concatenate(waiting)
