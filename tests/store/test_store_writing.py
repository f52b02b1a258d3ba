"""Writing: the same bytes whatever interrupted it, nothing half-written in sight, and no mixing of stores."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from kill_switch import KilledError, KillSwitch, contents
from made_stores import WIDTH, fill, image, ragged, settings, write

from dove_fast import StoreError, TokenStore
from dove_fast.atomic import is_temporary, replacing
from dove_fast.store.records import InputError
from dove_fast.store.writer import StoreWriter

BAD = frozenset({1, 6, 7})


def run(directory: Path) -> None:
    """Do what a job does: begin or go on, and finish."""
    writer = StoreWriter(directory, settings(8), {"torch": "test"})
    if not writer.complete:
        writer.begin()
        fill(writer, BAD)
        writer.finish()


def killed_at(directory: Path, at: int, after: bool) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        KillSwitch(at, after).arm(patch)
        try:
            run(directory)
        except KilledError:
            return True
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "s"
    run(directory)
    return contents(directory)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_step_it_resumes_to_the_same_bytes(tmp_path, undisturbed, after):
    at = 1
    while killed_at(tmp_path / f"s{at}", at, after):
        directory = tmp_path / f"s{at}"
        if directory.exists() and (directory / "manifest.json").exists():
            manifest = json.loads((directory / "manifest.json").read_text())
            if not manifest["complete"]:
                with pytest.raises(StoreError, match="is not complete"):
                    TokenStore(directory)
        run(directory)
        assert contents(directory) == undisturbed, f"killed at step {at}"
        at += 1
    # Every unit syncs and renames two files, and syncs their directories.
    assert at > 3 * 6


def test_killed_over_and_over_it_gets_there(tmp_path, undisturbed):
    directory = tmp_path / "s"
    kills = 0
    # Each run gets far enough for the next to start further on: at most one unit's work more.
    while killed_at(directory, 14, after=kills % 2 == 0):
        kills += 1
        assert kills < 50
    assert kills >= 2
    assert contents(directory) == undisturbed


def test_a_full_disk_leaves_no_temporary_file(tmp_path, undisturbed, monkeypatch):
    real, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path / "s")
    monkeypatch.undo()
    assert not [name for name in contents(tmp_path / "s") if is_temporary(Path(name).name)]
    run(tmp_path / "s")
    assert contents(tmp_path / "s") == undisturbed


def test_finished_units_are_not_written_again(tmp_path):
    directory = tmp_path / "s"
    writer = StoreWriter(directory, settings(8), {})
    writer.begin()
    with writer.shard(1) as shard:
        values, row = image(3, "float32", WIDTH)
        shard.append(ragged([values]), [row])
        shard.set_aside(InputError("k4", "in/k4", "broken"))
    assert writer.missing == [0, 2]
    again = StoreWriter(directory, settings(8), {})
    assert again.missing == [0, 2]
    assert (again.records, again.tokens, [error.key for error in again.errors]) == (1, row.length, ["k4"])


@pytest.mark.parametrize("damage", ["missing", "short", "other store", "other place"])
def test_a_unit_whose_files_do_not_fit_is_done_again(tmp_path, undisturbed, damage):
    directory = tmp_path / "s"
    run(directory)
    tokens, records = directory / "tokens/00001.safetensors", directory / "records/00001.parquet"
    if damage == "missing":
        tokens.unlink()
    elif damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif damage == "other place":
        records.write_bytes((directory / "records/00000.parquet").read_bytes())
    else:
        other = write(tmp_path / "other", fingerprint="sha256:1")
        records.write_bytes((other / "records/00001.parquet").read_bytes())
    writer = StoreWriter(directory, settings(8), {"torch": "test"})
    assert (writer.complete, writer.missing) == (False, [1])
    run(directory)
    assert contents(directory) == undisturbed


def test_a_block_that_raises_leaves_nothing_of_its_unit(tmp_path):
    writer = StoreWriter(tmp_path / "s", settings(8), {})
    writer.begin()
    with pytest.raises(KeyError), writer.shard(0) as shard:  # noqa: PT012 - the block is what is tested
        shard.append(*_batch(0))
        raise KeyError
    assert set(contents(tmp_path / "s")) == {".lock", "manifest.json"}
    assert writer.missing == [0, 1, 2]


def _batch(index: int):
    values, row = image(index, "float32", WIDTH)
    return ragged([values]), [row]


def test_other_settings_are_refused_by_name(store):
    changed = settings(8, length=5, fingerprint="sha256:1", config={**settings(8).config, "image_size": 32})
    with pytest.raises(StoreError) as caught:
        StoreWriter(store, changed, {})
    text = str(caught.value)
    assert "was made with other settings" in text
    for part in ("config.image_size: 64, now 32", "fingerprint: 'sha256:0', now 'sha256:1'", "length: None, now 5"):
        assert part in text


def test_other_versions_are_not_other_settings_but_are_kept(tmp_path):
    writer = StoreWriter(tmp_path / "s", settings(8), {"torch": "2.11"})
    writer.begin()
    writer.close()
    again = StoreWriter(tmp_path / "s", settings(8), {"torch": "2.13"})
    again.begin()
    fill(again)
    again.finish()
    assert TokenStore(tmp_path / "s").manifest["environments"] == [{"torch": "2.11"}, {"torch": "2.13"}]


def test_outputs_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    with pytest.raises(StoreError, match="is not empty and is no token store; choose another output"):
        StoreWriter(tmp_path / "full", settings(8), {})
    with pytest.raises(StoreError, match="exists and is not a directory"):
        StoreWriter(tmp_path / "full/thesis.tex", settings(8), {})
    (tmp_path / "model").mkdir()
    (tmp_path / "model/manifest.json").write_text('{"name": "something else"}')
    with pytest.raises(StoreError, match="is not the manifest of a token store"):
        StoreWriter(tmp_path / "model", settings(8), {})
    assert (tmp_path / "full/thesis.tex").exists()


def test_an_empty_directory_is_taken(tmp_path, undisturbed):
    (tmp_path / "s").mkdir()
    run(tmp_path / "s")
    assert contents(tmp_path / "s") == undisturbed


def test_tokens_that_do_not_fit_the_store_are_refused(tmp_path):
    writer = StoreWriter(tmp_path / "s", settings(8), {})
    writer.begin()
    values, row = image(1, "float32", WIDTH)
    with (
        pytest.raises(ValueError, match=r"rows must have the tokens' lengths \[2\], got \[3\]"),
        writer.shard(0) as shard,
    ):
        shard.append(ragged([values[:2]]), [row])
    with pytest.raises(ValueError, match="tokens must be float32 of width"), writer.shard(0) as shard:
        shard.append(ragged([values.to(torch.float16)]), [row])


def test_a_file_replaced_by_itself_is_never_seen_half(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:  # noqa: PT012 - the block is what is tested
        file.write(b"new")
        assert path.read_text() == "old"
        raise RuntimeError
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["x"])
    with replacing(path) as file:
        file.write(b"new")
    assert (path.read_text(), os.listdir(tmp_path)) == ("new", ["x"])
