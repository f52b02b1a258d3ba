"""Shuffled reading and batches of similar lengths: every image once, few shards open, within the bounds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stores import write

from dove_fast import StoreError, TokenStore
from dove_fast.store import reader
from dove_fast.store.sampling import batches_by_length, windows

MANY = 10_000


def shuffled(firsts, size, window, seed) -> list[int]:
    return [index for part in windows(firsts, size, window=window, seed=seed) for index in part.tolist()]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 99))
def test_every_index_once_and_a_window_of_shards_at_a_time(sizes, window, seed):
    firsts = np.cumsum([0, *sizes[:-1]]).tolist()
    order = shuffled(firsts, sum(sizes), window, seed)
    assert sorted(order) == list(range(sum(sizes)))
    assert order == shuffled(firsts, sum(sizes), window, seed)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    # Once a window is left no shard of it comes again.
    last = {
        shard: max(place for place, index in enumerate(order) if shard_of[index] == shard) for shard in set(shard_of)
    }
    first = {
        shard: min(place for place, index in enumerate(order) if shard_of[index] == shard) for shard in set(shard_of)
    }
    for place in range(len(order)):
        assert sum(first[shard] <= place <= last[shard] for shard in last) <= window


def test_seeds_differ():
    assert shuffled([0, 50], 100, 2, 0) != shuffled([0, 50], 100, 2, 1)


def test_without_a_seed_the_order_is_the_stores():
    assert shuffled([0, 3, 3, 7], 9, 2, None) == list(range(9))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=300),
    st.none() | st.integers(64, 300),
    st.none() | st.integers(1, 20),
    st.none() | st.integers(0, 9),
)
def test_batches_keep_their_bounds(lengths, max_tokens, batch_size, seed):
    if max_tokens is None and batch_size is None:
        batch_size = 7
    lengths = np.array(lengths)
    options = {"max_tokens": max_tokens, "batch_size": batch_size, "seed": seed}
    parts = np.array_split(np.arange(len(lengths)), 3)
    batches = list(batches_by_length(lengths, parts, **options))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)
    for batch in batches:
        assert max_tokens is None or lengths[batch].sum() <= max_tokens
        assert batch_size is None or len(batch) <= batch_size
    assert batches == list(batches_by_length(lengths, parts, **options))


def test_lengths_in_a_batch_are_similar():
    lengths = np.random.default_rng(0).integers(1, 65, 2000)
    batches = list(batches_by_length(lengths, [np.arange(2000)], max_tokens=None, batch_size=10, seed=3))
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 2
    # But the batches do not come in the order of their lengths.
    means = np.array([lengths[batch].mean() for batch in batches[:64]])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def test_a_store_gives_both(store):
    opened = TokenStore(store)
    keys = [record.key for record in opened.shuffled(5)]
    assert sorted(keys) == sorted(opened.keys)
    assert keys != opened.keys
    batches = list(opened.length_batches(max_tokens=9, seed=1))
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert all(opened.ragged(batch).values.shape[0] <= 9 for batch in batches)
    for options, text in (
        ({}, "max_tokens or batch_size must be given"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_tokens": 3}, "max_tokens must be at least 5, the longest image's, got 3"),
    ):
        with pytest.raises(ValueError, match=text):
            opened.length_batches(**options)


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("options", [{"batch_size": 3}, {"max_tokens": 12}])
def test_each_shard_is_opened_once(tmp_path, monkeypatch, options, seed):
    # 100 images in shards of 10 and windows of 4, which are no multiple of a batch.
    store = TokenStore(write(tmp_path / "s", 100, shard_size=10))
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 4)
    opened = []
    monkeypatch.setattr(reader, "safe_open", lambda path, **options: opened.append(path) or _open(path, **options))
    for batch in store.length_batches(**options, seed=seed):
        store.ragged(batch)
    assert len(opened) == 10
    assert len(list(store.shuffled(1))) == 100
    assert len(opened) <= 20


def test_small_shards_do_not_make_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    store = TokenStore(write(tmp_path / "s", 40, shard_size=2))
    assert sorted(len(batch) for batch in store.length_batches(batch_size=20, seed=0)) == [20, 20]


def test_ten_thousand_shards_are_not_read_to_open_a_store(tmp_path, monkeypatch):
    """All but two shards of the manifest are not even there."""
    store = write(tmp_path / "s", inputs=6)
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    one = manifest["shards"][1]
    manifest["shards"] += [
        {
            **one,
            "tokens_file": f"tokens/{number:05d}.safetensors",
            "records_file": f"records/{number:05d}.parquet",
            "first": 3 * number,
        }
        for number in range(2, MANY)
    ]
    path.write_text(json.dumps(manifest))
    opened = []
    monkeypatch.setattr(reader, "safe_open", lambda path, **options: opened.append(path) or _open(path, **options))
    many = TokenStore(store)
    assert len(many) == 3 * MANY
    assert opened == []
    assert many[4].key == "k4"
    assert [path.name for path in opened] == ["00001.safetensors"]
    with pytest.raises(StoreError, match=r"07777\.safetensors is missing"):
        many[3 * 7777]


_open = reader.safe_open
