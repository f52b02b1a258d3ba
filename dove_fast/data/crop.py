"""Random square crops of pictures at many scales, and what a crop leaves of boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dove_fast.data.samples import Box

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Crop", "RandomCrop", "crop_boxes", "cut", "region_mask"]


@dataclass(frozen=True)
class Crop:
    """A square of an upright picture, in its pixels, and whether it is mirrored."""

    left: float
    top: float
    side: float
    mirrored: bool = False


@dataclass(frozen=True)
class RandomCrop:
    """Where to crop: `smallest` to 1 of the short side, log-uniform, anywhere; mirrored half of the time if `mirror`.

    Log-uniform, so that no scale is preferred. Raises `ValueError` unless 0 < smallest <= 1.
    """

    smallest: float = 0.5
    mirror: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest must be above 0 and at most 1, got {self.smallest}")

    def draw(self, width: int, height: int, random: np.random.Generator, *, may_mirror: bool = True) -> Crop:
        """Draw a crop of a picture of width x height pixels; a text with left and right in it may not be mirrored."""
        share, x, y, coin = random.random(4)
        side = max(1.0, min(width, height) * self.smallest ** float(share))
        return Crop(
            float(x) * (width - side), float(y) * (height - side), side, bool(self.mirror and may_mirror and coin < 0.5)
        )


def cut(image: Image.Image, crop: Crop, size: int) -> Tensor:
    """Return the crop of an RGB picture as uint8 (3, size, size), resized with antialiased bicubic interpolation."""
    from PIL.Image import Resampling

    box = (crop.left, crop.top, min(crop.left + crop.side, image.width), min(crop.top + crop.side, image.height))
    pixels = np.array(image.resize((size, size), Resampling.BICUBIC, box=box))
    if crop.mirrored:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def crop_boxes(
    boxes: Sequence[Box], frame: tuple[float, float], picture: tuple[int, int], crop: Crop, size: int
) -> list[tuple[int, int, int, int]] | None:
    """Return boxes in whole pixels of the crop (left, top, right, bottom), or None where it leaves nothing of one.

    boxes are measured in `frame` (width, height), which may differ from the picture's (width, height) in pixels. A box
    is the pixels whose centres it holds; where it holds none, nothing is left of it.
    """
    kept = []
    for left, top, right, bottom in boxes:
        scale = size / crop.side
        horizontal, vertical = picture[0] / frame[0], picture[1] / frame[1]
        xs = _whole_pixels((left * horizontal - crop.left) * scale, (right * horizontal - crop.left) * scale, size)
        ys = _whole_pixels((top * vertical - crop.top) * scale, (bottom * vertical - crop.top) * scale, size)
        if xs is None or ys is None:
            return None
        if crop.mirrored:
            xs = size - xs[1], size - xs[0]
        kept.append((xs[0], ys[0], xs[1], ys[1]))
    return kept


def _whole_pixels(first: float, last: float, size: int) -> tuple[int, int] | None:
    begin, end = (min(max(math.floor(edge + 0.5), 0), size) for edge in (first, last))
    return (begin, end) if begin < end else None


def region_mask(boxes: Sequence[tuple[int, int, int, int]], size: int) -> Tensor:
    """Return the union of boxes in pixels as (1, size, size) bool; no box means all of the picture."""
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    if not boxes:
        return ~mask
    for left, top, right, bottom in boxes:
        mask[:, top:bottom, left:right] = True
    return mask
