"""Random crops and what they leave of boxes: against pixels that are tried one by one, and against drawn pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dove_fast.data.crop import Crop, RandomCrop, crop_boxes, cut, region_mask

SIZE = 16
WHOLE = (1.0, 1.0)


def edges_in_crop(box, picture, crop, size):
    """Return where a box's edges, fractions of the picture, lie in the crop: left, top, right, bottom in its pixels."""
    left, right = ((edge * picture[0] - crop.left) / crop.side * size for edge in (box[0], box[2]))
    top, bottom = ((edge * picture[1] - crop.top) / crop.side * size for edge in (box[1], box[3]))
    return (size - right, top, size - left, bottom) if crop.mirrored else (left, top, right, bottom)


def rasterised(boxes, picture, crop, size):
    """Return the pixels of a crop whose centres are in a box, (size, size) bool for each: tried one by one."""
    masks = []
    for box in boxes:
        left, top, right, bottom = edges_in_crop(box, picture, crop, size)
        masks.append(
            [[left < x + 0.5 < right and top < y + 0.5 < bottom for x in range(size)] for y in range(size)],
        )
    return torch.tensor(masks).view(-1, size, size)


def near_a_centre(boxes, picture, crop, size, distance):
    """Tell whether an edge comes that close to the middle of a pixel, where rounding decides."""
    return any(
        abs(edge - math.floor(edge) - 0.5) < distance
        for box in boxes
        for edge in edges_in_crop(box, picture, crop, size)
    )


@st.composite
def problems(draw):
    """A picture, one or two boxes in fractions of it, and a crop."""
    picture = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    side = draw(st.floats(0.1, 1)) * min(picture)
    crop = Crop(
        draw(st.floats(0, 1)) * (picture[0] - side),
        draw(st.floats(0, 1)) * (picture[1] - side),
        side,
        draw(st.booleans()),
    )
    boxes = []
    for _ in range(draw(st.integers(1, 2))):
        xs, ys = (sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1)))) for _ in range(2))
        boxes.append((xs[0], ys[0], xs[1], ys[1]))
    return boxes, picture, crop, draw(st.sampled_from([1, 5, SIZE]))


