"""What texts do, against a loop over samples; and which samples of a data set can be used."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from made_pictures import make_pictures
from made_shards import pictures, write_tar
from PIL import Image
from small_models import NUM_TOKENS, micro_config, micro_model, sample_images
from small_tokenizer import write_tokenizer

from dove_fast.data import ShortSideCenterCrop, WebDataset
from dove_fast.evaluation.grounding import GroundingMeter
from dove_fast.evaluation.reading import region_batches
from dove_fast.evaluation.shown import choose_regions
from dove_fast.failures import JobError
from dove_fast.text import TextTokenizer

QUERIES = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8, 9])]


def samples():
    images = (sample_images(5) * 255).round().to(torch.uint8)
    mask = torch.zeros(5, 1, 16, 16, dtype=torch.bool)
    for row in range(5):
        mask[row, :, row : row + 6, 2 : 9 + row] = True
    return images, mask


def test_errors_on_both_sides_by_a_loop():
    model, (images, mask) = micro_model(), samples()
    meter = GroundingMeter(model, lengths=[3, 10])
    meter.add(images[:2], QUERIES[:2], mask[:2])
    meter.add(images[2:], QUERIES[2:], mask[2:])
    found = meter.result({"text too long": 2})
    expected = []
    for options in ({"length": 3}, {"length": 10}, {}):
        for queries in (QUERIES, [None] * 5):
            figures = []
            for image, query, region in zip(images, queries, mask, strict=True):
                made, tokens = model.reconstruct(image[None], [query], **options)
                errors = ((image / 255 - made[0].clamp(0, 1)) ** 2).mean(dim=0)
                sides = errors[region[0]].mean().item(), errors[~region[0]].mean().item()
                figures.append([tokens.host_lengths[0], *sides, *(-10 * np.log10(sides))])
            expected.append(np.mean(figures, axis=0))
    assert [(row.name, row.with_text) for row in found.rows] == [
        (name, with_text) for name in ("3 tokens", "10 tokens", "adaptive") for with_text in (True, False)
    ]
    for row, figures in zip(found.rows, expected, strict=True):
        measured = (row.tokens, row.mse_inside, row.mse_outside, row.psnr_inside, row.psnr_outside)
        assert measured == pytest.approx(figures.tolist(), rel=1e-4)
    assert found.samples == 5 and found.set_aside == {"text too long": 2}
    assert found.region_share == pytest.approx(mask.float().mean().item())
    assert (found.length_with_text, found.length_without) == (found.rows[-2].tokens, found.rows[-1].tokens)
    assert found.rows[0] != found.rows[1], "the text changes the tokens"


def test_a_side_without_pixels_does_not_count():
    model, (images, mask) = micro_model(), samples()
    whole = mask.clone()
    whole[3:] = True
    meter, some = GroundingMeter(model, lengths=[4]), GroundingMeter(model, lengths=[4])
    meter.add(images, QUERIES, whole)
    some.add(images[:3], QUERIES[:3], mask[:3])
    found, expected = meter.result(), some.result()
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert row.mse_outside == pytest.approx(other.mse_outside, rel=1e-4)
        assert row.psnr_outside == pytest.approx(other.psnr_outside, rel=1e-4) and row.psnr_outside < 90
        assert row.mse_inside != pytest.approx(other.mse_inside, rel=1e-3)
    assert found.samples == 5


def test_pictures_that_are_not_finite():
    model, (images, mask) = micro_model(), samples()
    model.vqgan.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(JobError, match="4 tokens: the pictures hold NaN or infinity"):
        GroundingMeter(model, lengths=[4]).add(images, QUERIES, mask)


def test_ids_beyond_the_embedding_are_set_aside(tmp_path, tokenizer):
    data = shard(tmp_path, [{"text": "a red cat", "boxes": [[5, 0, 15, 20]]}])
    config = micro_config()
    config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, vocab_size=3))
    set_aside: Counter[str] = Counter()
    assert not list(region_batches(data, tokenizer, config, 1, most=None, set_aside=set_aside))
    assert set_aside == {"a text with ids that the generator has no embedding for": 1}


def test_a_medium_that_fails_is_no_samples_fault(tmp_path, tokenizer, monkeypatch):
    data = shard(tmp_path, [{"text": "a cat", "boxes": [[5, 0, 15, 20]]}])

    def fail(_):
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr("dove_fast.data.samples.Picture.encoded", fail)
    with pytest.raises(OSError, match="the disk fails"):
        list(region_batches(data, tokenizer, micro_config(), 1, most=None, set_aside=Counter()))
    with pytest.raises(OSError, match="the disk fails"):
        choose_regions(data, 16, 1, readable=lambda _: True)


def test_a_meter_without_samples():
    with pytest.raises(ValueError, match="no samples with a text and a region"):
        GroundingMeter(micro_model(), lengths=[4]).result()
    with pytest.raises(ValueError, match="from 1 to this model's 16, got 99"):
        GroundingMeter(micro_model(), lengths=[99])


@pytest.fixture
def tokenizer(tmp_path) -> TextTokenizer:
    return TextTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))


def shard(folder: Path, entries: list[dict]) -> WebDataset:
    """A picture of 30 x 20 for each entry, with a json beside it."""
    photo = pictures(make_pictures(folder / "photos", 1))[0]
    with Image.open(photo) as image:
        image.resize((30, 20)).save(folder / "picture.png")
    content = (folder / "picture.png").read_bytes()
    members = []
    for index, entry in enumerate(entries):
        members += [(f"{index:02d}.png", content), (f"{index:02d}.json", json.dumps(entry).encode())]
    return WebDataset(write_tar(folder / "s.tar", members))


def test_which_samples_are_used(tmp_path, tokenizer):
    # The centred square is [5, 25] of the width; all 20 of the height.
    data = shard(
        tmp_path,
        [
            {"text": "a red cat", "boxes": [[5, 0, 15, 20]]},
            {"text": "a cat", "boxes": [[0, 0, 4, 20]]},
            {"text": "a cat", "boxes": [[0, 0, 30, 20]]},
            {"text": "a cat"},
            {"text": "cat " * 40, "boxes": [[5, 0, 15, 20]]},
            {"text": "cat", "boxes": [[5, 10, 25, 20], [5, 0, 10, 5]]},
        ],
    )
    set_aside: Counter[str] = Counter()
    batches = list(region_batches(data, tokenizer, micro_model().config, 1, most=None, set_aside=set_aside))
    assert [batch.queries[0].tolist() for batch in batches] == [[2, 3, 4], [4]]
    left = torch.zeros(16, 16, dtype=torch.bool)
    left[:, :8] = True
    both = torch.zeros(16, 16, dtype=torch.bool)
    both[8:] = both[:4, :4] = True
    assert torch.equal(batches[0].mask[0, 0], left) and torch.equal(batches[1].mask[0, 0], both)
    with Image.open(tmp_path / "picture.png") as image:
        pixels = torch.from_numpy(ShortSideCenterCrop(16)(image.convert("RGB")))
    assert torch.equal(batches[0].images[0], pixels)
    assert set_aside == {
        "a box outside the crop": 1,
        "the region is the whole picture": 1,
        "no text, or no region": 1,
        "text too long": 1,
    }


def test_batches_and_the_most_samples(tmp_path, tokenizer):
    data = shard(tmp_path, [{"text": "cat", "boxes": [[5, 0, 15, 20]]}] * 5)
    config = micro_model().config

    def sizes(**options):
        return [
            len(batch.images) for batch in region_batches(data, tokenizer, config, 2, set_aside=Counter(), **options)
        ]

    assert sizes(most=None) == [2, 2, 1]
    assert sizes(most=3) == [2, 1]
    assert sizes(most=2) == [2]
    assert config.num_tokens == NUM_TOKENS
