"""Batches of a store for a DataLoader: what comes, in which order, and again after a stop."""

from __future__ import annotations

import json
import shutil

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


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"max_tokens": 20}, {"batch_size": 3, "rank": 1, "world": 2}])
def test_count(store, options):
    batches = LengthBatches(store, **options)
    batches.resume(1, 2)
    counts = [batches.count(number) for number in range(4)]
    assert counts == [len(epoch(store, number, **options)) for number in range(4)]
    assert (batches.epoch, batches.first) == (1, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_and_its_first_stay_until_they_are_changed(store, workers):
    batches = LengthBatches(store, batch_size=6)
    loader = DataLoader(store, batch_sampler=batches, collate_fn=collate, num_workers=workers)
    batches.resume(2, 3)
    rest = [[batch.keys for batch in loader] for _ in range(2)]
    batches.resume(2)
    whole = [batch.keys for batch in loader]
    assert rest == [whole[3:]] * 2


def test_only_the_same_order_is_gone_on_with(store, tmp_path):
    batches = LengthBatches(store, batch_size=3, seed=5, rank=0, world=2)
    order = json.loads(json.dumps(batches.order))
    # Another process of the same run, with the store in another place.
    copy = TokenStore(shutil.copytree(store.directory, tmp_path / "moved"))
    other = LengthBatches(copy, batch_size=3, seed=5, rank=1, world=2)
    other.resume(4, 7, order=order)
    assert (other.epoch, other.first) == (4, 7)
    same = {"batch_size": 3, "seed": 5, "world": 2}
    for change, match in (
        ({"world": 1}, "^batches of another order cannot be gone on with: world: 2, now 1$"),
        ({"batch_size": 4, "seed": 6}, "batch_size: 3, now 4; seed: 5, now 6$"),
        ({"max_tokens": 20}, "max_tokens: None, now 20$"),
    ):
        changed = LengthBatches(store, **{**same, **change})
        with pytest.raises(ValueError, match=match):
            changed.resume(1, order=order)
        assert changed.epoch == 0
    another = TokenStore(write(tmp_path / "another", IMAGES - 1, shard_size=7))
    with pytest.raises(ValueError, match=r"store: '\w+', now '\w+'; images: 60, now 59; tokens: \d+, now \d+$"):
        LengthBatches(another, **same).resume(1, order=order)


def test_refusals(store):
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"got rank {rank} of {world}"):
            LengthBatches(store, batch_size=4, rank=rank, world=world)
    with pytest.raises(ValueError, match="epoch and first must be at least 0, got 1 and -1"):
        LengthBatches(store, batch_size=4).resume(1, -1)
    for use in (list, lambda batches: batches.count(0)):
        with pytest.raises(ValueError, match="max_tokens or batch_size must be given"):
            use(LengthBatches(store))
