"""Which images and regions are chosen to be shown."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from made_pictures import add_bad, make_pictures
from made_shards import write_shards, write_tar
from PIL import Image

from dove_fast.data import ShortSideCenterCrop, WebDataset, list_inputs, load_image
from dove_fast.evaluation import laplacian_variance
from dove_fast.evaluation import shown as shown_module
from dove_fast.evaluation.shown import choose_images, choose_regions


def test_from_the_simplest_to_the_most_complex(tmp_path):
    photos = make_pictures(tmp_path / "photos", 10)
    inputs = list_inputs(photos)
    all_pixels = torch.stack(
        [torch.from_numpy(load_image(item.path, ShortSideCenterCrop(16)).pixels) for item in inputs]
    )
    complexity = laplacian_variance(all_pixels)
    order = complexity.argsort().tolist()
    seen = []
    chosen = choose_images(photos, 16, 4, on_image=lambda *state: seen.append(state))
    assert chosen.keys == tuple(inputs[order[place]].key for place in (0, 3, 6, 9))
    torch.testing.assert_close(chosen.complexity, complexity[[order[place] for place in (0, 3, 6, 9)]])
    assert (chosen.pixels == all_pixels[[order[place] for place in (0, 3, 6, 9)]]).all()
    assert (chosen.looked_at, chosen.errors) == (10, ())
    assert seen == [(number, 10) for number in range(1, 11)]
    # One is the simplest; more than there are is all.
    assert choose_images(photos, 16, 1).keys == chosen.keys[:1]
    assert len(choose_images(photos, 16, 99).keys) == 10


def test_every_shard_is_looked_into(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", make_pictures(tmp_path / "photos", 10), size=4)
    monkeypatch.setattr(shown_module, "LOOKED_AT", 6)
    chosen = choose_images(tmp_path / "shards", 16, 6)
    assert chosen.looked_at == 6
    assert sorted(chosen.keys) == ["0000", "0001", "0004", "0005", "0008", "0009"]
    monkeypatch.setattr(shown_module, "LOOKED_AT", 2)
    assert sorted(choose_images(tmp_path / "shards", 16, 6).keys) == ["0000", "0004"]


def test_what_cannot_be_read(tmp_path):
    photos = make_pictures(tmp_path / "photos", 4)
    bad = add_bad(photos)
    chosen = choose_images(photos, 16, 9)
    assert len(chosen.keys) == chosen.looked_at == 4
    assert [error.key for error in chosen.errors] == bad
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.png").write_text("hello")
    with pytest.raises(ValueError, match="no image could be read, the first one for: "):
        choose_images(tmp_path / "none", 16, 2)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        choose_images(photos, 16, 0)


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def regions(tmp_path, found: list[dict], count: int = 4, **options):
    """Choose of pictures 40 wide and 20 high, whose centred squares go from 10 to 30."""
    members = []
    for index, entry in enumerate(found):
        members += [(f"{index}.png", png(40, 20, index)), (f"{index}.json", json.dumps(entry).encode())]
    samples = WebDataset(write_tar(tmp_path / "r.tar", members))
    size = options.pop("size", 20)
    return choose_regions(samples, size, count, **{"readable": lambda text: True, **options})


def test_regions_are_cut_as_the_image_is(tmp_path):
    (region,) = regions(tmp_path, [{"text": "a  cat", "boxes": [[12, 2, 18, 10], [20, 4, 24, 6]]}])
    assert (region.key, region.text) == ("r/0", "a cat")
    assert region.boxes == ((2, 2, 8, 10), (10, 4, 14, 6))
    assert int(region.mask.sum()) == 48 + 8 and region.mask[0, 2:10, 2:8].all()
    whole = np.asarray(Image.open(io.BytesIO(png(40, 20)))).transpose(2, 0, 1)
    assert (region.pixels.numpy() == whole[:, :, 10:30]).all()
    (smaller,) = regions(tmp_path, [{"text": "a cat", "boxes": [[12, 2, 18, 10]]}], size=13)
    transformed = ShortSideCenterCrop(13)(Image.open(io.BytesIO(png(40, 20))))
    assert (smaller.pixels.numpy() == transformed).all()


def test_regions_that_show_nothing_are_passed_over(tmp_path):
    good = {"text": "good", "boxes": [[12, 2, 18, 10]]}
    outside = {"text": "outside", "boxes": [[0, 0, 9, 9]]}
    large = {"text": "large", "boxes": [[10, 0, 30, 19]]}
    found = regions(tmp_path, [outside, large, {"text": "no box"}, {**good, "text": "refused"}, good] * 2, readable={
        "outside", "large", "good", "no box"
    }.__contains__)  # fmt: skip
    assert [(region.key, region.text) for region in found] == [("r/4", "good"), ("r/9", "good")]


def test_regions_are_of_different_pictures_and_spread(tmp_path):
    box = [[12, 2, 18, 10]]
    many = {"regions": [{"text": f"t{number}", "boxes": box} for number in range(5)]}
    found = regions(tmp_path, [many] * 8)
    assert [region.key for region in found] == ["r/0", "r/2", "r/4", "r/6"]
    assert [region.key for region in regions(tmp_path, [many] * 2)] == ["r/0", "r/1"]
