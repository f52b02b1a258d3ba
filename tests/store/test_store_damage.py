"""Reading what is incomplete, damaged or something else: each says what is wrong with which file."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch
from made_stores import WIDTH, settings, write

from dove_fast import StoreError, TokenStore
from dove_fast.store.writer import StoreWriter

TOKENS, RECORDS = "tokens/00001.safetensors", "records/00001.parquet"


def edit_manifest(store, edit):
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def refused(store, text, index=None):
    if index is None:
        with pytest.raises(StoreError, match=text):
            TokenStore(store)
    else:
        opened = TokenStore(store)
        with pytest.raises(StoreError, match=text):
            opened[index]


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no token store at {tmp_path / 'nowhere'}")):
        TokenStore(tmp_path / "nowhere")


def test_no_manifest(tmp_path):
    refused(tmp_path, "is not a token store: it has no manifest.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is not a token store")


def test_not_complete(tmp_path):
    StoreWriter(tmp_path / "s", settings(8), {}).begin()
    refused(tmp_path / "s", r"is not complete: .* run the same dove-fast tokenize command again to finish it")


def test_manifests_that_are_damaged(store):
    good = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(good[: len(good) // 2])
    refused(store, r"manifest\.json is not valid JSON")
    (store / "manifest.json").write_text("[]")
    refused(store, "is not the manifest of a token store")
    for edit, text in [
        (lambda m: m.pop("settings"), "settings must be a dict, got None"),
        (lambda m: m["settings"].pop("width"), "settings lack width"),
        (lambda m: m.pop("shards"), "must list its shards and totals"),
        (lambda m: m["shards"][1].pop("records"), "damaged manifest: KeyError"),
        (lambda m: m["shards"].pop(0), "damaged manifest: its shards do not follow each other"),
        (lambda m: m["settings"].update(dtype="int3"), "damaged manifest: KeyError"),
        (lambda m: m.update(format_version="1"), "format_version must be a positive int, got '1'"),
    ]:
        (store / "manifest.json").write_text(good)
        edit_manifest(store, edit)
        refused(store, text)


def test_a_later_format(store):
    edit_manifest(store, lambda manifest: manifest.update(format_version=3))
    refused(store, "has format_version 3, this version of dove_fast reads up to 2; install a later version")


@pytest.mark.parametrize("name", [TOKENS, RECORDS])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "one byte less"])
def test_a_damaged_shard_is_named_and_the_others_still_read(store, name, damage):
    path = store / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: {"empty": 0, "half": len(content) // 2}.get(damage, -1)])
    word = "missing" if damage == "missing" else "damaged"
    refused(store, re.escape(f"{path} is {word}"), index=4)
    opened = TokenStore(store)
    assert [opened[0].key, opened[7].key] == ["k0", "k7"]


def test_a_records_table_that_is_gone_is_named_by_lengths_too(store):
    (store / RECORDS).unlink()
    opened = TokenStore(store)
    with pytest.raises(StoreError, match=re.escape(f"{store / RECORDS} is missing")):
        opened.lengths  # noqa: B018 - read for its error


def test_a_shard_of_another_place_or_store(store, tmp_path):
    (store / TOKENS).write_bytes((store / "tokens/00000.safetensors").read_bytes())
    refused(store, "belongs to another store or to another place in this one", index=4)
    other = write(tmp_path / "other", fingerprint="sha256:1")
    (store / TOKENS).write_bytes((other / TOKENS).read_bytes())
    refused(store, "belongs to another store or to another place in this one", index=4)


def test_records_of_another_shard(store):
    (store / RECORDS).write_bytes((store / "records/00000.parquet").read_bytes())
    refused(store, "do not belong together: other lengths", index=4)


def rewrite(path, **changes):
    """Save a shard again with some tensors changed, under its own metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    safetensors.torch.save_file({**tensors, **changes}, path, metadata=metadata)
    return tensors


def test_a_shard_that_contradicts_the_manifest_or_itself(store):
    path = store / TOKENS
    tensors = rewrite(path)
    assert TokenStore(store)[4].key == "k4"
    rewrite(path, values=tensors["values"][:-1].clone())
    refused(
        store, rf"holds torch.float32 values \(6, {WIDTH}\), the manifest says torch.float32 \(7, {WIDTH}\)", index=4
    )
    rewrite(path, values=tensors["values"].bfloat16())
    refused(store, "holds torch.bfloat16 values", index=4)
    for wrong in ([0, 2, 7], [0, 6, 2, 7], [1, 2, 6, 7], [0, 2, 6, 6]):
        rewrite(path, values=tensors["values"], cu_seqlens=tensors["cu_seqlens"].new_tensor(wrong))
        refused(store, "is damaged: its tensors do not fit 7 tokens", index=4)
