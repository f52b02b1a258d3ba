"""Batches follow from the seed and the step alone, whoever makes them."""

from __future__ import annotations

import errno
import os
from collections import Counter

import numpy as np
import pytest
import torch
from made_pictures import add_bad, make_pictures
from made_runs import make_shard, make_tokenizer

from dove_fast.data.crop import RandomCrop
from dove_fast.data.folder import ImageFolder
from dove_fast.data.samples import Picture
from dove_fast.data.webdataset import WebDataset
from dove_fast.failures import JobError
from dove_fast.text import TextTokenizer
from dove_fast.training.batches import Batches

SIZE = 8


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / "pictures", 10)


@pytest.fixture
def texts(tmp_path, pictures):
    return WebDataset(str(make_shard(tmp_path / "shards", pictures)))


def batches_of(samples, **options):
    options = {"batch_size": 4, "crop": RandomCrop(0.7), "seed": 5, "size": SIZE, **options}
    return Batches(samples, **options)


def same(left, right):
    masks = (left.mask is None and right.mask is None) or torch.equal(left.mask, right.mask)
    return masks and torch.equal(left.images, right.images) and all(map(torch.equal, left.queries, right.queries))


def test_a_function_of_seed_and_step(pictures):
    samples = ImageFolder(pictures)
    first = batches_of(samples)
    later = batches_of(samples)
    for step in (7, 0, 3):
        assert same(first[step], later[step])
    assert not same(first[0], first[1])
    assert not same(first[0], batches_of(samples, seed=6)[0])


def test_threads_change_nothing(texts, tmp_path):
    tokenizer = TextTokenizer(make_tokenizer(tmp_path / "tokenizer.json"))
    batches = batches_of(texts, tokenizer=tokenizer, longest_query=9, text_dropout=0.5)
    for step, batch in enumerate(batches.ahead(range(6), workers=3)):
        assert same(batch, batches[step])


def test_processes_share_a_batch(pictures):
    samples = ImageFolder(pictures)
    whole = batches_of(samples)[2]
    halves = [batches_of(samples, rank=rank, world=2)[2].images for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole.images)
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        batches_of(samples, world=3)


def test_every_epoch_has_every_sample_once(pictures):
    class Recording(ImageFolder):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    seen: list[int] = []
    batches = batches_of(Recording(pictures))
    for step in range(5):
        batches[step]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]


def test_bad_pictures_are_counted_and_replaced(pictures):
    add_bad(pictures)
    batches = batches_of(ImageFolder(pictures), batch_size=12)
    left_out = sum((batches[step].left_out for step in range(4)), Counter())
    # Once an epoch each, and again where they were drawn as a substitute.
    assert sum(left_out.values()) >= 8 and all(reason.startswith("cannot be decoded") for reason in left_out)
    assert batches[0].images.shape == (12, 3, SIZE, SIZE)


def test_files_that_cannot_be_read(pictures, monkeypatch):
    samples = ImageFolder(pictures)
    (pictures / "00.jpg").unlink()
    os.mkfifo(pictures / "pipe.png")
    listed = ImageFolder(pictures)
    gone = sum((batches_of(samples)[step].left_out for step in range(5)), Counter())
    assert set(gone) == {"cannot be read"}
    piped = sum((batches_of(listed)[step].left_out for step in range(5)), Counter())
    assert set(piped) == {"cannot be decoded"}

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Picture, "encoded", fail)
    with pytest.raises(OSError, match="Input/output error"):
        batches_of(samples)[0]


def test_only_bad_pictures(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_text("hello")
    with pytest.raises(JobError, match="100 samples in a row could not be used"):
        batches_of(ImageFolder(folder), batch_size=1)[0]


def test_texts_and_regions(texts, tmp_path):
    tokenizer = TextTokenizer(make_tokenizer(tmp_path / "tokenizer.json"))
    always = batches_of(texts, tokenizer=tokenizer, longest_query=9, crop=RandomCrop(1.0, mirror=True))
    batch = always[0]
    assert batch.mask.shape == (4, 1, SIZE, SIZE)
    for query, mask in zip(batch.queries, batch.mask, strict=True):
        # Never mirrored, as the text says left or right; the crop of a portrait is all of its width.
        assert query.tolist() in ([1, 2, 4], [1, 3, 4])
        columns = mask[0].any(dim=0)
        assert bool(columns[0]) == (query[1] == 2) and 0 < columns.sum() < SIZE
    never = batches_of(texts, text_dropout=1.0)[0]
    assert never.mask is None and all(len(query) == 0 for query in never.queries)
    some = [batches_of(texts, tokenizer=tokenizer, longest_query=9, text_dropout=0.5)[step] for step in range(50)]
    dropped = np.mean([len(query) == 0 for batch in some for query in batch.queries])
    assert 0.4 < dropped < 0.6
    for batch in some:
        for row, query in enumerate(batch.queries):
            assert len(query) or batch.mask is None or bool(batch.mask[row].all())


def test_texts_that_cannot_be_used(texts, tmp_path):
    tokenizer = TextTokenizer(make_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(JobError, match="could not be used, the last one for: text too long"):
        batches_of(texts, tokenizer=tokenizer, longest_query=2)[0]
    with pytest.raises(JobError, match="the model has no tokenizer"):
        batches_of(texts)[0]
    tight = batches_of(texts, tokenizer=tokenizer, longest_query=9, crop=RandomCrop(0.3, mirror=False))
    left_out = sum((tight[step].left_out for step in range(20)), Counter())
    assert set(left_out) == {"a box outside the crop"}


def test_parts(pictures):
    batch = batches_of(ImageFolder(pictures))[0]
    parts = list(batch.parts(2))
    assert [len(part.images) for part in parts] == [2, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


def test_no_samples():
    class Empty:
        def __init__(self):
            self.left_out = {}

        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="no samples"):
        batches_of(Empty())
