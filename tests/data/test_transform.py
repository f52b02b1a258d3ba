"""The named transform: exact where nothing is resampled, centred, antialiased, and small in memory."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dove_fast.data import ShortSideCenterCrop, decode_image

transform = ShortSideCenterCrop(8)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def apply(pixels: np.ndarray) -> np.ndarray:
    result = transform(Image.fromarray(pixels))
    assert result.dtype == np.uint8
    assert result.shape == (3, 8, 8)
    assert result.flags.c_contiguous
    assert result.flags.writeable
    return result.transpose(1, 2, 0)


def test_an_image_of_the_right_size_is_unchanged():
    pixels = picture(8, 8)
    assert np.array_equal(apply(pixels), pixels)


@pytest.mark.parametrize(("width", "left"), [(9, 0), (10, 1), (13, 2), (14, 3)])
def test_the_crop_is_centred_at_a_whole_pixel_rounded_down(width, left):
    pixels = picture(width, 8)
    assert np.array_equal(apply(pixels), pixels[:, left : left + 8])
    tall = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    assert np.array_equal(apply(tall), tall[left : left + 8])


def test_it_equals_resizing_the_short_side_and_then_cropping():
    pixels = picture(96, 32)
    whole = np.asarray(Image.fromarray(pixels).resize((24, 8), Image.Resampling.BICUBIC))
    assert np.abs(apply(pixels).astype(int) - whole[:, 8:16]).max() <= 1


def test_downscaling_is_antialiased():
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    result = apply(np.repeat(checkers[..., None], 3, 2).astype(np.uint8))
    assert np.abs(result.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (10, 100000), (100000, 10)])
def test_extreme_shapes(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = Image.new("RGB", size, (10, 200, 30))
    result = ShortSideCenterCrop(256)(image)
    assert (result == np.array([10, 200, 30], np.uint8)[:, None, None]).all()
    # Resizing the whole 10 x 100000 image first would take two gigabytes (ru_maxrss counts kilobytes).
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_its_name_and_parameters_are_plain_json():
    plain = transform.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["name"] == "short-side-bicubic-center-crop/1"
    assert plain["size"] == 8


def test_version_1_gives_the_same_pixels_for_ever():
    y, x = np.mgrid[0:20, 0:30]
    pixels = np.stack([x * 8, y * 12, (x + y) * 5], -1).astype(np.uint8)
    # 2.5 source pixels make one: the first is centred at x = 5 + 0.75, where red is 46.
    assert apply(pixels)[:2, :2].tolist() == [[[46, 10, 33], [66, 10, 45]], [[46, 38, 45], [66, 38, 57]]]


def test_a_reduced_jpeg_gives_nearly_the_same_pixels(tmp_path):
    photo = Path(__file__).parents[2] / "examples/photos/coffee.jpg"
    plain, reduced = ShortSideCenterCrop(64), ShortSideCenterCrop(64, reduced=True)
    whole, small = decode_image(photo), decode_image(photo, least_side=reduced.least_side)
    assert (small.width, small.height) == (whole.width, whole.height)
    assert min(small.image.size) <= min(whole.image.size) // 2
    assert min(small.image.size) >= 128
    error = np.square(plain(whole.image).astype(float) - reduced(small.image).astype(float)).mean()
    # Over 35 dB; both are filtered well above what 64 pixels can hold.
    assert 10 * math.log10(255**2 / error) > 35
    assert plain.name != reduced.name
    assert plain.to_dict() == {key: value for key, value in plain.to_dict().items() if key != "least_side"}
    # Nothing to reduce: the same bits.
    Image.new("RGB", (70, 65), (9, 99, 200)).save(tmp_path / "x.jpg")
    small = decode_image(tmp_path / "x.jpg", least_side=128)
    assert np.array_equal(reduced(small.image), plain(decode_image(tmp_path / "x.jpg").image))


def test_a_reduced_jpeg_that_lies_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (640, 320)).save(tmp_path / "x.jpg", exif=exif)
    small = decode_image(tmp_path / "x.jpg", least_side=64)
    assert (small.width, small.height) == (320, 640)
    assert small.image.size == (80, 160)
