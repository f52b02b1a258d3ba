"""Batches of a store for a DataLoader: what comes, in which order, and again after a stop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_stores import write
from torch.utils.data import DataLoader

from dove_fast import TokenStore
from dove_fast.integrations.loading import LengthBatches, collate

IMAGES = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(write(tmp_path_factory.mktemp("stores") / "s", IMAGES, shard_size=7))


def epoch(store, number, first=0, **options):
    batches = LengthBatches(store, **options)
    batches.resume(number, first)
    return list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_every_image_once(store, workers):
    batches = LengthBatches(store, max_tokens=20, seed=3)
    loader = DataLoader(store, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    found = list(loader)
    keys = store.keys
    assert sorted(key for batch in found for key in batch.keys) == sorted(keys)
    for batch in found:
        expected = store.ragged([keys.index(key) for key in batch.keys])
        assert batch.tokens.host_lengths == expected.host_lengths
        assert torch.equal(batch.tokens.values, expected.values)
        assert batch.tokens.values.shape[0] <= 20 and batch.extra == (None,) * len(batch.keys)
    # The same with any number of workers: the sampler's order alone.
    assert [[keys.index(key) for key in batch.keys] for batch in found] == list(batches)


def test_lengths_are_similar(store):
    def padded(batches):
        return sum(len(batch) * store.lengths[batch].max() for batch in batches)

    order = np.random.default_rng(0).permutation(IMAGES).tolist()
    at_random = [order[start : start + 6] for start in range(0, IMAGES, 6)]
    assert store.lengths.sum() <= padded(epoch(store, 0, batch_size=6)) < 0.85 * padded(at_random)


def test_seed_and_epoch_decide(store):
    assert epoch(store, 4, batch_size=6, seed=1) == epoch(store, 4, batch_size=6, seed=1)
    orders = [epoch(store, number, batch_size=6, seed=seed) for number in range(3) for seed in range(2)]
    assert all(a != b for index, a in enumerate(orders) for b in orders[:index])
    batches = LengthBatches(store, batch_size=6)
    assert list(batches) == list(batches) == epoch(store, 0, batch_size=6), "an iteration does not move it on"


@pytest.mark.parametrize("first", [0, 1, 9, 10, 99])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_epoch_goes_on(store, first, rank):
    options = {"batch_size": 3, "seed": 5, "rank": rank, "world": 2}
    assert epoch(store, 2, first, **options) == epoch(store, 2, **options)[first:]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_an_epoch(store, world):
    shares = [epoch(store, 1, batch_size=4, rank=rank, world=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "all take the same number of steps"
    joined = [batch for together in zip(*shares, strict=True) for batch in together]
    whole = epoch(store, 1, batch_size=4)
    assert joined == whole[: len(joined)] and len(whole) - len(joined) < world


def test_refusals(store):
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"got rank {rank} of {world}"):
            LengthBatches(store, batch_size=4, rank=rank, world=world)
    with pytest.raises(ValueError, match="epoch and first must be at least 0, got 1 and -1"):
        LengthBatches(store, batch_size=4).resume(1, -1)
    with pytest.raises(ValueError, match="max_tokens or batch_size must be given"):
        list(LengthBatches(store))
