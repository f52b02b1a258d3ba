"""Lengths that are drawn and forced upon the engine, so that both sides know which tokens are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dove_fast.generation.batch import Block

# Lengths that stand for a distribution.
MANY = 10000


def spread(distribution: str, mean: int, most: int, count: int) -> list[int]:
    """Return `count` lengths that are spread as the distribution is: its quantiles, in an order that was drawn."""
    many = np.sort(draw(distribution, mean, most))
    chosen = many[[int((i + 0.5) / count * len(many)) for i in range(count)]]
    return [int(length) for length in np.random.default_rng(count).permutation(chosen)]


def draw(distribution: str, mean: int, most: int) -> list[int]:
    """Return MANY lengths from 1 to `most`.

    gamma: shape 4, a spread of half the mean, cut at `most`; uniform: from 1 to twice the mean; two: a tenth of the
    mean or `most`; same: the mean. A mean of `most` is `most` for all.
    """
    random = np.random.default_rng(99)
    if mean == most or distribution == "same":
        return [mean] * MANY
    if distribution == "gamma":
        lengths = random.gamma(4.0, mean / 4.0, MANY)
    elif distribution == "uniform":
        lengths = random.uniform(1, 2 * mean, MANY)
    else:
        short = mean / 10
        lengths = np.where(random.random(MANY) < (mean - short) / (most - short), most, short)
    return [int(length) for length in np.clip(np.round(lengths), 1, most)]


@contextmanager
def forced(lengths: list[int]) -> Iterator[None]:
    """Give row `key` lengths[key] tokens; EOS is computed, decided and read as ever, and what that costs stays."""
    decide = Block.lengths

    def decide_and_replace(self: Block, most: int) -> list[int]:
        decide(self, most)
        return [
            lengths[row.key] if end >= lengths[row.key] else 0 for row, end in zip(self.rows, self.ends, strict=True)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "lengths", decide_and_replace)
        yield