@given(problems(), st.sampled_from([WHOLE, (640.0, 480.0), (3.0, 0.25)]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_boxes_are_the_pixels_whose_centres_they_hold(problem, frame):
    boxes, picture, crop, size = problem
    assume(not near_a_centre(boxes, picture, crop, size, 1e-6))
    expected = rasterised(boxes, picture, crop, size)
    in_frame = [(x0 * frame[0], y0 * frame[1], x1 * frame[0], y1 * frame[1]) for x0, y0, x1, y1 in boxes]
    found = crop_boxes(in_frame, frame, picture, crop, size)
    if not expected.flatten(1).any(dim=1).all():
        assert found is None
    else:
        assert torch.equal(region_mask(found, size)[0], expected.any(dim=0))
        assert all(0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size for x0, y0, x1, y1 in found)


def drawn(picture, box):
    """Return a black picture with a white box, in pixels."""
    pixels = np.zeros((picture[1], picture[0], 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_boxes_lie_where_a_drawn_box_is_seen(seed, mirrored):
    """Crops that are made smaller and larger; at a box's edges the picture passes from black to white at one half."""
    random = np.random.default_rng(seed)
    seen = 0
    for _ in range(20):
        width, height = (int(value) for value in random.integers(30, 120, 2))
        drawn_crop = RandomCrop(0.3, mirror=False).draw(width, height, random)
        crop = Crop(drawn_crop.left, drawn_crop.top, drawn_crop.side, mirrored)
        x0, y0 = int(random.integers(0, width - 12)), int(random.integers(0, height - 12))
        box = (x0, y0, int(random.integers(x0 + 10, width + 1)), int(random.integers(y0 + 10, height + 1)))
        # Bands, so that one edge alone decides: at a corner the picture is grey.
        for band in ((box[0], 0, box[2], height), (0, box[1], width, box[3])):
            in_fractions = (band[0] / width, band[1] / height, band[2] / width, band[3] / height)
            found = crop_boxes([band], (width, height), (width, height), crop, 24)
            again = crop_boxes([in_fractions], WHOLE, (width, height), crop, 24)
            if near_a_centre([in_fractions], (width, height), crop, 24, 0.03):
                continue
            assert found == again
            shown = cut(drawn((width, height), band), crop, 24).float().mean(dim=0) > 127.5
            expected = torch.zeros(24, 24, dtype=torch.bool) if found is None else region_mask(found, 24)[0]
            edges = edges_in_crop(in_fractions, (width, height), crop, 24)
            if min(edges[2] - edges[0], edges[3] - edges[1]) < 4:
                # Too narrow to be seen whole.
                continue
            assert torch.equal(shown, expected), (band, crop)
            seen += 1
    assert seen > 15


def test_a_box_in_another_size_than_the_picture():
    crop = Crop(10, 0, 20, False)
    # The right half of a picture of 40 x 20, as its publisher saw it: twice as large, and of another shape.
    for frame in ((40, 20), (80, 40), (1, 1), (3, 7)):
        box = (frame[0] / 2, 0, frame[0], frame[1])
        assert crop_boxes([box], frame, (40, 20), crop, 10) == [(5, 0, 10, 10)]
        assert crop_boxes([box], frame, (40, 20), Crop(10, 0, 20, True), 10) == [(0, 0, 5, 10)]


def test_a_box_that_the_crop_removes():
    inside, outside, beside = (12, 5, 15, 8), (0, 0, 9, 20), (30, 0, 40, 20)
    crop = Crop(10, 0, 20, False)
    assert crop_boxes([inside], (40, 20), (40, 20), crop, 20) == [(2, 5, 5, 8)]
    for gone in (outside, beside, (10, 0, 10.4, 20), (12, 5, 12, 8)):
        assert crop_boxes([gone], (40, 20), (40, 20), crop, 20) is None
        # The text asks for both.
        assert crop_boxes([inside, gone], (40, 20), (40, 20), crop, 20) is None
    # A part of it is left.
    assert crop_boxes([(0, 0, 11, 20)], (40, 20), (40, 20), crop, 20) == [(0, 0, 1, 20)]
    assert crop_boxes([], (40, 20), (40, 20), crop, 20) == []


def test_a_region_is_the_union_of_its_boxes():
    mask = region_mask([(0, 0, 2, 1), (1, 0, 4, 3)], 4)
    assert mask.dtype == torch.bool and mask.shape == (1, 4, 4)
    assert mask[0].int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert region_mask([], 4).all()


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_a_cut_without_resizing_is_the_pixels(noise):
    found = cut(Image.fromarray(noise), Crop(4, 2, 16), 16)
    assert found.dtype == torch.uint8 and found.shape == (3, 16, 16) and found.is_contiguous()
    assert np.array_equal(found.permute(1, 2, 0).numpy(), noise[2:18, 4:20])
    mirrored = cut(Image.fromarray(noise), Crop(4, 2, 16, True), 16)
    assert torch.equal(mirrored, found.flip(2)) and mirrored.is_contiguous()


def test_a_cut_that_resizes_keeps_a_colour_and_the_mean(noise):
    plain = Image.new("RGB", (30, 20), (10, 200, 30))
    for side, size in ((20, 7), (3.3, 9), (1.0, 4)):
        found = cut(plain, Crop(1.25, 0.0, side), size)
        assert found.flatten(1).unique(dim=1).flatten().tolist() == [10, 200, 30]
    # A crop to the last pixel, whatever the rounding of its sum.
    corner = cut(Image.fromarray(noise), Crop(30 - 19.9, 20 - 19.9, 19.9 + 1e-12), 10)
    whole = noise[1:, 11:].mean()
    assert corner.float().mean().item() == pytest.approx(whole, rel=0.02)


def test_crops_lie_in_the_picture_at_every_scale_alike():
    random = np.random.default_rng(0)
    cropping = RandomCrop(0.25)
    width, height = 300, 200
    crops = [cropping.draw(width, height, random) for _ in range(4000)]
    sides = np.array([crop.side for crop in crops])
    assert sides.min() >= 50 and sides.max() <= 200
    for crop in crops:
        assert 0 <= crop.left <= width - crop.side and 0 <= crop.top <= height - crop.side
    # Uniform numbers' shares in tenths: 400 expected, with a standard deviation of 19.
    scales = np.log(sides / 200) / math.log(0.25)
    places = [np.array([crop.left / (width - crop.side) for crop in crops])]
    places.append(np.array([crop.top / (height - crop.side) for crop in crops if crop.side < 199]))
    for values in (scales, *places):
        counts, _ = np.histogram(values, bins=10, range=(0, 1))
        assert counts.sum() == len(values)
        assert np.abs(counts - len(values) / 10).max() < 5 * 19
    mirrored = sum(crop.mirrored for crop in crops)
    assert abs(mirrored - 2000) < 5 * 32


def test_what_may_not_be_mirrored_is_not_and_lies_where_it_would():
    draws = {
        (mirror, may): [
            RandomCrop(0.5, mirror).draw(64, 48, np.random.default_rng(seed), may_mirror=may) for seed in range(40)
        ]
        for mirror in (True, False)
        for may in (True, False)
    }
    assert 0 < sum(crop.mirrored for crop in draws[True, True]) < 40
    for key, crops in draws.items():
        assert key == (True, True) or not any(crop.mirrored for crop in crops)
        places = [(crop.left, crop.top, crop.side) for crop in crops]
        assert places == [(crop.left, crop.top, crop.side) for crop in draws[True, True]]


def test_the_whole_short_side_and_the_smallest_pictures():
    random = np.random.default_rng(0)
    for _ in range(20):
        crop = RandomCrop(1.0).draw(50, 30, random)
        assert (crop.side, crop.top) == (30, 0) and 0 <= crop.left <= 20
        # Never less than a pixel.
        assert RandomCrop(0.01).draw(2, 3, random).side >= 1
        tiny = RandomCrop(0.01, mirror=False).draw(1, 1, random)
        assert tiny == Crop(0, 0, 1)
    for size in (1, 3):
        assert cut(Image.new("RGB", (1, 1), (1, 2, 3)), Crop(0, 0, 1), size)[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("smallest", [0, -0.5, 1.0001, math.nan])
def test_shares_that_make_no_crop(smallest):
    with pytest.raises(ValueError, match=f"smallest must be above 0 and at most 1, got {smallest}"):
        RandomCrop(smallest)
