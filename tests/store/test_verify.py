"""verify finds a flipped bit anywhere and whatever is missing; units that are done again leave what they were."""

from __future__ import annotations

import json

import pytest
from kill_switch import contents
from made_stores import fill, settings, write

from dove_fast import StoreError, TokenStore
from dove_fast.store.claims import Claims
from dove_fast.store.records import InputError, read_errors
from dove_fast.store.verify import Damage, verify
from dove_fast.store.writer import StoreWriter

BAD = frozenset({1, 6})


@pytest.fixture
def store(tmp_path):
    return write(tmp_path / "store", bad=BAD)


def test_a_whole_store(store):
    seen = []
    assert verify(store, on_unit=lambda done, units: seen.append((done, units))) == (3, [])
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["tokens/00001.safetensors", "records/00001.parquet"])
def test_every_flipped_bit_is_found(store, name):
    path = store / name
    good = path.read_bytes()
    for place in range(0, len(good), max(len(good) // 40, 1)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert verify(store) == (3, [Damage(1, name, "its bytes are not those that were written")])
    path.write_bytes(good)
    assert verify(store) == (3, [])


def test_what_is_missing_or_does_not_belong(store, tmp_path):
    (store / "tokens/00000.safetensors").unlink()
    (store / "records/00002.parquet").write_bytes((store / "records/00000.parquet").read_bytes())
    _, found = verify(store)
    assert [(damage.unit, damage.file) for damage in found] == [
        (0, "tokens/00000.safetensors"),
        (2, "records/00002.parquet"),
    ]
    assert found[0].reason == "is missing"


def test_a_changed_list_of_errors_is_found(store):
    (store / "errors.jsonl").write_text("")
    assert verify(store)[1] == [Damage(None, "errors.jsonl", "is not what the units say")]


def test_keys_may_hold_what_some_take_for_the_end_of_a_line(tmp_path):
    errors = [InputError(f"a{character}b", "in", character) for character in "\u2028\u2029\x85\x1c\r\n"]
    writer = StoreWriter(tmp_path / "s", settings(6), {"torch": "test"})
    writer.begin()
    for unit in writer.missing:
        with writer.shard(unit) as shard:
            for error in errors if unit == 0 else []:
                shard.set_aside(error)
    writer.finish()
    writer.close()
    assert read_errors(tmp_path / "s") == errors
    assert verify(tmp_path / "s")[1] == []


def test_stores_that_cannot_be_verified(store, tmp_path):
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    with pytest.raises(StoreError, match="was written in format 1, which has no checksums"):
        verify(store)
    (store / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(StoreError, match="is not complete"):
        verify(store)
    (store / "manifest.json").write_text(json.dumps({**manifest, "shards": manifest["shards"][:2]}))
    with pytest.raises(StoreError, match="2 shards of 3 units"):
        verify(store)
    del manifest["shards"][1]["records_sha256"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"damaged manifest: shard 1 has no records_sha256$"):
        verify(store)
    manifest["shards"][0] = "a string"
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        StoreError, match="damaged manifest: shard 0 has no tokens_sha256, no records_sha256, no records, no tok"
    ):
        verify(store)


def test_units_are_done_again_to_the_same_bytes(store):
    whole = contents(store)
    writer = StoreWriter(store, settings(8), {"torch": "test"})
    writer.begin(again=[0, 2])
    assert writer.missing == [0, 2]
    assert (store / "replaced/records/00002.parquet").read_bytes() == whole["records/00002.parquet"]
    with pytest.raises(StoreError, match="is not complete"):
        TokenStore(store)
    fill(writer, BAD)
    writer.finish()
    assert contents(store) == whole


def test_units_of_a_store_that_is_being_written_are_not_done_again(store):
    held = Claims(store, join=False)
    writer = StoreWriter(store, settings(8), {"torch": "test"})
    for join in (False, True):
        with pytest.raises(StoreError, match="is being written by another job"):
            writer.begin(join=join, again=[0])
    held.close()
    assert verify(store) == (3, [])


def test_what_a_unit_was_is_kept_if_it_had_more(store):
    whole = contents(store)
    writer = StoreWriter(store, settings(8), {"torch": "test"})
    writer.begin(again=[0, 2])
    fill(writer, BAD | {7})
    writer.finish()
    assert writer.kept == [2]
    kept = {name.removeprefix("replaced/"): data for name, data in contents(store).items() if "replaced" in name}
    assert kept == {name: whole[name] for name in ("tokens/00002.safetensors", "records/00002.parquet")}
    # Worse again: the best of all stays.
    worse = StoreWriter(store, settings(8), {"torch": "test"})
    writer.close()
    worse.begin(again=[2])
    fill(worse, BAD | {7})
    worse.finish()
    worse.close()
    assert worse.kept == [2]
    assert (store / "replaced/records/00002.parquet").read_bytes() == whole["records/00002.parquet"]
    # As soon as there is as much, it goes.
    again = StoreWriter(store, settings(8), {"torch": "test"})
    again.begin(again=again.units_with_errors)
    fill(again, BAD)
    again.finish()
    assert (again.kept, contents(store)) == ([], whole)


@pytest.mark.parametrize("place", [("totals", "tokens"), ("totals", "errors"), ("shards", 1, "records")])
def test_counts_of_the_manifest_are_checked(store, place):
    manifest = json.loads((store / "manifest.json").read_text())
    *path, last = place
    inner = manifest
    for name in path:
        inner = inner[name]
    inner[last] += 1
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert verify(store)[1] == [Damage(None, "manifest.json", "is not what the units say")]
