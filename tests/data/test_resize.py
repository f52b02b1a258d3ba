"""Resizing squares: Pillow's bits, by the kernel of every instruction set, and where there is none."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Resampling

from dove_fast import native
from dove_fast.data import resize
from dove_fast.data.resize import resize_square

ISAS = [isa for isa in native.build_info()["cpu_isas"] if native.load().isa_available(isa)]
# Since then Pillow resizes columns first where the height shrinks most.
COLUMNS_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def noise(width: int, height: int, *, extreme: bool = False, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = 255 * random.integers(0, 2, (height, width, 3)) if extreme else random.integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def by_pillow(image: Image.Image, left: int, top: int, side: int, size: int) -> np.ndarray:
    square = image.resize((size, size), Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(square).transpose(2, 0, 1)


class OnlyIsa:
    """The native module in one instruction set, which counts its calls."""

    def __init__(self, isa: str) -> None:
        self.isa, self.calls = isa, 0

    def resize_square_cpu(self, *arguments):
        self.calls += 1
        native.load().resize_square_cpu(*arguments[:-1], self.isa)


@pytest.fixture(params=ISAS)
def kernel(request, monkeypatch):
    module = OnlyIsa(request.param)
    monkeypatch.setattr(resize, "_kernel", lambda: module)
    return module


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(
    ("width", "height", "left", "top", "side", "size"),
    [
        (256, 256, 0, 0, 256, 64),
        (500, 375, 62, 0, 375, 256),
        (333, 500, 0, 83, 333, 64),
        (64, 64, 0, 0, 64, 64),
        (70, 66, 3, 1, 64, 64),
        (40, 30, 5, 0, 30, 64),
        (1, 1, 0, 0, 1, 3),
        (1200, 20, 590, 0, 20, 17),
        (300, 280, 11, 7, 101, 31),
    ],
)
def test_pillows_bits(kernel, width, height, left, top, side, size, extreme):
    image = noise(width, height, extreme=extreme)
    made = resize_square(image, left, top, side, size)
    assert made.dtype == np.uint8 and made.flags.c_contiguous and kernel.calls == 1
    np.testing.assert_array_equal(made, by_pillow(image, left, top, side, size))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pillows_bits_of_any_square(data):
    width, height = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    side = data.draw(st.integers(1, min(width, height)))
    left, top = data.draw(st.integers(0, width - side)), data.draw(st.integers(0, height - side))
    size = data.draw(st.integers(1, 70))
    image = noise(width, height, extreme=data.draw(st.booleans()), seed=data.draw(st.integers(0, 9)))
    np.testing.assert_array_equal(resize_square(image, left, top, side, size), by_pillow(image, left, top, side, size))


def test_a_high_image_is_pillows(kernel):
    image = noise(20, 300)
    made = resize_square(image, 0, 140, 20, 16)
    np.testing.assert_array_equal(made, by_pillow(image, 0, 140, 20, 16))
    assert kernel.calls == 0
    if COLUMNS_FIRST:
        # The reason: rounding after the lines gives other bits.
        lines_first, pixels = np.empty((3, 16, 16), np.uint8), np.asarray(image)
        kernel.resize_square_cpu(pixels.ctypes.data, lines_first.ctypes.data, 20, 300, 0, 140, 20, 16, "")
        assert (lines_first != made).any()


def test_without_a_kernel(monkeypatch):
    image = noise(100, 80)
    with_kernel = resize_square(image, 10, 0, 80, 64)
    monkeypatch.setattr(resize, "_kernel", lambda: None)
    made = resize_square(image, 10, 0, 80, 64)
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, with_kernel)


def test_refusals():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        resize_square(Image.new("RGB", (8, 8)), 0, 0, 4, 0)
    with pytest.raises(ValueError, match="image must have mode RGB, got 'L'"):
        resize_square(Image.new("L", (8, 8)), 0, 0, 8, 8)
    for left, top, side, size in ((0, 0, 9, 8), (1, 0, 8, 8), (-1, 0, 4, 4), (0, 0, 0, 4)):
        with pytest.raises(ValueError, match="is not within 8 x 8 pixels"):
            resize_square(Image.new("RGB", (8, 8)), left, top, side, size)


def test_needs_no_torch():
    code = (
        "import sys; from PIL import Image; from dove_fast.data import resize, ShortSideCenterCrop; "
        "made = ShortSideCenterCrop(8)(Image.new('RGB', (9, 12), (1, 2, 3))); "
        "assert made[:, 0, 0].tolist() == [1, 2, 3]; assert 'torch' not in sys.modules; "
        "print(resize._kernel() is not None)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "True\n", found.stderr


def test_torch_may_come_later():
    code = (
        "from dove_fast import native; assert native.without_torch() is not None; import torch; "
        "assert torch.ones(2000, 2000).sum() == 4e6; assert native.load() is native.without_torch(); "
        # One runtime, torch's own where it has one.
        "maps = open('/proc/self/maps').read(); "
        "print(len({line.split()[-1] for line in maps.splitlines() if 'libgomp' in line}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "1\n", found.stderr
