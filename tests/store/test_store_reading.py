"""What was written is what is read: bit for bit, in order, memory-mapped, in threads and in workers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from made_stores import WIDTH, image, ragged, settings, write
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from dove_fast import DOVEConfig, TokenStore
from dove_fast.store.records import RecordRow
from dove_fast.store.writer import StoreWriter


def check(store: TokenStore, indices: list[int], dtype: str = "float32", width: int = WIDTH) -> None:
    assert len(store) == len(indices)
    for record, index in zip(store, indices, strict=True):
        values, row = image(index, dtype, width)
        assert record.tokens.dtype == values.dtype
        assert torch.equal(record.tokens, values)
        for name in ("key", "source", "length", "width", "height", "eos_probability"):
            assert getattr(record, name) == getattr(row, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [WIDTH, 6, 7])
@pytest.mark.parametrize("inputs", [1, 3, 8])
def test_round_trip_is_exact(tmp_path, dtype, width, inputs):
    check(TokenStore(write(tmp_path / "s", inputs, dtype=dtype, width=width)), list(range(inputs)), dtype, width)


def test_inputs_that_were_set_aside_leave_no_gap(tmp_path):
    # The second shard holds nothing, the others something.
    store = TokenStore(write(tmp_path / "s", bad=frozenset({1, 3, 4, 5, 7})))
    check(store, [0, 2, 6])
    assert store.keys == ["k0", "k2", "k6"]
    lines = [json.loads(line) for line in (tmp_path / "s/errors.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["k1", "k3", "k4", "k5", "k7"]
    assert lines[0] == {"key": "k1", "source": "in/k1", "reason": "broken"}


def test_a_store_of_nothing_but_errors_is_empty(tmp_path):
    store = TokenStore(write(tmp_path / "s", 4, bad=frozenset(range(4))))
    assert (len(store), list(store), store.keys, store.lengths.tolist()) == (0, [], [], [])
    assert store.ragged([]).values.shape == (0, WIDTH)
    with pytest.raises(IndexError):
        store[0]


def test_the_shards_are_plain_safetensors_and_parquet(store):
    tensors = load_file(store / "tokens/00001.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "values": (torch.float32, (7, WIDTH)),
        "cu_seqlens": (torch.int32, (4,)),
        "key_offsets": (torch.int64, (4,)),
        "keys": (torch.uint8, (6,)),
    }
    assert tensors["cu_seqlens"].tolist() == [0, 2, 6, 7]
    assert bytes(tensors["keys"].tolist()) == b"k3k4k5"
    table = pyarrow.parquet.read_table(store / "records").to_pydict()
    assert table["key"] == [f"k{index}" for index in range(8)]
    assert table["shard"] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert table["row"] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert not (store / "errors.jsonl").exists()


def test_the_manifest_says_how_the_store_was_made(store):
    manifest = TokenStore(store).manifest
    assert manifest["format_version"] == 2
    assert manifest["complete"] is True
    assert manifest["environments"] == [{"torch": "test"}]
    tokens = sum(image(index, "float32", 1)[1].length for index in range(8))
    assert manifest["totals"] == {"records": 8, "tokens": tokens, "errors": 0}
    assert [shard["first"] for shard in manifest["shards"]] == [0, 3, 6]
    assert TokenStore(store).config == DOVEConfig.tiny()


def test_keys_of_any_script_and_length(tmp_path):
    keys = ["ünïcode/名前 1.jpg", "a\\x", "x" * 5000, "[bold]"]
    writer = StoreWriter(tmp_path / "s", settings(4, shard_size=4), {})
    writer.begin()
    with writer.shard(0) as shard:
        shard.append(ragged([torch.ones(1, WIDTH)] * 4), [RecordRow(key, key, 1, 1, 1, 0.5) for key in keys])
    writer.finish()
    assert [record.key for record in TokenStore(tmp_path / "s")] == keys
    tensors = load_file(tmp_path / "s/tokens/00000.safetensors")
    raw, offsets = bytes(tensors["keys"].tolist()), tensors["key_offsets"].tolist()
    assert [raw[a:b].decode() for a, b in pairwise(offsets)] == keys


def test_indexing(store):
    opened = TokenStore(store)
    assert opened[-1].key == "k7"
    assert opened[np.int64(3)].key == "k3"
    assert opened[torch.tensor(4)].key == "k4"
    for index in (8, -9):
        with pytest.raises(IndexError, match=f"index {index} is out of range for a store of 8 images"):
            opened[index]
    with pytest.raises(TypeError, match=r"an index must be an integer, got slice; use ragged\(indices\)"):
        opened[1:3]


def test_ragged_takes_any_indices_in_any_order(store):
    opened = TokenStore(store)
    indices = [5, 0, -1, 5, 3]
    tokens = opened.ragged(indices)
    assert len(tokens) == 5
    for row, index in enumerate(indices):
        assert torch.equal(tokens[row], opened[index].tokens)
    assert opened.ragged(range(8)).host_lengths == tuple(opened.lengths.tolist())
    with pytest.raises(IndexError):
        opened.ragged([0, 8])


def test_what_is_returned_may_be_written_into(store):
    opened = TokenStore(store)
    before = opened[0].tokens.clone()
    opened[0].tokens.zero_()
    opened.ragged([0]).values.zero_()
    assert torch.equal(opened[0].tokens, before)
    assert torch.equal(TokenStore(store)[0].tokens, before)


def test_lengths_are_the_records(store):
    lengths = TokenStore(store).lengths
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [image(index, "float32", 1)[1].length for index in range(8)]


def test_values_are_mapped_and_not_read(store):
    opened = TokenStore(store)
    view = opened._shard(0).tokens(0)
    mapped = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "00000.safetensors" in line
    ]
    assert any(int(low, 16) <= view.data_ptr() < int(high, 16) for low, high in mapped)


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("dove_fast.store.reader.MAX_OPEN_SHARDS", 2)
    opened = TokenStore(write(tmp_path / "s", 20, shard_size=2))
    check(opened, list(range(20)))
    assert list(opened._open) == [8, 9]
    opened[16], opened[0]
    assert list(opened._open) == [8, 0]


def test_opening_reads_the_manifest_alone(store):
    for path in [*(store / "tokens").iterdir(), *(store / "records").iterdir()]:
        path.unlink()
    assert len(TokenStore(store)) == 8


def test_pickling_drops_what_is_open(store):
    opened = TokenStore(store)
    check(opened, list(range(8)))
    assert opened.lengths is opened.lengths
    copy = pickle.loads(pickle.dumps(opened))
    assert not copy._open
    check(copy, list(range(8)))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_it_is_a_dataset_for_workers(store, context):
    opened = TokenStore(store)
    first = opened[0].tokens
    loader = DataLoader(opened, batch_size=3, num_workers=2, collate_fn=list, multiprocessing_context=context)
    records = [record for batch in loader for record in batch]
    assert [record.key for record in records] == [f"k{index}" for index in range(8)]
    assert torch.equal(records[0].tokens, first)
    assert torch.equal(records[7].tokens, opened[7].tokens)


def test_threads_share_one_instance(store, monkeypatch):
    monkeypatch.setattr("dove_fast.store.reader.MAX_OPEN_SHARDS", 1)
    opened = TokenStore(store)
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda index: opened[index % 8].key, range(400)))
    assert keys == [f"k{index % 8}" for index in range(400)]


def test_importing_the_package_stays_light():
    code = "import sys, dove_fast; print([name for name in ('pyarrow', 'PIL', 'rich') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
