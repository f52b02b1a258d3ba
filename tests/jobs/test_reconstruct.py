"""Decoding a store to PNG files: the model's pictures, under names that neither collide nor lead outside."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dove_fast import RaggedTokens, StoreError, TokenStore
from dove_fast.failures import JobError
from dove_fast.jobs import LoadedModel, TokenizeOptions, reconstruct, tokenize
from dove_fast.jobs.reconstruct import picture_names


@pytest.fixture
def store(tmp_path, photos, loaded) -> TokenStore:
    tokenize(photos, tmp_path / "s", loaded, TokenizeOptions(shard_size=4))
    return TokenStore(tmp_path / "s")


def test_pictures_are_the_models(tmp_path, store, loaded):
    seen = []
    report = reconstruct(store, tmp_path / "out", loaded, batch_size=3, on_progress=seen.append)
    assert (report.images, report.tokens) == (10, int(store.lengths.sum()))
    assert [progress.done for progress in seen] == [3, 6, 9, 10]
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert names == sorted(key.rsplit(".", 1)[0] + ".png" for key in store.keys)
    for index, key in enumerate(store.keys):
        image = loaded.model.decode(store.ragged([index]))[0].clamp(0, 1)
        expected = (image * 255).permute(1, 2, 0).numpy()
        picture = np.asarray(Image.open(tmp_path / "out" / (key.rsplit(".", 1)[0] + ".png")))
        assert picture.shape == (16, 16, 3)
        assert np.abs(picture - expected).max() <= 0.51


@pytest.mark.parametrize("options", [{"max_length": 2}, {"length": 1}], ids=str)
def test_fewer_tokens(tmp_path, store, loaded, options):
    limit = next(iter(options.values()))
    report = reconstruct(store, tmp_path / "out", loaded, **options)
    assert report.tokens == store.lengths.clip(max=limit).sum()
    assert report.tokens < store.lengths.sum()
    index = int(store.lengths.argmax())
    kept = RaggedTokens.from_padded(store[index].tokens[None, :limit], [limit])
    expected = (loaded.model.decode(kept)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    picture = np.asarray(Image.open(tmp_path / "out" / (store[index].key.rsplit(".", 1)[0] + ".png")))
    assert np.abs(picture - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 16}, "has images of 1 tokens, too few for length=16"),
        ({"max_length": 17}, "max_length must be from 1 to 16"),
        ({"length": 1, "max_length": 2}, "length or max_length, not both"),
    ],
)
def test_lengths_that_cannot_be(tmp_path, store, loaded, options, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(store, tmp_path / "out", loaded, **options)
    assert not (tmp_path / "out").exists()


def test_a_second_run_goes_on(tmp_path, store, loaded):
    reconstruct(store, tmp_path / "out", loaded)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    first, second = sorted(before)[:2]
    first.unlink()
    second.write_bytes(b"")
    assert reconstruct(store, tmp_path / "out", loaded, batch_size=1).images == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == before
    assert reconstruct(store, tmp_path / "out", loaded).images == 0


def test_pictures_of_something_else_are_left_alone(tmp_path, store, loaded):
    reconstruct(store, tmp_path / "out", loaded)
    with pytest.raises(ValueError, match="holds pictures of another store or of other lengths; choose another output"):
        reconstruct(store, tmp_path / "out", loaded, max_length=1)


def test_another_checkpoint_is_refused_with_both_fingerprints(tmp_path, store, loaded):
    other = LoadedModel(loaded.model, "sha256:other")
    with pytest.raises(StoreError, match=f"its fingerprint is {loaded.fingerprint}, this checkpoint's is sha256:other"):
        reconstruct(store, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


def test_other_files_are_left_alone(tmp_path, photos, loaded):
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    tokenize(photos, tmp_path / "s", loaded)
    with pytest.raises(ValueError, match="is not empty and holds no pictures of a store; choose another output"):
        reconstruct(TokenStore(tmp_path / "s"), photos, loaded)
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before


def test_a_name_as_long_as_names_can_be(tmp_path, photos, loaded):
    photo = next(photos.rglob("*.png"))
    long = photo.rename(photo.with_name("x" * 251 + ".png"))
    tokenize(long, tmp_path / "s", loaded)
    reconstruct(TokenStore(tmp_path / "s"), tmp_path / "out", loaded)
    assert (tmp_path / "out" / long.name).is_file()


def test_an_output_that_is_a_file_is_refused(tmp_path, store, loaded):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="exists and is not a directory"):
        reconstruct(store, tmp_path / "out", loaded)


def test_a_failing_disk_stops_the_job(tmp_path, store, loaded, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(JobError, match="No space left on device; run the same command again"):
        reconstruct(store, tmp_path / "out", loaded)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_decoding_takes_bfloat16_tokens(tmp_path, photos, loaded):
    import copy

    narrow = LoadedModel(copy.deepcopy(loaded.model).to(torch.bfloat16), loaded.fingerprint)
    tokenize(photos / "00.jpg", tmp_path / "s", narrow)
    reconstruct(TokenStore(tmp_path / "s"), tmp_path / "out", loaded)
    assert Image.open(tmp_path / "out/00.png").size == (16, 16)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["a/b.jpg", "c", "d.e.webp"], ["a/b.png", "c.png", "d.e.png"]),
        (["a.jpg", "a.png", "b.jpg"], ["a.jpg.png", "a.png.png", "b.png"]),
        (["a.jpg", "a.png", "a.jpg.webp"], ["a.jpg.png", "a.png.png", "a.jpg.webp.png"]),
        (["x.jpg", "x.png/y.jpg"], ["x.jpg.png", "x.png/y.png"]),
        (["../up.jpg", "/etc/x.jpg", "a/../../b.jpg"], ["_/up.png", "etc/x.png", "a/_/_/b.png"]),
        ([], []),
    ],
)
def test_names(keys, names):
    assert picture_names(keys) == names


def test_keys_without_a_name_of_their_own_are_refused():
    with pytest.raises(StoreError, match=r"keys lead to the same picture: '/a\.jpg', 'a\.jpg'"):
        picture_names(["/a.jpg", "a.jpg"])
    for key in ("", "/", "a\0b.jpg"):
        with pytest.raises(StoreError, match="cannot be the name of a picture"):
            picture_names([key])


PARTS = st.sampled_from(["a", "b", "a.png", "a.jpg", "a.jpg.png", "b.webp", "..", "c.d"])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), unique=True, max_size=8))
def test_names_are_different_stay_inside_and_are_no_folders_of_each_other(keys):
    try:
        names = picture_names(keys)
    except StoreError:
        return
    assert len(set(names)) == len(keys)
    for name in names:
        assert name.endswith(".png")
        assert ".." not in name.split("/")
        assert not name.startswith("/")
        assert not any(other.startswith(f"{name}/") for other in names)
