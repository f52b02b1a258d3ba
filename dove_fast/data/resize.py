"""Resizing a square of an image, as Pillow does it, by the native kernel where there is one."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dove_fast import native

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["resize_square"]


def resize_square(image: Image.Image, left: int, top: int, side: int, size: int) -> npt.NDArray[np.uint8]:
    """Return the square of an RGB image at (left, top), `side` pixels, antialiased bicubic as uint8 (3, size, size).

    The pixels are those of Pillow's `resize` with a box, to the bit: the kernel computes what Pillow does in a fraction
    of the time, and Pillow itself what the kernel does not, or all of it where the native module is missing.
    Raises `ValueError` for another mode or a square that is not within the image.
    """
    if image.mode != "RGB":
        raise ValueError(f"image must have mode RGB, got {image.mode!r}")
    width, height = image.size
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if side < 1 or min(left, top) < 0 or left + side > width or top + side > height:
        raise ValueError(f"the square at ({left}, {top}) of {side} pixels is not within {width} x {height} pixels")
    # Beyond that Pillow resizes columns first, from its version 13 on, and rounds between in another place.
    lines_first = height - size <= max(0, 2 * (width - size))
    module = _kernel() if lines_first else None
    if module is None:
        from PIL.Image import Resampling

        square = image.resize((size, size), Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return np.array(np.asarray(square).transpose(2, 0, 1), order="C")
    source = np.ascontiguousarray(np.asarray(image))
    made = np.empty((3, size, size), dtype=np.uint8)
    module.resize_square_cpu(source.ctypes.data, made.ctypes.data, width, height, left, top, side, size, "")
    return made


@functools.cache
def _kernel() -> ModuleType | None:
    return native.without_torch()
